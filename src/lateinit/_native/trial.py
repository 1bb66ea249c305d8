"""Compare the C kernels with torch's: their bits depend on torch version, compiler and processor.

A trial draws a few thousand elements with generators of its own, over every boundary: groups of 16
elements, blocks of the generator (624 words), the parts that kernels.c draws at a time (4 blocks),
and remainders. It takes about a millisecond. Torch's draws in it are also the sample by which the
ranks of a mesh compare their kernels.
"""

from __future__ import annotations

import functools
import hashlib

import torch
from torch import Tensor

from lateinit._native import calls

_PART = 4 * 624
# The number of elements, and the number of words drawn before the fill.
_CASES = (
    *((16, 0), (17, 1), (31, 609), (32, 608), (640, 1), (645, 623)),
    *((_PART, 0), (_PART + 16, 624), (2 * _PART + 5, 100)),
)
# Narrow ranges often round up to the upper bound, which torch replaces by the lower one.
_BOUNDS = ((0.0, 1.0), (-0.0577, 0.0577), (1.0, 1.01), (1.0, 1.000001), (-3e4, 1e4), (0.0, 0.0))
# The last one overflows in float16.
_MOMENTS = ((0.0, 1.0), (0.5, 0.0173), (-3.0, 1e-6), (2.0, 0.0), (0.0, 3e4))


def fill_agrees(op: str, dtype: torch.dtype, *, fused: bool) -> bool:
    """Whether a native fill gives the bits of torch's fill, and moves generators equally far."""
    return all(_agrees(op, dtype, *case, numbers, fused=fused) for case, numbers in _pairs(op))


@functools.cache
def digest_of_draws(op: str, dtype: torch.dtype) -> str:
    """A digest of the values that torch's kernel draws in the trial of a fill."""
    found = hashlib.sha256()
    for (numel, before), numbers in _pairs(op):
        drawn = _drawn(op, dtype, numel, numbers, _generator(before))
        found.update(drawn.view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def _pairs(op: str) -> list[tuple[tuple[int, int], tuple[float, float]]]:
    first, *others = _MOMENTS if op == calls.NORMAL else _BOUNDS
    return [*((case, first) for case in _CASES), *((_CASES[-1], numbers) for numbers in others)]


def _drawn(
    op: str,
    dtype: torch.dtype,
    numel: int,
    numbers: tuple[float, float],
    generator: torch.Generator,
) -> Tensor:
    """The values that torch's kernel draws."""
    values = torch.zeros(numel, dtype=dtype, device="cpu")
    fill = values.normal_ if op == calls.NORMAL else values.uniform_
    return fill(*numbers, generator=generator)


def jump_agrees() -> bool:
    """Whether jumps, by leaps and by steps, end where torch's draws end."""
    return all(
        _jump_agrees(before, words, leap=leap)
        for before in (0, 1, 623, 624)
        for words, leap in ((1, False), (624, False), (5000, False), (625, True), (22_000, True))
    )


def _agrees(
    op: str,
    dtype: torch.dtype,
    numel: int,
    before: int,
    numbers: tuple[float, float],
    *,
    fused: bool,
) -> bool:
    generator = _generator(before)
    state = generator.get_state()
    theirs = _drawn(op, dtype, numel, numbers, generator)
    ours, ended = torch.zeros_like(theirs), state.clone()
    calls.fill(op, ours, *numbers, ended, fused=fused)
    if not (_same(ours, theirs) and torch.equal(ended, generator.get_state())):
        return False
    if numel >= 600:  # rows of two groups and more, up to the last whole group
        length, stride = 37, 37 + calls.APART
        rows = theirs.as_strided(((numel - 60) // stride, length), (stride, 1), 5)
        found, ended = torch.zeros_like(rows), state.clone()
        calls.fill_rows(op, found, 5, stride, numbers, ended, fused=fused)
        if not _same(found, rows.contiguous()):
            return False
    if op != calls.NORMAL:
        return True
    # The elements around each group's ends and the remainder.
    places = torch.cat([torch.arange(0, numel, 15), torch.arange(numel - 3, numel)]).unique()
    chosen, ended = torch.zeros(len(places), dtype=dtype, device="cpu"), state.clone()
    calls.normal_at(places, chosen, numel, *numbers, ended, fused=fused)
    return _same(chosen, theirs[places]) and torch.equal(ended, generator.get_state())


def _jump_agrees(before: int, words: int, *, leap: bool) -> bool:
    generator = _generator(before)
    state = generator.get_state().numpy().tobytes()
    torch.empty(words, dtype=torch.float32, device="cpu").uniform_(generator=generator)
    ended = calls.jump(state, words, leap=leap)
    return bool(ended == generator.get_state().numpy().tobytes())


def _generator(before: int) -> torch.Generator:
    generator = torch.Generator(device="cpu").manual_seed(19937)
    torch.empty(before, dtype=torch.float32, device="cpu").uniform_(generator=generator)
    return generator


def _same(ours: Tensor, theirs: Tensor) -> bool:
    return torch.equal(ours.view(torch.uint8), theirs.view(torch.uint8))
