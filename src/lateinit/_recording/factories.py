"""Factories as what they are to a program: memory, and an op that fills it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lateinit._torch.modes import is_deterministic

FillOp = tuple[str, tuple[Any, ...]]
"""The in-place op that a factory ends in, and its numbers."""


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
"""Factories that are recorded as what they are: memory, and an op that fills it.

Of a tensor that they are given they use the sizes alone, which need no values.
"""


def is_usual(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether what a factory gives is known without its kernel, and is plain memory."""
    if is_deterministic():  # fills what is empty
        return False
    if kwargs.get("pin_memory") or kwargs.get("layout") not in (None, torch.strided):
        return False
    # Kernels and their meta twins disagree on the strides of dims of length one.
    like = args[0]
    return not isinstance(like, Tensor) or 1 not in like.size()


RANDOM = {
    f"aten::{name}{overload}": fill
    for name, fill in (("rand", "uniform_"), ("randn", "normal_"), ("randint", "random_"))
    for overload in ("", ".generator", "_like", "_like.generator", ".low", ".low_generator")
} | {"aten::randint_like.low_dtype": "random_"}
"""The in-place ops that random factories end in."""
