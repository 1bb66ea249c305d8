"""Chunked fills: fill one large storage in pieces, each at its own place in the random stream.

A kernel that fills a contiguous tensor element by element gives the same bits if it is called on
flat pieces that start at multiples of 16 elements, each with a generator in the state that the
whole call would have had there. So threads can share one tensor, and a rank can fill its shard
alone. This is not assumed: each kernel is tried once per process (``is_exact_in_pieces``). A kernel
whose pieces differ is run whole.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lateinit._program import NUMBERS, Draw, Op, Program, Step, TensorRef
from lateinit._rng import UNIT, consumption, cut, fills, mt19937, truncated_normal
from lateinit._torch import NORMAL, TRUNCATED, by_name

_SMALLEST = 1 << 18  # elements: a jump costs as much as 5e5 draws, more than to draw all of these
PIECE = 1 << 23  # elements that one thread fills at a time: 16 times the cost of its jump
_DRAWN = 1 << 17  # elements that normal_ draws at a time: its two passes over them stay in cache
_IN_CACHE = 1 << 19  # elements that a chain of kernels handles at a time: 2 MiB in float32


@dataclass(frozen=True, slots=True)
class ChunkedFill:
    """The first ops of a step, which fill one whole storage element by element.

    Only the first op may draw.
    """

    ref: TensorRef
    ops: tuple[Op, ...]

    @property
    def draw(self) -> Draw | None:
        """The draw of the first op, or None if the fill is not random."""
        return self.ops[0].draw


def fill_of(program: Program, step: Step, smallest: int | None = None) -> ChunkedFill | None:
    """The chunked fill that a step begins with, or None if there is none.

    Args:
        program: the program.
        step: the step.
        smallest: the number of elements below which to return None; by default ``_SMALLEST``, the
            size at which pieces begin to save time.
    """
    if not step.ops:
        return None
    first = program.ops[step.ops[0]]
    info = by_name(first.name)
    ref = first.args[0] if info.fills and info.elementwise else None
    if type(ref) is not TensorRef or ref.numel < (smallest or _SMALLEST):
        return None
    if not ref.is_contiguous():
        return None
    on_cpu = program.storages[ref.storage].device.type == "cpu"
    if not (on_cpu and program.covers(ref) and _in_pieces(first, ref)):
        return None
    ops = [first]
    for number in step.ops[1:]:
        op = program.ops[number]
        info = by_name(op.name)
        # Only an op in place can follow, and only the first op may draw.
        follows = info.elementwise and info.mutates and not info.random
        if not follows or op.args[0] != ref or not _in_pieces(op, ref):
            break
        ops.append(op)
    return ChunkedFill(ref, tuple(ops))


def is_small(fill: ChunkedFill) -> bool:
    """Whether a fill is too small for a thread of its own."""
    return fill.ref.numel < _SMALLEST


def _in_pieces(op: Op, ref: TensorRef) -> bool:
    """Whether an op on a whole storage can be called on its pieces instead."""
    if op.name == TRUNCATED:
        return truncated_normal.is_exact_in_parts(ref.dtype, truncated_normal.Normal(*op.args[1:]))
    others = (*op.args[1:], *op.kwargs.values())
    if any(type(value) not in NUMBERS for value in others) or _scaled(op):
        return False
    return ref.dtype.is_floating_point and is_exact_in_pieces(op.name, ref.dtype)


def _scaled(op: Op) -> bool:
    """Whether an op adds a multiple (``alpha``).

    Kernels round ``x + alpha * y`` once in vectorised code (fma) and twice in the remainder at the
    end of a range. Cut into pieces, other elements would be such a remainder.
    """
    multiples = (*op.args[2:], *op.kwargs.values()) if by_name(op.name).takes_alpha else ()
    return any(value != 1 for value in multiples)


def pieces(fill: ChunkedFill, length: int) -> list[tuple[int, int]]:
    """Flat ranges of nearly equal length, up to about ``length`` elements, for threads."""
    if fill.ops[0].name == TRUNCATED:
        length = max(length, PIECE)  # a piece jumps once in every round of redrawing
    numel = fill.ref.numel
    return cut(numel, -(-numel // max(1, -(-numel // length))))


def words_of(fill: ChunkedFill, numel: int) -> int:
    """The number of words that a fill draws for its first ``numel`` elements.

    For ``trunc_normal_`` the words of one round. ``numel`` is a multiple of 16, or all elements.
    """
    if fill.draw is None:
        return 0
    if fill.ops[0].name == TRUNCATED:
        return truncated_normal.words_a_round(fill.ref.dtype, numel)
    return consumption.words_drawn(fill.ops[0].name, fill.ref.dtype, numel)


def after_redrawing(kept: truncated_normal.Kept, fill: ChunkedFill, state: bytes) -> bytes:
    """The generator state after a ``trunc_normal_`` that begins in ``state``."""
    normal = truncated_normal.Normal(*fill.ops[0].args[1:])
    return kept.after(state, fill.ref.dtype, fill.ref.numel, normal)


def late_of(
    kept: truncated_normal.Kept, fill: ChunkedFill, state: bytes
) -> truncated_normal.Late | None:
    """The cached late rounds of a ``trunc_normal_`` that begins in ``state``, or None."""
    normal = truncated_normal.Normal(*fill.ops[0].args[1:])
    return kept.late(state, fill.ref.dtype, fill.ref.numel, normal)


def run_piece(
    fill: ChunkedFill,
    storage: torch.UntypedStorage,
    piece: tuple[int, int],
    generator: torch.Generator | None,
    late: truncated_normal.Late | None = None,
) -> None:
    """Fill one piece. A chain of kernels handles it in parts that stay in cache.

    Args:
        fill: the fill.
        storage: the whole storage.
        piece: the flat range to fill.
        generator: a generator in the state in which the whole call would draw this piece.
        late: the late rounds of a ``trunc_normal_`` in the whole tensor, if known.
    """
    with torch.no_grad():
        flat = torch.empty(0, dtype=fill.ref.dtype).set_(storage, 0, (fill.ref.numel,), (1,))
        start, end = piece
        calls = calls_of(fill, generator, late and late.within(start, end))
        # A redrawing fill moves its generator in every round, which is too slow for short parts.
        whole = len(calls) == 1 or fill.ops[0].name == TRUNCATED
        length = end - start if whole else _IN_CACHE
        while start < end:
            stop = start + length if end - start - length >= UNIT else end
            part = flat[start:stop]
            for call in calls:
                call(part)
            start = stop


def calls_of(
    fill: ChunkedFill, generator: torch.Generator | None, late: truncated_normal.Late | None = None
) -> list[Callable[[Tensor], Any]]:
    """The kernels of a fill as functions of a part of the tensor.

    Args:
        fill: the fill.
        generator: the generator that the first kernel draws from.
        late: the late rounds of a ``trunc_normal_`` in the part that is filled.
    """
    period = words_of(fill, fill.ref.numel)
    return [_call(op, generator, period, late) for op in fill.ops]


def _call(
    op: Op, generator: torch.Generator | None, period: int, late: truncated_normal.Late | None
) -> Callable[[Tensor], Any]:
    if op.name == TRUNCATED and generator is not None:
        normal = truncated_normal.Normal(*op.args[1:])
        return lambda part: truncated_normal.draw(part, normal, generator, period, late)
    func, args, kwargs = by_name(op.name).func, op.args[1:], dict(op.kwargs)
    if op.draw is None or generator is None:
        return lambda part: func(part, *args, **kwargs)

    def draw(part: Tensor) -> None:
        if not kwargs and fills.fill(op.name, part, args, generator):
            return
        parts = cut(len(part), _DRAWN) if op.name == NORMAL else [(0, len(part))]
        for start, end in parts:
            func(part[start:end], *args, **kwargs, generator=generator)

    return draw


@functools.cache
def is_exact_in_pieces(name: str, dtype: torch.dtype) -> bool:
    """Whether a kernel of the installed torch gives the same bits in pieces as in one call."""
    try:
        return _trial(name, dtype)
    except (RuntimeError, NotImplementedError, AssertionError):
        return False


def _trial(name: str, dtype: torch.dtype) -> bool:
    # 645 elements, cut at 384: more than a block of the generator (624 words), and a remainder of 5
    # that is no full group of 16.
    numel, middle = 40 * UNIT + 5, 24 * UNIT
    info = by_name(name)
    generators = [torch.Generator().manual_seed(1), torch.Generator()]
    whole = torch.linspace(-0.9, 0.9, numel, dtype=torch.float64).to(dtype)
    halves = whole.clone()
    if info.random:
        before = mt19937.state_of(generators[0])
        generators[1] = mt19937.generator_at(
            mt19937.jump(before, consumption.words_drawn(name, dtype, middle))
        )
        info.func(whole, *info.numbers, generator=generators[0])
        info.func(halves[middle:], *info.numbers, generator=generators[1])
        info.func(halves[:middle], *info.numbers, generator=mt19937.generator_at(before))
        ended = [mt19937.state_of(generator) for generator in generators]
        return torch.equal(whole, halves) and ended[0] == ended[1]
    # A tensor with gaps takes the scalar path of a kernel, as does the remainder at an end. So this
    # compares the vectorised path with the scalar one.
    spaced = torch.empty(numel, 2, dtype=dtype, device="cpu")[:, 0].copy_(whole)
    for part in (whole, spaced, *halves.split(UNIT)):
        info.func(part, *info.numbers)
    return torch.equal(whole, halves) and torch.equal(whole, spaced)
