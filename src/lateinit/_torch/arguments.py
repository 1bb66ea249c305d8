"""The arguments of an op: the tensors in them, and their stand-ins on ``meta``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from lateinit._torch.operators import OpInfo

META = torch.device("meta")
Args = tuple[Any, ...]
Kwargs = dict[str, Any]


def tensors_in(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
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
    return any(isinstance(a, (Tensor, list, tuple)) for a in args)


def to_meta(value: Any) -> Any:
    """Arguments with real tensors replaced by meta ones of the same layout."""
    if isinstance(value, Tensor):
        if value.is_meta:
            return value
        return torch.empty_strided(value.size(), value.stride(), dtype=value.dtype, device=META)
    if type(value) in (list, tuple):
        return type(value)(to_meta(item) for item in value)
    return value


def kwargs_to_meta(info: OpInfo, kwargs: dict[str, Any]) -> dict[str, Any]:
    if not kwargs and not info.takes_device:
        return kwargs
    changed = {key: to_meta(value) for key, value in kwargs.items()}
    changed.pop("pin_memory", None)
    if "generator" in changed:
        changed["generator"] = None
    if info.takes_device and (not info.from_sizes or kwargs.get("device") is not None):
        changed["device"] = META
    return changed


def flat(result: Any) -> tuple[Any, ...]:
    """What an op returned, as a flat tuple."""
    if isinstance(result, (tuple, list)):
        return tuple(leaf for item in result for leaf in flat(item))
    return (result,)


map_leaves = pytree.tree_map
"""``map_leaves(f, tree, is_leaf=None)``: the same lists, tuples and dicts with other leaves."""
