"""Call those C kernels that give the bits of torch's.

The functions take and move torch's own generators. They return whether they did the work; if not,
nothing has changed, and the caller uses torch's kernel.
"""

from __future__ import annotations

import functools
import math
import os
from typing import NamedTuple

import torch
from torch import Tensor

from lateinit._native import calls, trial
from lateinit._native.calls import DTYPES, NORMAL, UNIFORM

WORTH = 1 << 12
"""The least number of elements for which a native fill is faster.

Reading a generator's state and setting it again takes 3 us; torch draws 1,000 elements in that
time.
"""
# Neither torch nor the C code has a vectorised kernel for it: log, sin and cos of the C library
# take nearly all of the time. Measured: 17 ns an element by torch, 23 in C.
_NOT_FASTER = {(NORMAL, torch.float64)}

# The least number of words for which a leap is faster than making every block. Measured: 0.1 ns a
# word, 0.11 ms a leap, and 0.02 ms for each doubling of the distance if its polynomial is not
# cached.
_LEAP_FROM = 2_000_000


class Verdict(NamedTuple):
    """Whether a kernel is used, and why.

    Attributes:
        used: whether the kernel is used.
        why: the reason, as ``lateinit info`` prints it.
        fused: whether the kernel uses fused multiply-adds, as torch's AVX2 kernels do.
    """

    used: bool
    why: str
    fused: bool = False


def is_native(op: str, dtype: torch.dtype) -> bool:
    """Whether there is a native kernel for an op and a dtype that agrees with torch's.

    The first call compares them. Do not make it under a torch mode, which would keep torch's kernel
    from running.
    """
    return _verdict(op, dtype).used


def fill(op: str, target: Tensor, first: float, second: float, generator: torch.Generator) -> bool:
    """Fill a tensor as torch does.

    Args:
        op: ``aten::uniform_`` or ``aten::normal_``.
        target: contiguous, on the CPU.
        first: the lower bound, or the mean.
        second: the upper bound, or the standard deviation.
        generator: the generator to draw from; it is moved as torch would move it.

    Returns:
        False, with nothing changed, if torch's kernel must be used: no native kernel gives the same
        bits, or torch might refuse these numbers or draw so few elements in another way.

    Example:
        >>> eager, ours = torch.empty(2, 10_000)
        >>> _ = eager.normal_(0.0, 0.02, generator=torch.Generator().manual_seed(1))
        >>> if fill(NORMAL, ours, 0.0, 0.02, torch.Generator().manual_seed(1)):
        ...     assert torch.equal(ours, eager)
    """
    if not _is_usual(op, target, first, second):
        return False
    verdict = _verdict(op, target.dtype)
    if verdict.used:
        state = generator.get_state()
        calls.fill(op, target, first, second, state, fused=verdict.fused)
        generator.set_state(state)
    return verdict.used


def fill_rows(
    op: str,
    rows: Tensor,
    begin: int,
    stride: int,
    numbers: tuple[float, float],
    generator: torch.Generator,
) -> bool:
    """Draw some rows of a fill of more elements than these.

    Args:
        op: as for ``fill``.
        rows: receives the elements; of the shape (rows, elements to keep of each), contiguous, on
            the CPU.
        begin: the element of the fill with which the first row begins, less than 16.
        stride: the elements from one row to the next, at least ``APART`` more than are kept.
        numbers: the ``first`` and ``second`` of ``fill``.
        generator: a generator at the start of the fill; it is moved past the last group of 16 that
            holds elements of a row.

    Returns:
        The same as ``fill``.
    """
    if not in_range(op, rows.dtype, *numbers) or not _verdict(op, rows.dtype).used:
        return False
    state, fused = generator.get_state(), _verdict(op, rows.dtype).fused
    calls.fill_rows(op, rows, begin, stride, numbers, state, fused=fused)
    generator.set_state(state)
    return True


def normal_at(
    places: Tensor, values: Tensor, numel: int, mean: float, std: float, generator: torch.Generator
) -> None:
    """Draw the elements of a ``normal_`` at some places.

    Requires a native ``normal_`` for the dtype, numbers that are ``in_range``, and a ``normal_`` of
    at least 16 elements.

    Args:
        places: the flat indices of the elements, ascending, in int64.
        values: receives the elements, in that order.
        numel: the number of elements that the whole ``normal_`` fills.
        mean: the mean.
        std: the standard deviation.
        generator: the generator to draw from; it is moved as the whole ``normal_`` would move it.
    """
    state, fused = generator.get_state(), _verdict(NORMAL, values.dtype).fused
    calls.normal_at(places, values, numel, mean, std, state, fused=fused)
    generator.set_state(state)


def can_jump() -> bool:
    """Whether there is a native jump that agrees with torch's draws.

    Do not make the first call under a torch mode, as for ``is_native``.
    """
    return _jump_verdict().used


def jump(state: bytes, words: int) -> bytes:
    """A generator's state after some words, 1 or more; only if ``can_jump()``."""
    return calls.jump(state, words, leap=words >= _LEAP_FROM)


def verdicts() -> dict[str, Verdict]:
    """The verdict on each kernel by its name; kernels that were not used yet are compared now."""
    found = {"jump": _jump_verdict()}
    for op in (UNIFORM, NORMAL):
        for dtype in DTYPES:
            name = f"{op.removeprefix('aten::')} {str(dtype).removeprefix('torch.')}"
            found[name] = _verdict(op, dtype)
    return found


def _absent() -> str | None:
    """The reason why there are no kernels at all, or None."""
    if os.environ.get("LATEINIT_NATIVE") == "0":
        return "switched off by LATEINIT_NATIVE=0"
    return "not built: there was no C compiler" if calls.library is None else None


@functools.cache
def _verdict(op: str, dtype: torch.dtype) -> Verdict:
    absent = _absent()
    if absent is not None:
        return Verdict(False, absent)
    if dtype not in DTYPES or op not in (UNIFORM, NORMAL):
        return Verdict(False, "there is none")
    if (op, dtype) in _NOT_FASTER:
        return Verdict(False, "torch's is as fast")
    for fused in (True, False):
        if trial.fill_agrees(op, dtype, fused=fused):
            return Verdict(True, f"equal to torch's, {'with' if fused else 'without'} FMA", fused)
    return Verdict(False, "differs from torch's")


@functools.cache
def _jump_verdict() -> Verdict:
    absent = _absent()
    if absent is not None:
        return Verdict(False, absent)
    if trial.jump_agrees():
        return Verdict(True, "equal to torch's draws")
    return Verdict(False, "differs from torch's draws")


def _is_usual(op: str, target: Tensor, first: float, second: float) -> bool:
    if op == NORMAL and target.numel() < 16:
        return False
    if target.device.type != "cpu" or not target.is_contiguous() or target.is_neg():
        return False
    return target.numel() > 0 and in_range(op, target.dtype, first, second)


def in_range(op: str, dtype: torch.dtype, first: float, second: float) -> bool:
    """Whether torch accepts these numbers and no result is NaN: kernels.c handles no others."""
    try:
        finite = math.isfinite(first) and math.isfinite(second)
    except OverflowError:  # an integer that is too large for a double
        return False
    if dtype not in DTYPES or not finite:
        return False
    if op == NORMAL:
        # Half types are drawn in float32 (at::opmath_type).
        return second >= 0 and max(abs(first), second) <= torch.finfo(torch.float32).max
    most = torch.finfo(dtype).max
    return -most <= first <= second <= most and second - first <= most
