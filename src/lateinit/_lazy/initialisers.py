"""Functions of torch that initialise a tensor in place, and that a placeholder can remember."""

from __future__ import annotations

import functools
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

# In-place functions that need values of another tensor, or change more than values.
_OTHERS = frozenset({"copy_", "requires_grad_", "set_", "share_memory_"})


def initialised_by(
    func: Any, args: Any, kwargs: Any
) -> tuple[Any, Callable[[Tensor], None]] | None:
    """The tensor that a call initialises, and a function that repeats the call later.

    Returns:
        None if the call does anything but set or change the values of one tensor, from numbers
        alone.
    """
    # torch/nn/init.py: its functions pass keyword arguments to handle_torch_function.
    kwargs = dict(kwargs)
    owner, given = (args[0], args[1:]) if args else (kwargs.pop("tensor", None), ())
    others = (*given, *kwargs.values())
    if any(isinstance(value, (Tensor, torch.Generator, list, tuple)) for value in others):
        return None
    return (owner, partial(_again, func, given, kwargs)) if _is_initialiser(func) else None


@functools.cache
def _is_initialiser(func: Any) -> bool:
    name = getattr(func, "__name__", "")
    if not name.endswith("_") or name.startswith("_"):
        return False
    if getattr(func, "__module__", None) == nn.init.__name__:
        return True
    if getattr(Tensor, name, None) != func or name in _OTHERS:
        return False
    packet = getattr(torch.ops.aten, name, None)
    tags = [getattr(packet, overload).tags for overload in packet.overloads()] if packet else []
    return bool(tags) and not any(torch.Tag.inplace_view in each for each in tags)


def _again(func: Any, given: Any, kwargs: Any, owner: Tensor) -> None:
    with torch.no_grad():  # as in `nn.init`, and on `.data`
        func(owner, *given, **kwargs)
