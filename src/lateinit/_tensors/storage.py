"""The storage of deferred tensors: it has an address of its own, and no memory behind it.

Storages have no ``__torch_function__``, and their methods do not reach the dispatcher: on ``meta``
a write does nothing and a read returns nothing, silently. So the Python object of a recorded
storage gets a class that refuses both. torch keeps that object, its class included, for as long as
the storage lives (torch/csrc/Storage.cpp).
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from typing import Any

import torch

from lateinit._torch import is_typed_storage_indexed
from lateinit.errors import DeferredTensorError

SLOT = "_lateinit_slot"
"""The attribute of a storage that holds its ``Slot``."""

# Addresses that no process can have: on x86-64 and on ARM64 the upper bits of an address must be
# equal, or are ignored from bit 56 on. Code that dereferences one crashes and reads no wrong value.
_FIRST_ADDRESS = 1 << 60 | 1 << 52
_ALIGNMENT = 64


class _Addresses:
    """Reserves consecutive ranges of addresses, one for each storage."""

    def __init__(self) -> None:
        self._next = _FIRST_ADDRESS
        self._lock = threading.Lock()

    def reserve(self, nbytes: int) -> int:
        with self._lock:
            address = self._next
            self._next += (nbytes // _ALIGNMENT + 1) * _ALIGNMENT
        return address


_addresses = _Addresses()


class DeferredStorage(torch.UntypedStorage):
    """A storage on ``meta`` that was recorded."""

    def data_ptr(self) -> int:
        """An address that no other storage has, for code that compares addresses to find ties."""
        if not self.nbytes():
            return 0
        real = getattr(self, SLOT).real
        if real is not None:
            return int(real.storage.data_ptr())
        if "address" not in self.__dict__:
            self.address = _addresses.reserve(self.nbytes())
        return self.address

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        """The device, ``meta``."""
        # torch/storage.py: TypedStorage reads and writes through a tensor on this device.
        if is_typed_storage_indexed():
            raise _no_memory(self, "an element")
        return torch.device("meta")

    def resize_(self, size: int) -> DeferredStorage:
        """Do nothing if the size stays the same, which FSDP relies on; else raise."""
        if size != self.nbytes():
            raise _no_memory(self, "resize_")
        return self


def _no_memory(storage: Any, method: str) -> DeferredTensorError:
    name = getattr(storage, SLOT).name
    which = f" {name!r}" if name else ""
    return DeferredTensorError(
        f"{method} of the storage of the deferred tensor{which}, which has no memory yet: use the "
        "tensor itself, or call lateinit.materialize() first"
    )


def _refused(method: str) -> Callable[..., Any]:
    def refuse(self: Any, *_: Any, **__: Any) -> Any:
        raise _no_memory(self, method)

    refuse.__name__ = method
    return refuse


# Every method of torch/storage.py that reads, writes, copies or shares the memory.
for _method in itertools.chain(
    ("__getitem__", "__setitem__", "__iter__", "__copy__", "__deepcopy__", "__reduce__"),
    ("tolist", "clone", "copy_", "fill_", "byteswap", "_byteswap", "share_memory_", "pin_memory"),
    ("_share_fd_cpu_", "_share_filename_cpu_", "_share_cuda_", "_write_file", "_set_from_file"),
    ("cpu", "cuda", "hpu", "mps", "to", "_to"),
):
    setattr(DeferredStorage, _method, _refused(_method))
