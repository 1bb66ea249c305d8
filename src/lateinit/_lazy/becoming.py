"""Turn a placeholder object into its tensor, so that every reference to it stays valid."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from lateinit._recording import current
from lateinit._recording.guard import guard
from lateinit._tensors import is_deferred_tensor, is_placeholder
from lateinit._torch import (
    memory_key,
    swap_with_hooks,
    without_subclass_functions,
)

# The attributes of a placeholder that the tensor it becomes does not keep.
_OWN = ("_casts", "_in_block", "_known", "_label", "_origin", "_root", "persistent", "_is_buffer")


def converted(placeholder: Tensor) -> tuple[torch.device | None, tuple[torch.dtype, ...]]:
    """The device that a placeholder was moved to since it was made, and all casts since then.

    Every cast counts: values that were bfloat16 once have lost their low bits for good.
    """
    origin, casts = placeholder.__dict__.get("_origin"), placeholder.__dict__.get("_casts", ())
    if origin is None:
        return None, casts
    now = placeholder.data.device
    return (now if now != origin[1] else None), casts


def device_of(tensors: Iterable[Any]) -> torch.device:
    """The device of the first placeholder; if there is none, the default device."""
    for tensor in tensors:
        if tensor is not None and is_placeholder(tensor):
            # In a block a placeholder's own empty data is on the CPU (`_empty`), and the requested
            # device is in `_origin`. That one is right unless the placeholder was moved since.
            asked, origin = tensor.__dict__.get("_origin", (None, None))[:2]
            now: torch.device = tensor.data.device
            return asked if asked is not None and now == origin else now
    return torch.get_default_device()


def become(placeholder: Tensor, tensor: Tensor) -> None:
    """Make a placeholder object the given tensor; hooks and references to the object stay."""
    with without_subclass_functions():
        with torch.no_grad():
            shown = tensor.detach()
        shown.requires_grad_(placeholder.requires_grad)
        memory = memory_key(shown)  # a mode that intercepted a read would realise a stand-in
        try:
            swap_with_hooks(placeholder, shown)
            _dress(placeholder, tensor)
        except BaseException:
            if memory_key(placeholder) == memory:
                _dress(placeholder, tensor)  # after an interrupt, it must not stay half converted
            raise


def _dress(placeholder: Tensor, tensor: Tensor) -> None:
    """Give a placeholder that shows the memory of a tensor its attributes and its class."""
    for name in _OWN:
        placeholder.__dict__.pop(name, None)
    placeholder.__dict__.update(tensor.__dict__)
    placeholder.__class__ = type(tensor)
    # Inside a block deferred tensors are guarded only when the block ends.
    if is_deferred_tensor(placeholder) and current() is None:
        guard(placeholder)
