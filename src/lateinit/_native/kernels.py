"""Call the C kernels, those that agree with torch's.

The functions take and move torch's own generators. They return whether they did what was asked; if
not, nothing was changed and torch's kernel is to be called.
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
"""Elements from which on a native fill is faster.

Taking a generator's state and putting it back costs 3 us, what torch takes for 1,000 elements.
"""
# torch has no vectorised kernel for it: log, sin and cos of the C library are nearly all of its
# time. Measured: 17 ns an element by torch, 23 in C.
_NOT_FASTER = {(NORMAL, torch.float64)}

# Words from which on leaping is faster than making every block. Measured: 0.1 ns a word, 0.11 ms a
# leap, and 0.02 ms for each doubling of the distance if its polynomial is not cached.
_LEAP_FROM = 2_000_000


class Verdict(NamedTuple):
    """Whether a kernel is used, and why.

    Attributes:
        used: whether it is.
        why: as ``lateinit info`` says it.
        fused: whether it computes as torch's AVX2 kernels do, by fused multiply-adds.
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
        generator: is moved as torch would move it.

    Returns:
        False, with nothing changed, if torch has to do it: there is no native kernel that agrees
        with torch's, or torch might refuse these numbers, or draw so few elements another way.

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
        rows: of the shape (rows, elements to keep of each), contiguous, on the CPU.
        begin: the element of the fill with which the first row begins, less than 16.
        stride: the elements from one row to the next, ``APART`` more than are kept.
        numbers: the first and the second number of ``fill``.
        generator: is before the fill; moved past the last group of 16 that holds elements of a row.

    Returns:
        As ``fill``.
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
    """Draw those elements of a ``normal_`` that are at some places.

    Args:
        places: their flat indices, ascending, in int64.
        values: is filled with them, one after the other.
        numel: how many elements the whole ``normal_`` fills.
        mean: the mean.
        std: the standard deviation.
        generator: is moved as the whole ``normal_`` would move it.

    Only if there is a native ``normal_`` for the dtype, and it is ``in_range``; of 16 elements or
    more.
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
    """Each kernel's name, with whether it is used and why; compares those not used before."""
    found = {"jump": _jump_verdict()}
    for op in (UNIFORM, NORMAL):
        for dtype in DTYPES:
            name = f"{op.removeprefix('aten::')} {str(dtype).removeprefix('torch.')}"
            found[name] = _verdict(op, dtype)
    return found


def _absent() -> str | None:
    """Why there are no kernels at all, or None."""
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
    except OverflowError:  # an integer that is no double
        return False
    if dtype not in DTYPES or not finite:
        return False
    if op == NORMAL:
        # Half types are drawn in float32 (at::opmath_type).
        return second >= 0 and max(abs(first), second) <= torch.finfo(torch.float32).max
    most = torch.finfo(dtype).max
    return -most <= first <= second <= most and second - first <= most
