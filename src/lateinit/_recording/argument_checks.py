"""Refuse numbers that an in-place op would refuse, before the op is recorded.

Kernels check arguments, such as those of ``uniform_(2, 1)``, and no kernel runs while a fill is
recorded. Numbers that are surely valid are recognised by comparing them. For all others the op is
tried once, on at most two elements, so that the constructor sees torch's own error.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from lateinit._program import TensorRef
from lateinit._torch import operators, without_modes

# uniform_ checks its bounds and their difference against the dtype's range
# (aten/src/ATen/native/DistributionTemplates.h). The smallest one is float16's, 65504 > 2 * 3e4.
_FAR = 3e4
_USUAL: dict[str, Callable[..., bool]] = {
    "aten::normal_": lambda mean=0.0, std=1.0: std >= 0,
    "aten::uniform_": lambda low=0.0, high=1.0: -_FAR <= low <= high <= _FAR,
    operators.TRUNCATED: lambda *_: True,  # tried in trunc_normal.recorded()
}
"""For the most frequent fills, a test for numbers that are surely valid."""
# In-place ops that accept any real numbers for a floating-point tensor.
_UNREFUSED = {
    *(f"aten::{name}_.Tensor" for name in ("add", "sub", "mul", "div")),
    *(f"aten::{name}_" for name in ("clamp", "clamp_min", "clamp_max", "neg", "abs", "erfinv")),
    *(f"aten::{name}_" for name in ("exp", "log", "sqrt", "rsqrt", "reciprocal", "sin", "cos")),
    *(f"aten::{name}_" for name in ("tanh", "sigmoid", "floor", "ceil", "trunc")),
}
_REAL = frozenset({int, float})


def check_numbers(
    info: operators.OpInfo, ref: TensorRef, device: torch.device, numbers: tuple[Any, ...]
) -> None:
    """Raise what an in-place op raises for its numbers; only CPU kernels are tried."""
    usual = _USUAL.get(info.name)
    if (usual is None or not usual(*numbers)) and device.type == "cpu":
        _try(info.name, ref.dtype, min(ref.numel, 2), numbers)  # one element has its own kernel


def never_refuses(info: operators.OpInfo, numbers: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether an in-place op accepts these numbers for every floating-point tensor."""
    if info.name not in _UNREFUSED:
        return False
    for number in numbers:
        if type(number) not in _REAL:
            return False
    return not kwargs or _REAL.issuperset(map(type, kwargs.values()))


@functools.lru_cache(maxsize=1024)
def _try(name: str, dtype: torch.dtype, numel: int, numbers: tuple[Any, ...]) -> None:
    info = operators.by_name(name)
    with without_modes():
        own = {"generator": torch.Generator()} if info.random else {}
        info.func(torch.zeros(numel, dtype=dtype, device="cpu"), *numbers, **own)
