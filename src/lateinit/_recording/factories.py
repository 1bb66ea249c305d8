"""Tables of factories: each is recorded as uninitialised memory and an in-place fill."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lateinit._torch import is_deterministic

FillOp = tuple[str, tuple[Any, ...]]
"""The name of an in-place fill and its numbers."""


def _empty(args: tuple[Any, ...]) -> None:
    return None


def _zeros(args: tuple[Any, ...]) -> FillOp:
    return "aten::zero_", ()


def _ones(args: tuple[Any, ...]) -> FillOp:
    return "aten::fill_.Scalar", (1,)


def _full(value_at: int) -> Callable[[tuple[Any, ...]], FillOp]:
    return lambda args: ("aten::fill_.Scalar", (args[value_at],))


FACTORIES: dict[str, Callable[[tuple[Any, ...]], FillOp | None]] = {
    "aten::empty.memory_format": _empty,
    "aten::empty_strided": _empty,
    "aten::empty_like": _empty,
    "aten::new_empty": _empty,
    "aten::new_empty_strided": _empty,
    "aten::zeros": _zeros,
    "aten::zeros_like": _zeros,
    "aten::new_zeros": _zeros,
    "aten::ones": _ones,
    "aten::ones_like": _ones,
    "aten::new_ones": _ones,
    "aten::full": _full(1),
    "aten::full_like": _full(1),
    "aten::new_full": _full(2),
}
"""For each factory, the fill that its arguments call for, None for uninitialised memory.

Those that take a tensor use its sizes alone, so they do not read its values.
"""


def is_usual(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a factory's result is plain memory whose layout the meta kernel gives exactly."""
    # Then factories fill memory that they would leave uninitialised (torch/utils/deterministic.py).
    if is_deterministic():
        return False
    if kwargs.get("pin_memory") or kwargs.get("layout") not in (None, torch.strided):
        return False
    # Real and meta kernels disagree on the strides of dims of length one.
    like = args[0]
    return not isinstance(like, Tensor) or 1 not in like.size()


RANDOM = {
    f"aten::{name}{overload}": fill
    for name, fill in (("rand", "uniform_"), ("randn", "normal_"), ("randint", "random_"))
    for overload in ("", ".generator", "_like", "_like.generator", ".low", ".low_generator")
} | {"aten::randint_like.low_dtype": "random_"}
"""The in-place fill of each random factory."""
