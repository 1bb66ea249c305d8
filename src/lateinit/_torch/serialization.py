"""Functions of torch that pickles of ``torch.save`` name, and what they call (torch/_utils.py)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

REBUILD_TENSOR = ("torch._utils", "_rebuild_tensor_v2")
REBUILD_TENSOR_WITH_DTYPE = ("torch._utils", "_rebuild_tensor_v3")
REBUILD_PARAMETER = ("torch._utils", "_rebuild_parameter")

REBUILDING: tuple[Any, str] = torch._utils, "_rebuild_tensor"
"""Where they find ``rebuild_tensor``, at each call."""
rebuild_tensor: Callable[..., torch.Tensor] = getattr(*REBUILDING)
"""``rebuild_tensor(typed_storage, offset, size, stride)``: a tensor on loaded memory."""


def bytes_loaded(storage: Any) -> int | None:
    """The size of a typed storage of bytes on the CPU; None of any other one."""
    if storage.dtype is not torch.uint8:
        return None
    untyped = storage._untyped_storage  # what the storage itself answers, with a warning
    return int(untyped.nbytes()) if untyped.device.type == "cpu" else None
