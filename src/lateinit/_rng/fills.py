"""Fill a tensor by ``uniform_`` or ``normal_``, natively if the kernel gives torch's bits."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from lateinit import _native
from lateinit._torch import NORMAL, UNIFORM, without_modes

_DEFAULTS = (0.0, 1.0)  # the default arguments of both ops


def fill(op: str, target: Tensor, numbers: tuple[Any, ...], generator: torch.Generator) -> bool:
    """Fill a tensor natively.

    Args:
        op: the op's qualified name.
        target: the tensor.
        numbers: the op's arguments after the tensor, in the schema's order.
        generator: the generator to draw from; it is moved as torch would move it.

    Returns:
        False, with nothing changed, if the caller must call the op instead.
    """
    # For few elements the fixed cost of a native call makes torch faster.
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
    """Draw only some rows of a fill natively; arguments and result as in ``_native.fill_rows``.

    If the length of a fill is no multiple of 16, no row may reach into its last 16 elements: torch
    draws them again.
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
