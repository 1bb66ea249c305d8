"""Refuse numbers that an in-place op would refuse, before the op is recorded.

Kernels check arguments, such as those of ``uniform_(2, 1)``, and no kernel runs while a fill is
recorded. Numbers that are surely valid are recognised by comparing them. For all others the op is
tried once, on at most two elements, so that the constructor sees torch's own error.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from lateinit._program import TensorRef
from lateinit._torch import OpInfo, by_name, without_modes


def are_usual(info: OpInfo, numbers: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether an in-place op surely accepts these numbers for every floating-point tensor."""
    return info.usual is not None and info.usual(*numbers, *kwargs.values())


def check_fill(
    info: OpInfo, ref: TensorRef, device: torch.device, numbers: tuple[Any, ...]
) -> None:
    """Raise what a fill raises for its numbers, such as 1e30 for float16 or 300 for uint8."""
    if not numbers:
        return
    floating = ref.dtype.is_floating_point or ref.dtype.is_complex
    if not (are_usual(info, numbers, {}) if floating else _are_bytes(numbers)):
        check_numbers(info, ref, device, numbers)


def _are_bytes(numbers: tuple[Any, ...]) -> bool:
    return all(type(n) is int and 0 <= n <= 127 for n in numbers)


def check_numbers(
    info: OpInfo, ref: TensorRef, device: torch.device, numbers: tuple[Any, ...], **kwargs: Any
) -> None:
    """Raise what an in-place op raises for its numbers; only CPU kernels are tried."""
    if device.type == "cpu":
        # One element has its own kernel.
        _try(info.name, ref.dtype, min(ref.numel, 2), numbers, **kwargs)


@functools.lru_cache(maxsize=1024)
def _try(
    name: str, dtype: torch.dtype, numel: int, numbers: tuple[Any, ...], **kwargs: Any
) -> None:
    info = by_name(name)
    with without_modes():
        own = {"generator": torch.Generator()} if info.random else {}
        info.func(torch.zeros(numel, dtype=dtype, device="cpu"), *numbers, **kwargs, **own)
