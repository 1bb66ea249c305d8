"""How far each random op moves a CPU generator.

Nothing about torch is assumed. The number of words that an op draws is found by trials, once per
process and class of ops (name, dtype, contiguity, size class). A trial runs the op on a small
tensor and compares all bytes of the state afterwards with the state that each of a few rules
predicts. The cost of an op that follows no rule is unknown: the op must be run to move a generator
past it.
"""

from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lateinit._rng.mt19937 import generator_at, jump, state_of
from lateinit._rng.position import Cost, Seeker, paired
from lateinit._torch import OP_TABLE, by_name


class DrawSpec(NamedTuple):
    """One random op that fills a tensor from a CPU generator.

    Attributes:
        op: the overload's qualified name, as `OpOverload.name()` gives it.
        numel: the number of elements of the filled tensor.
        dtype: the dtype of that tensor.
        contiguous: whether that tensor `is_contiguous()`; a tensor that is dense in another order
            of dims, such as channels last, is not.
        args: the op's numbers in the schema's order, None included; whether the cost depends on
            them is in the op's row of the op table (`OpTraits.draws`).
    """

    op: str
    numel: int
    dtype: torch.dtype
    contiguous: bool
    args: tuple[Any, ...] = ()


_Rule = Callable[[int], Cost | None]


def consumption(draw: DrawSpec) -> Cost | None:
    """The cost of a draw, or None if it is not known.

    The first call for a class of draws runs the op some twenty times, on tensors of up to 700
    elements, with generators of its own; this takes about a millisecond. Do not call it under a
    torch mode that keeps ops from their kernels: the trials would fail, and the class would stay
    unknown for as long as the process lives.

    Args:
        draw: the op and the tensor that it fills.

    Returns:
        The cost; None for an op that is not in the table, or follows no rule with the installed
        torch.

    Example:
        >>> consumption(DrawSpec("aten::normal_", 100, torch.float32, contiguous=True))
        Cost(words=116, normals=0)
        >>> consumption(DrawSpec("aten::normal_", 5, torch.float32, contiguous=True))
        Cost(words=0, normals=5)
    """
    args = _numbers(draw)
    if args is None:
        return None
    elements = _elements(draw.numel, draw.dtype)
    contiguous = draw.contiguous or draw.numel < 2
    rule = _rule(draw.op, draw.dtype, contiguous, _size_class(elements), args)
    return rule(elements) if rule else None


def words_drawn(op: str, dtype: torch.dtype, numel: int) -> int:
    """The number of words that a known op draws for ``numel`` contiguous elements: 0, or >= 16."""
    cost = consumption(DrawSpec(op, numel, dtype, contiguous=True))
    assert cost is not None
    return cost.words


def _each(per: int) -> _Rule:
    return lambda elements: Cost(per * elements)


def _last_again(per: int) -> _Rule:
    """Groups of 16 elements; if a remainder is left, the last 16 elements are drawn again.

    aten/src/ATen/native/cpu/DistributionTemplates.h: normal_fill.
    """
    return lambda elements: Cost(per * (elements + 16 * (elements % 16 > 0)))


def _rounded_up(per: int) -> _Rule:
    """Groups of 16 elements, and a whole group for a remainder."""
    return lambda elements: Cost(per * (elements + -elements % 16))


def _swaps(elements: int) -> Cost | None:
    # randperm: from 2**32 / 20 elements on torch shuffles with 64-bit words
    # (aten/src/ATen/native/TensorFactories.cpp). 2**27 is the power of two below that.
    return Cost(max(elements - 1, 0)) if elements < 1 << 27 else None


def _samples(elements: int) -> Cost:
    return Cost(0, elements)


def _seed(words: int) -> _Rule:
    """One seed for an engine of another kind, such as MKL's on some processors."""
    return lambda elements: Cost(words if elements else 0)


_RULES: tuple[_Rule, ...] = (
    *(_each(1), _each(2), _last_again(1), _last_again(2), _rounded_up(1), _rounded_up(2)),
    *(_samples, _swaps, _seed(1), _seed(2)),
)


def _numbers(draw: DrawSpec) -> tuple[Any, ...] | None:
    """The numbers that replace a draw's own in trials; None if the cost for them is not known."""
    traits = OP_TABLE.get(draw.op)
    if traits is None or traits.draws in (None, "values"):
        return None
    if traits.draws == "numbers":
        return draw.args
    if traits.draws == "range":
        if len(draw.args) != len(traits.numbers):
            return None
        low, high = (0, *draw.args)[-2:]
        # A wide range (from 2**28 or 2**32 on) takes two words for each element.
        if not (isinstance(high, int) and 0 < high - low <= 1 << 24):
            # For a floating-point dtype torch rounds wide bounds to it, and warns at every call.
            return None if draw.dtype.is_floating_point else draw.args
    return traits.numbers


# Trial sizes: around 8 and 16 elements, where kernels change, and 700 to cross the end of a block
# of the generator (624 words).
_SIZES = (0, 1, 2, 6, 7, 8, 9, 15, 16, 17, 24, 32, 33, 700)


def _elements(numel: int, dtype: torch.dtype) -> int:
    """The number of real numbers drawn: a complex tensor is filled as its view as real."""
    return 2 * numel if dtype.is_complex else numel


def _size_class(elements: int) -> int:
    """0 for no elements, 1 below 16 and 2 from 16 on, where kernels change."""
    return min(elements, 1) + (elements >= 16)


@lru_cache(maxsize=4096)
def _rule(
    op: str, dtype: torch.dtype, contiguous: bool, size_class: int, args: tuple[Any, ...]
) -> _Rule | None:
    """The rule that all trials of a class of draws follow, or None."""
    numels = [n for n in _SIZES if _size_class(_elements(n, dtype)) == size_class]
    try:
        trials = [t for n in numels for t in _trials(op, dtype, contiguous, n, args)]
    except (RuntimeError, TypeError, ValueError, AttributeError, Warning):
        return None
    followed = (r for r in _RULES if all(_follows(r, *trial) for trial in trials))
    return next(followed, None) if trials else None


def _trials(
    op: str, dtype: torch.dtype, contiguous: bool, numel: int, args: tuple[Any, ...]
) -> Iterator[tuple[int, bytes, bytes]]:
    """Run an op on each kind of target from each start; yield elements and states around it."""
    info = by_name(op)
    if not info.takes_generator:
        info = by_name(f"{op}.generator")
    makes = info.allocates == "count"
    options = {"dtype": dtype, "device": "cpu"} if makes else {}
    for target in [numel] if makes else _targets(dtype, contiguous, numel):
        for before in _starts():
            generator = generator_at(before)
            info.func(target, *args, generator=generator, **options)
            yield _elements(numel, dtype), before, state_of(generator)


def _targets(dtype: torch.dtype, contiguous: bool, numel: int) -> Iterator[Tensor]:
    """Tensors of `numel` elements, contiguous or not."""
    if contiguous:
        yield torch.empty(numel, dtype=dtype, device="cpu")
        return
    if numel > 1:
        yield torch.empty(numel, 2, dtype=dtype, device="cpu")[:, 0]
    if numel > 2 and numel % 2 == 0:
        yield torch.empty(2, numel // 2, dtype=dtype, device="cpu").t()


@lru_cache(maxsize=1)
def _starts() -> tuple[bytes, bytes]:
    """Two states to start from: a fresh seed, and the end of a block, with a cached normal.

    From the second one, 615 + 4 words into a block of 624, trials cross into the next block.
    """
    fresh = state_of(torch.Generator(device="cpu").manual_seed(624))
    return fresh, paired(jump(fresh, 615))


def _follows(rule: _Rule, elements: int, before: bytes, after: bytes) -> bool:
    """Whether a rule predicts, byte for byte, the state that an op leaves."""
    seeker = Seeker(before)
    seeker.append(rule(elements))
    return seeker.state(1, _never) == after


def _never(index: int, generator: torch.Generator) -> None:
    raise AssertionError(index, generator)
