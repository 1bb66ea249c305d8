"""The arguments and results of an op: find their tensors, and move them to ``meta``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from lateinit._torch.operators import OpInfo

META = torch.device("meta")
Args = tuple[Any, ...]
Kwargs = dict[str, Any]


def tensors_in(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """All tensors among arguments, also inside lists and tuples."""
    found: list[Tensor] = []
    for value in args:
        if isinstance(value, Tensor):
            found.append(value)
        elif type(value) in (list, tuple):
            found += tensors_in(tuple(value), {})
    if kwargs:
        found += tensors_in(tuple(kwargs.values()), {})
    return found


def has_tensor(args: tuple[Any, ...]) -> bool:
    """Whether arguments may contain a tensor. Every list counts: looking into it takes too long."""
    return any(isinstance(a, (Tensor, list, tuple)) for a in args)


def map_tensors(value: Any, change: Callable[[Tensor], Any]) -> Any:
    """Arguments with their tensors changed, also those in lists, tuples and dictionaries."""
    if isinstance(value, Tensor):
        return change(value)
    if type(value) in (list, tuple):
        return type(value)(map_tensors(item, change) for item in value)
    if type(value) is dict:
        return {key: map_tensors(item, change) for key, item in value.items()}
    return value


def to_meta(value: Any) -> Any:
    """An argument with its real tensors replaced by meta tensors of the same layout."""
    return map_tensors(value, _on_meta)


def _on_meta(tensor: Tensor) -> Tensor:
    if tensor.is_meta:
        return tensor
    return torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device=META)


def kwargs_to_meta(info: OpInfo, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The keyword arguments of an op, adapted so that its meta kernel accepts them.

    Meta kernels accept neither pinned memory nor a generator of another device.
    """
    if not kwargs and not info.takes_device:
        return kwargs
    changed = {key: to_meta(value) for key, value in kwargs.items()}
    changed.pop("pin_memory", None)
    if "generator" in changed:
        changed["generator"] = None
    # ``empty_like`` and similar ops take the device of their argument, which is on meta already.
    if info.takes_device and (not info.from_sizes or kwargs.get("device") is not None):
        changed["device"] = META
    return changed


def flat(result: Any) -> tuple[Any, ...]:
    """The results of an op as a flat tuple."""
    if isinstance(result, (tuple, list)):
        return tuple(leaf for item in result for leaf in flat(item))
    return (result,)


map_leaves = pytree.tree_map
"""``map_leaves(f, tree, is_leaf=None)``: lists, tuples and dicts with ``f`` of each leaf."""
