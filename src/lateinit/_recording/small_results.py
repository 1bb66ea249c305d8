"""Find the layouts of small results by the real kernel, on ones in place of values.

Most meta kernels are Python code (torch/_refs, torch/_meta_registrations.py). The first one that
runs imports the compiler and sympy (measured: 1.1 s), and each call takes 50 microseconds or more.
The real kernel takes 2 microseconds for few elements, and gives the strides of eager construction.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from lateinit._torch import (
    META,
    Args,
    Kwargs,
    OpInfo,
    is_any_autocast_enabled,
    is_zero_tensor,
    map_tensors,
    span_of,
    tensors_in,
)

_MOST = 1 << 16  # the most elements that the results may have by the bound of ``_is_small``


def layouts_of_small(info: OpInfo, args: Args, kwargs: Kwargs) -> Any:
    """The results of an op as meta tensors, or None if the meta kernel must be used.

    Args:
        info: the op.
        args: its positional arguments, whose tensors were recorded for the CPU.
        kwargs: its keyword arguments.
    """
    if not info.layout_by_run or is_any_autocast_enabled():
        return None
    tensors = tensors_in(args, kwargs)
    if not all(_is_usual(tensor, info) for tensor in tensors) or not _is_small(info, args, tensors):
        return None
    own = {tensor: _ones(tensor) for tensor in tensors}
    named = {key: value for key, value in kwargs.items() if key not in ("device", "pin_memory")}
    given, named = map_tensors((args, named), own.__getitem__)
    try:
        found = info.func(*given, **named)
    except Exception:  # noqa: BLE001 - ones may be invalid for it: then use the meta kernel
        return None
    results = found if isinstance(found, tuple) else (found,)
    places = {ones.untyped_storage().data_ptr() for ones in own.values()}
    if not all(_is_new(result, places) for result in results):
        return None
    made = tuple(map(_on_meta, results))
    return made if isinstance(found, tuple) else made[0]


def _is_usual(tensor: Tensor, info: OpInfo) -> bool:
    """Whether the layout of a result cannot depend on the values of a tensor, such as a mask."""
    fixed = info.pointwise or info.from_sizes or tensor.is_floating_point()
    marked = tensor.is_conj() or tensor.is_neg() or is_zero_tensor(tensor)
    return fixed and type(tensor) in _PLAIN and not marked


_PLAIN = (Tensor, torch.nn.Parameter)


def _is_small(info: OpInfo, args: Args, tensors: list[Tensor]) -> bool:
    shapes = {tensor.shape for tensor in tensors}
    most: float = math.prod(shape.numel() for shape in shapes)
    if not info.pointwise:
        # Numbers may be sizes, such as those of a padding, and a size may count twice, as in eye().
        numbers = math.prod(_factors(args))
        most *= numbers if tensors else numbers**2
    return most <= _MOST


def _factors(values: Iterable[Any]) -> Iterable[float]:
    for value in values:
        if isinstance(value, (list, tuple)):
            yield from _factors(value)
        elif isinstance(value, (int, float)):
            yield max(1, abs(value), 1 / abs(value) if value else 1)


def _ones(tensor: Tensor) -> Tensor:
    size, stride = tensor.size(), tensor.stride()
    span = span_of(size, stride) if tensor.numel() else 1
    return torch.ones(span, dtype=tensor.dtype, device="cpu").as_strided(size, stride)


def _is_new(result: Any, places: set[int]) -> bool:
    """Whether a result is a plain tensor that covers a storage of its own.

    Some ops return a view, or their argument itself, although their schemas do not state it
    (``_unsafe_view``, ``conj_physical``).
    """
    if type(result) is not Tensor or result.layout != torch.strided or result.device.type != "cpu":
        return False
    if is_zero_tensor(result):
        return False
    storage = result.untyped_storage()
    whole = storage.nbytes() == result.numel() * result.element_size()
    return whole and storage.data_ptr() not in places


def _on_meta(result: Tensor) -> Tensor:
    return torch.empty_strided(result.size(), result.stride(), dtype=result.dtype, device=META)
