"""The functions that a pickle of ``torch.save`` names, and those that they call (torch/_utils.py).

Also DCP's private record of the place of a block.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch

REBUILD_TENSOR = ("torch._utils", "_rebuild_tensor_v2")
REBUILD_TENSOR_WITH_DTYPE = ("torch._utils", "_rebuild_tensor_v3")
REBUILD_TENSOR_WITH_ATTRIBUTES = ("torch._tensor", "_rebuild_from_type_v2")
REBUILD_PARAMETER = ("torch._utils", "_rebuild_parameter")
REBUILD_PARAMETER_WITH_STATE = ("torch._utils", "_rebuild_parameter_with_state")


def rebuild(name: tuple[str, str]) -> Callable[..., Any]:
    """The function with a name above, which unpickling calls."""
    found: Callable[..., Any] = getattr(importlib.import_module(name[0]), name[1])
    return found


def stored_by_dcp(file: str, start: int, nbytes: int) -> Any:
    """DCP's record of the place of a block (torch/distributed/checkpoint/filesystem.py).

    Args:
        file: the name of the file.
        start: the first byte of the block in the file.
        nbytes: the length of the block in bytes.
    """
    # Slow to import.
    from torch.distributed.checkpoint.filesystem import _StorageInfo  # noqa: PLC0415

    return _StorageInfo(file, start, nbytes)


REBUILDING: tuple[Any, str] = torch._utils, "_rebuild_tensor"
"""The module in which torch's functions look up ``rebuild_tensor``, at each call."""
rebuild_tensor: Callable[..., torch.Tensor] = getattr(*REBUILDING)
"""``rebuild_tensor(typed_storage, offset, size, stride)``: a tensor on loaded memory."""


def bytes_loaded(storage: Any) -> int | None:
    """The size of a typed storage of bytes on the CPU; None for any other storage."""
    if storage.dtype is not torch.uint8:
        return None
    untyped = storage._untyped_storage  # the public way to it warns (torch/storage.py)
    return int(untyped.nbytes()) if untyped.device.type == "cpu" else None
