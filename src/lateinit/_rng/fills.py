"""Fill a tensor by ``uniform_`` or ``normal_``: natively where that gives torch's bits."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from lateinit import _native
from lateinit._torch import NORMAL, UNIFORM, without_modes

_DEFAULTS = (0.0, 1.0)  # the numbers of a call that leaves them out, of either op


def fill(op: str, target: Tensor, numbers: tuple[Any, ...], generator: torch.Generator) -> bool:
    """Fill a tensor natively.

    Args:
        op: the op's qualified name.
        target: the tensor.
        numbers: the op's arguments after the tensor, in the schema's order.
        generator: to draw from; is moved as torch would move it.

    Returns:
        False, with nothing changed, if the op has to be called.
    """
    # A native call has a cost of its own; torch is faster for few elements.
    if target.numel() < _native.WORTH or not is_native(op, target.dtype):
        return False
    first, second = numbers + _DEFAULTS[len(numbers) :]
    return _native.fill(op, target, first, second, generator)


def fill_rows(
    op: str,
    rows: Tensor,
    begin: int,
    stride: int,
    numbers: tuple[Any, ...],
    generator: torch.Generator,
) -> bool:
    """Draw only some rows of a fill natively; args and result: as those of ``_native.fill_rows``.

    No row may reach into the last 16 elements of a fill that is no multiple of 16 long: torch draws
    them anew.
    """
    if not is_native(op, rows.dtype):
        return False
    first, second = numbers + _DEFAULTS[len(numbers) :]
    return _native.fill_rows(op, rows, begin, stride, (first, second), generator)


@cache
def is_native(op: str, dtype: torch.dtype) -> bool:
    """Whether a native kernel gives the bits of torch's for an op and a dtype."""
    if op not in (NORMAL, UNIFORM):
        return False
    with without_modes():
        return _native.is_native(op, dtype)
