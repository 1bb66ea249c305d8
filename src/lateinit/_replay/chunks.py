"""Filling one large storage in pieces, each at its own place in the random stream.

A kernel that fills a contiguous tensor element by element gives the same bits when it is called
on flat pieces of it that begin at multiples of 16 elements, each with a generator that stands where
the whole call would have stood. Nothing of that is assumed: each kernel is tried once a process,
and one that differs is run whole.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lateinit._program.plan import Step
from lateinit._program.program import NUMBERS, Draw, Op, Program, TensorRef
from lateinit._rng import consumption, mt19937, truncated_normal
from lateinit._rng.alignment import UNIT, cut
from lateinit._torch.operators import TRUNCATED, by_name

_SMALLEST = 1 << 18  # elements below which pieces are not worth their trouble
PIECE = 1 << 23  # elements that one thread fills at a time: a jump costs what 5e5 draws cost
_DRAWN = 1 << 17  # elements that normal_ draws at a time: it goes over them twice
_IN_CACHE = 1 << 19  # elements that a chain of kernels goes through at a time

_FIRST = frozenset(
    {"aten::uniform_", "aten::normal_", "aten::zero_", "aten::fill_.Scalar", TRUNCATED}
)
_POINTWISE = frozenset(
    f"aten::{name}"
    for name in (
        "zero_",
        "fill_.Scalar",
        "mul_.Tensor",
        "mul_.Scalar",
        "add_.Tensor",
        "add_.Scalar",
        "sub_.Tensor",
        "div_.Tensor",
        "neg_",
        "abs_",
        "erfinv_",
        "clamp_",
        "clamp_min_",
        "clamp_max_",
    )
)


_ADDING = frozenset({"aten::add_.Tensor", "aten::add_.Scalar", "aten::sub_.Tensor"})
_NO_NUMBERS = frozenset({"aten::zero_", "aten::neg_", "aten::abs_", "aten::erfinv_"})


@dataclass(frozen=True, slots=True)
class ChunkedFill:
    """The first ops of a step, if they fill one whole storage element by element."""

    ref: TensorRef
    ops: tuple[Op, ...]

    @property
    def draw(self) -> Draw | None:
        """The draw that it makes, in the first of the ops, if any does."""
        return self.ops[0].draw


def fill_of(program: Program, step: Step, smallest: int | None = None) -> ChunkedFill | None:
    """The fill that a step begins with, or None if it is better run as it is.

    That is so below ``smallest`` elements, by default as many as are worth their trouble.
    """
    if not step.ops:
        return None
    first = program.ops[step.ops[0]]
    ref = first.args[0] if first.name in _FIRST else None
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
        if op.name not in _POINTWISE or op.args[0] != ref or not _in_pieces(op, ref):
            break
        ops.append(op)
    return ChunkedFill(ref, tuple(ops))


def is_small(fill: ChunkedFill) -> bool:
    """Whether a fill is not worth a thread of its own."""
    return fill.ref.numel < _SMALLEST


def _in_pieces(op: Op, ref: TensorRef) -> bool:
    if op.name == TRUNCATED:
        return truncated_normal.is_exact_in_parts(ref.dtype, truncated_normal.Normal(*op.args[1:]))
    others = (*op.args[1:], *op.kwargs.values())
    if any(type(value) not in NUMBERS for value in others) or _scaled(op):
        return False
    return ref.dtype.is_floating_point and is_exact_in_pieces(op.name, ref.dtype)


def _scaled(op: Op) -> bool:
    """Whether an op adds a multiple, which kernels round once or twice: at a cut, as at an end."""
    multiples = (*op.args[2:], *op.kwargs.values()) if op.name in _ADDING else ()
    return any(value != 1 for value in multiples)


def pieces(fill: ChunkedFill, length: int) -> list[tuple[int, int]]:
    """Flat ranges for threads, of up to about ``length`` elements."""
    if fill.ops[0].name == TRUNCATED:
        length = max(length, PIECE)  # a piece makes a jump in every round
    numel = fill.ref.numel
    return cut(numel, -(-numel // max(1, -(-numel // length))))


def words_of(fill: ChunkedFill, numel: int) -> int:
    """How many words a fill draws for its first so many elements, a multiple of 16."""
    if fill.draw is None:
        return 0
    if fill.ops[0].name == TRUNCATED:
        return truncated_normal.words_a_round(fill.ref.dtype, numel)
    return consumption.words_drawn(fill.ops[0].name, fill.ref.dtype, numel)


def kept_of(program: Program) -> truncated_normal.Kept:
    """What is kept of the late rounds of a program's draws."""
    kept: truncated_normal.Kept = program.cache.setdefault("late", truncated_normal.Kept())
    return kept


def after_redrawing(program: Program, fill: ChunkedFill, state: bytes) -> bytes:
    """Where the generator stands after a ``trunc_normal_`` that begins at ``state``."""
    normal = truncated_normal.Normal(*fill.ops[0].args[1:])
    return kept_of(program).after(state, fill.ref.dtype, fill.ref.numel, normal)


def late_of(program: Program, fill: ChunkedFill, state: bytes) -> truncated_normal.Late | None:
    """What is kept of the late rounds of a ``trunc_normal_`` that begins at ``state``."""
    normal = truncated_normal.Normal(*fill.ops[0].args[1:])
    return kept_of(program).late(state, fill.ref.dtype, fill.ref.numel, normal)


def run_piece(
    fill: ChunkedFill,
    storage: torch.UntypedStorage,
    piece: tuple[int, int],
    generator: torch.Generator | None,
    late: truncated_normal.Late | None = None,
) -> None:
    """Fill one piece; with several kernels, in parts that stay in cache.

    ``late`` is what is known of the late rounds of a ``trunc_normal_``.
    """
    with torch.no_grad():
        flat = torch.empty(0, dtype=fill.ref.dtype).set_(storage, 0, (fill.ref.numel,), (1,))
        start, end = piece
        calls = calls_of(fill, generator, late and late.within(start, end))
        # What redraws moves back and forth in the random stream, so that it wants long parts.
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
    """The kernels of a fill, each to be called with a part; what draws, draws from a generator.

    Where something is known of late rounds, it is that of the one part.
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
    if op.draw is not None:
        kwargs["generator"] = generator
    if op.name != "aten::normal_":
        return lambda part: func(part, *args, **kwargs)

    def draw(part: Tensor) -> None:
        for start, end in cut(len(part), _DRAWN):
            func(part[start:end], *args, **kwargs)

    return draw


@functools.cache
def is_exact_in_pieces(name: str, dtype: torch.dtype) -> bool:
    """Whether a kernel gives the same bits in pieces as in one call, on the torch that runs."""
    try:
        return _trial(name, dtype)
    except (RuntimeError, NotImplementedError, AssertionError):
        return False


def _trial(name: str, dtype: torch.dtype) -> bool:
    numel, middle = 40 * UNIT + 5, 24 * UNIT
    info = by_name(name)
    numbers = () if name in _NO_NUMBERS else (0.3,)
    generators = [torch.Generator().manual_seed(1), torch.Generator()]
    whole = torch.linspace(-0.9, 0.9, numel, dtype=torch.float64).to(dtype)
    halves = whole.clone()
    if info.random:
        before = mt19937.state_of(generators[0])
        generators[1] = mt19937.generator_at(
            mt19937.jump(before, consumption.words_drawn(name, dtype, middle))
        )
        info.func(whole, 0.0, 1.0, generator=generators[0])
        info.func(halves[middle:], 0.0, 1.0, generator=generators[1])
        info.func(halves[:middle], 0.0, 1.0, generator=mt19937.generator_at(before))
        ended = [mt19937.state_of(generator) for generator in generators]
        return torch.equal(whole, halves) and ended[0] == ended[1]
    # With gaps between its elements a tensor is gone through one by one, as its end is.
    spaced = torch.empty(numel, 2, dtype=dtype, device="cpu")[:, 0].copy_(whole)
    for part in (whole, spaced, *halves.split(UNIT)):
        info.func(part, *numbers)
    return torch.equal(whole, halves) and torch.equal(whole, spaced)
