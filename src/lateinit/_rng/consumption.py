"""How far each random op moves a CPU generator.

Nothing about torch is assumed. How many words an op draws is found, once per process and class
of op (name, dtype, contiguity, size class), by running the op on small tensors and holding the
states it leaves, all their bytes, against each of a few rules. An op that follows no rule is
unknown: to pass it, it is run.
"""

from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lateinit._rng.mt19937 import generator_at, jump, state_of
from lateinit._rng.position import Cost, Seeker, paired


class DrawSpec(NamedTuple):
    """One random op that fills a tensor from a CPU generator.

    Attributes:
        op: the overload's qualified name, as `OpOverload.name()` gives it.
        numel: how many elements are filled.
        dtype: the dtype of the tensor that is filled.
        contiguous: whether that tensor `is_contiguous()`; being dense in another order of dims,
            such as channels last, is not enough for torch's kernels.
        args: the op's numbers in the schema's order, without sizes, None where None was given;
            read for the `random_` and `randint` families, `bernoulli_` and `exponential_`.
    """

    op: str
    numel: int
    dtype: torch.dtype
    contiguous: bool
    args: tuple[Any, ...] = ()


_Rule = Callable[[int], Cost | None]


def consumption(draw: DrawSpec) -> Cost | None:
    """What a draw takes from its generator, or None where that is not known.

    The first call for a class of draws runs its op some twenty times on tensors of up to a few
    hundred elements, about a millisecond, with generators of its own; the global generator is
    not used. Under a torch mode that keeps ops from their kernels, trials fail, and the class
    stays unknown for as long as the process lives.

    Args:
        draw: the op and the tensor that it fills.

    Returns:
        The cost; None for an op that is not in the table, or does not follow any known rule with
        the torch that runs.

    Example:
        >>> consumption(DrawSpec("aten::normal_", 100, torch.float32, contiguous=True))
        Cost(words=116, normals=0)
        >>> consumption(DrawSpec("aten::normal_", 5, torch.float32, contiguous=True))
        Cost(words=0, normals=5)
    """
    probe = _PROBES.get(draw.op)
    args = probe.args(draw) if probe else None
    if args is None:
        return None
    elements = _elements(draw.numel, draw.dtype)
    contiguous = draw.contiguous or draw.numel < 2
    rule = _rule(draw.op, draw.dtype, contiguous, _size_class(elements), args)
    return rule(elements) if rule else None


def words_drawn(op: str, dtype: torch.dtype, numel: int) -> int:
    """How many words a known op draws for so many contiguous elements: none, or 16 or more."""
    cost = consumption(DrawSpec(op, numel, dtype, contiguous=True))
    assert cost is not None
    return cost.words


def _each(per: int) -> _Rule:
    return lambda elements: Cost(per * elements)


def _last_again(per: int) -> _Rule:
    """Sixteen elements at a time, the last sixteen drawn again for what is left over."""
    return lambda elements: Cost(per * (elements + 16 * (elements % 16 > 0)))


def _rounded_up(per: int) -> _Rule:
    """Sixteen elements at a time, sixteen also for what is left over."""
    return lambda elements: Cost(per * (elements + -elements % 16))


def _swaps(elements: int) -> Cost | None:
    # torch shuffles with 64-bit words from some larger size on (2**32 / 20 in its source).
    return Cost(max(elements - 1, 0)) if elements < 1 << 27 else None


def _samples(elements: int) -> Cost:
    return Cost(0, elements)


def _seed(words: int) -> _Rule:
    """One seed for an engine of another kind, as with MKL on some processors."""
    return lambda elements: Cost(words if elements else 0)


_RULES: tuple[_Rule, ...] = (
    *(_each(1), _each(2), _last_again(1), _last_again(2), _rounded_up(1), _rounded_up(2)),
    *(_samples, _swaps, _seed(1), _seed(2)),
)

_Args = Callable[[DrawSpec], tuple[Any, ...] | None]


class _Probe(NamedTuple):
    """How an op is tried: an overload that takes a generator, what to fill, its numbers.

    `args` gives the numbers to try the op with, which also name the class of a draw's numbers;
    None where nothing is known for them.
    """

    overload: str
    fills: str
    args: _Args


def _any(*numbers: float) -> _Args:
    """For kernels that draw alike whatever the numbers."""
    return lambda _draw: numbers


def _same(draw: DrawSpec) -> tuple[Any, ...]:
    return draw.args


def _range(length: int) -> _Args:
    """For integers from a range: a wide one, of 2**28 or 2**32 on, takes two words."""

    def args(draw: DrawSpec) -> tuple[Any, ...] | None:
        if len(draw.args) != length:
            return None
        low, high = (0, *draw.args)[-2:]
        if isinstance(high, int) and 0 < high - low <= 1 << 24:
            return (0, 2)[-length:]
        # torch rounds the bounds to the dtype, and warns at every call.
        return None if draw.dtype.is_floating_point else draw.args

    return args


_PROBES = {
    "aten::uniform_": _Probe("uniform_", "self", _any()),
    "aten::normal_": _Probe("normal_", "self", _any()),
    "aten::log_normal_": _Probe("log_normal_", "self", _any()),
    "aten::cauchy_": _Probe("cauchy_", "self", _any()),
    "aten::geometric_": _Probe("geometric_", "self", _any(0.5)),
    "aten::exponential_": _Probe("exponential_", "self", _same),
    "aten::bernoulli_.float": _Probe("bernoulli_.float", "self", _same),
    "aten::random_": _Probe("random_", "self", _any()),
    "aten::random_.to": _Probe("random_.to", "self", _range(1)),
    "aten::random_.from": _Probe("random_.from", "self", _range(2)),
    "aten::rand": _Probe("rand.generator", "size", _any()),
    "aten::randn": _Probe("randn.generator", "size", _any()),
    "aten::normal.float_float": _Probe("normal.float_float", "size", _any(0.0, 1.0)),
    "aten::randint": _Probe("randint.generator", "size", _range(1)),
    "aten::randint.low": _Probe("randint.low_generator", "size", _range(2)),
    "aten::rand_like": _Probe("rand_like.generator", "like", _any()),
    "aten::randn_like": _Probe("randn_like.generator", "like", _any()),
    "aten::randint_like": _Probe("randint_like.generator", "like", _range(1)),
    "aten::randint_like.low_dtype": _Probe("randint_like.low_generator_dtype", "like", _range(2)),
    "aten::randperm": _Probe("randperm.generator", "count", _any()),
}
_PROBES |= {f"aten::{probe.overload}": probe for probe in _PROBES.values()}

# Around the 16 elements at which kernels change, and more than one block of 624 words.
_SIZES = (0, 1, 2, 6, 7, 8, 9, 15, 16, 17, 24, 32, 33, 700)


def _elements(numel: int, dtype: torch.dtype) -> int:
    """A complex tensor is filled as its view as real."""
    return 2 * numel if dtype.is_complex else numel


def _size_class(elements: int) -> int:
    return min(elements, 1) + (elements >= 16)


@lru_cache(maxsize=4096)
def _rule(
    op: str, dtype: torch.dtype, contiguous: bool, size_class: int, args: tuple[Any, ...]
) -> _Rule | None:
    """The rule that every trial of a class of draws follows."""
    numels = [n for n in _SIZES if _size_class(_elements(n, dtype)) == size_class]
    try:
        trials = [t for n in numels for t in _trials(_PROBES[op], dtype, contiguous, n, args)]
    except (RuntimeError, TypeError, ValueError, AttributeError, Warning):
        return None
    followed = (r for r in _RULES if all(_follows(r, *trial) for trial in trials))
    return next(followed, None) if trials else None


def _trials(
    probe: _Probe, dtype: torch.dtype, contiguous: bool, numel: int, args: tuple[Any, ...]
) -> Iterator[tuple[int, bytes, bytes]]:
    """Elements filled, the state before and the state after, for each way to run an op once."""
    name, _, overload = probe.overload.partition(".")
    op = getattr(getattr(torch.ops.aten, name), overload or "default")
    options = {} if probe.fills in ("self", "like") else {"dtype": dtype, "device": "cpu"}
    for target in _targets(probe.fills, dtype, contiguous, numel):
        inputs = (target, *args) if probe.fills in ("self", "like") else (*args, target)
        for before in _starts():
            generator = generator_at(before)
            op(*inputs, generator=generator, **options)
            yield _elements(numel, dtype), before, state_of(generator)


def _targets(fills: str, dtype: torch.dtype, contiguous: bool, numel: int) -> Iterator[Any]:
    """What an op is given to fill `numel` elements with or without gaps."""
    if fills == "count":
        yield numel
    elif fills == "size":
        yield [numel]
    elif contiguous:
        yield torch.empty(numel, dtype=dtype, device="cpu")
    else:
        yield from _scattered(fills, dtype, numel)


def _scattered(fills: str, dtype: torch.dtype, numel: int) -> Iterator[Tensor]:
    # What is made like a tensor with gaps has none.
    if numel > 1 and fills == "self":
        yield torch.empty(numel, 2, dtype=dtype, device="cpu")[:, 0]
    if numel > 2 and numel % 2 == 0:
        yield torch.empty(2, numel // 2, dtype=dtype, device="cpu").t()


@lru_cache(maxsize=1)
def _starts() -> tuple[bytes, bytes]:
    """A fresh seed, and the end of a block with a cached normal."""
    fresh = state_of(torch.Generator(device="cpu").manual_seed(624))
    return fresh, paired(jump(fresh, 615))


def _follows(rule: _Rule, elements: int, before: bytes, after: bytes) -> bool:
    """Whether a rule foretells, byte for byte, the state that an op leaves."""
    seeker = Seeker(before)
    seeker.append(rule(elements))
    return seeker.state(1, _never) == after


def _never(index: int, generator: torch.Generator) -> None:
    raise AssertionError(index, generator)
