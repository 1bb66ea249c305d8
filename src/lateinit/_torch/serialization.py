"""Functions of torch that pickles of ``torch.save`` name, and what they call (torch/_utils.py).

Also the private record of DCP that says where a block is.
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
    """The function of a name above, which unpickling calls."""
    found: Callable[..., Any] = getattr(importlib.import_module(name[0]), name[1])
    return found


def stored_by_dcp(file: str, start: int, nbytes: int) -> Any:
    """Say where a block is, as DCP's readers look for it (torch/distributed/checkpoint/filesystem).

    Args:
        file: the name of the file.
        start: its first byte there.
        nbytes: how many it has.
    """
    # Slow to import.
    from torch.distributed.checkpoint.filesystem import _StorageInfo  # noqa: PLC0415

    return _StorageInfo(file, start, nbytes)


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
