"""Refuse numbers that an in-place op would refuse, before the op is recorded.

Kernels check arguments, such as those of ``uniform_(2, 1)``, and no kernel runs while a fill is
recorded. Numbers that are surely valid are recognised by comparing them. For all others the op is
tried once, on at most two elements, so that the constructor sees torch's own error.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from lateinit._program import TensorRef
from lateinit._tensors import Slot
from lateinit._torch import OpInfo, by_name, is_running, without_modes
from lateinit.errors import UninitializedError

NOT_YET = "initialise it in another deferred() block, after lateinit.infer_shapes(model, ...)"
EMPTY = (0,)
"""The size of the empty data of another library's placeholder."""
# How many callers of a handler are searched for `materialize`: the frames of modes and guards.
_DEEPEST = 6


def are_usual(info: OpInfo, numbers: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether an in-place op surely accepts these numbers for every floating-point tensor."""
    return info.usual is not None and info.usual(*numbers, *kwargs.values())


def check_fill(
    info: OpInfo, ref: TensorRef, device: torch.device, numbers: tuple[Any, ...]
) -> None:
    """Raise the error of a fill for its numbers, such as 1e30 for float16 or 300 for uint8."""
    if not numbers:
        return
    floating = ref.dtype.is_floating_point or ref.dtype.is_complex
    tried = floating or info.random
    if not (are_usual(info, numbers, {}) if tried else _are_bytes(numbers)):
        check_numbers(info, ref, device, numbers)


def _are_bytes(numbers: tuple[Any, ...]) -> bool:
    return all(type(n) is int and 0 <= n <= 127 for n in numbers)


def check_numbers(
    info: OpInfo, ref: TensorRef, device: torch.device, numbers: tuple[Any, ...], **kwargs: Any
) -> None:
    """Raise the error of an in-place op for its numbers; only CPU kernels are tried."""
    if device.type == "cpu":
        # A single element is handled by another kernel, so a tensor of one element is tried as one.
        _try(info.name, ref.dtype, min(ref.numel, 2), numbers, **kwargs)


def check_kept(slot: Slot | None) -> None:
    """Raise if a storage belongs to another library's placeholder: a write would be lost."""
    if slot is not None and slot.lazy is not None:
        raise UninitializedError(
            f"{slot.lazy} has no shape yet, so that what is written to it would be lost: {NOT_YET}"
        )


def takes_all(written: Any, *others: Any) -> bool:
    """Whether an op writes a tensor as empty as a placeholder, and reads no such tensor."""
    return _is_empty(written) and not any(map(_is_empty, others))


def _is_empty(value: Any) -> bool:
    if type(value) is tuple:
        return any(map(_is_empty, value))
    return type(value) is TensorRef and value.size == EMPTY


def check_data(slot: Slot | None, placeholder: Any, data: Tensor) -> None:
    """Raise if a placeholder of another library is given data that it would lose.

    It keeps data from ``materialize``, and the converted data from ``Module._apply``, which is as
    empty as before.
    """
    if data.size() != EMPTY and not is_running(placeholder.materialize.__code__, _DEEPEST):
        check_kept(slot)


@functools.lru_cache(maxsize=1024)
def _try(
    name: str, dtype: torch.dtype, numel: int, numbers: tuple[Any, ...], **kwargs: Any
) -> None:
    info = by_name(name)
    with without_modes():
        own = {"generator": torch.Generator()} if info.random else {}
        info.func(torch.zeros(numel, dtype=dtype, device="cpu"), *numbers, **kwargs, **own)
