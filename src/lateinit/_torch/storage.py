"""Allocating storages, large ones on huge pages where the platform has them; raw bytes.

Fresh memory is mapped in page by page as it is first touched, at a cost near that of drawing the
values. Each storage is an allocation of its own: it is freed, shared and pickled as any other.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import mmap
import sys
import zlib
from collections.abc import Callable

import torch
from torch import Tensor

from lateinit._torch.modes import without_modes

LARGE = 4 << 20
_HUGE_PAGE = 2 << 20


def allocate(nbytes: int, device: torch.device) -> torch.UntypedStorage:
    """An uninitialised storage."""
    storage = torch.empty(nbytes, dtype=torch.uint8, device=device).untyped_storage()
    advise = _madvise()
    if nbytes >= LARGE and device.type == "cpu" and advise is not None:
        start = -(-storage.data_ptr() // _HUGE_PAGE) * _HUGE_PAGE
        end = (storage.data_ptr() + nbytes) // _HUGE_PAGE * _HUGE_PAGE
        # Advice: where it is refused, the pages are small and all is well.
        advise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), mmap.MADV_HUGEPAGE)
    return storage


def in_a_row(tensor: torch.Tensor) -> torch.Tensor:
    """The elements of a tensor in row-major order, one next to the other."""
    plain = tensor.detach().resolve_conj().resolve_neg()
    flat = plain.contiguous().reshape(-1)
    # One element is contiguous with whatever stride, and then cannot be seen as bytes.
    if flat.numel() and flat.stride(0) != 1:
        flat = flat.clone(memory_format=torch.contiguous_format)
    return flat


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a tensor, in a row."""
    flat = in_a_row(tensor)
    return flat.view(torch.uint8) if flat.numel() else flat.new_empty(0, dtype=torch.uint8)


@functools.cache
def _madvise() -> Callable[..., int] | None:
    if not sys.platform.startswith("linux") or not hasattr(mmap, "MADV_HUGEPAGE"):
        return None
    madvise: Callable[..., int] | None = getattr(ctypes.CDLL(None), "madvise", None)
    return madvise


def digest(value: Tensor) -> bytes:
    """A digest of the bits of a tensor, to compare what another seed would have shown."""
    with without_modes():
        value = value if value.layout is torch.strided else value.to_dense()
        return hashlib.sha256(as_bytes(value).cpu().numpy().tobytes()).digest()


def checksum(tensor: Tensor) -> int:
    """A checksum of a tensor's bits, for a caller that no mode hears."""
    return zlib.crc32(as_bytes(tensor).cpu().numpy().data)


def copied_with_strides(tensor: Tensor) -> Tensor:
    """A copy with the very strides of the original: results are laid out after their arguments."""
    if tensor.numel() == 0:
        return torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype)
    span = 1 + sum((n - 1) * s for n, s in zip(tensor.size(), tensor.stride(), strict=True))
    tensor = tensor.detach().resolve_conj().resolve_neg()
    window = tensor.as_strided((span,), (1,), tensor.storage_offset()).clone()
    return window.as_strided(tensor.size(), tensor.stride())


def is_plain(tensor: Tensor) -> bool:
    """Whether a tensor is a window on a storage: not sparse, quantised or nested."""
    return tensor.layout is torch.strided and not tensor.is_quantized and not tensor.is_nested


def storage_key(storage: torch.UntypedStorage) -> int:
    """The same for all Python objects that stand for one storage, while it lives."""
    key: int = storage._cdata
    return key


def negative_view(tensor: Tensor) -> Tensor:
    """A view of a tensor whose elements are seen negated, as ``x.conj().imag`` sees them."""
    return torch._neg_view(tensor)


def sparse_parts(tensor: Tensor) -> list[Tensor]:
    """The indices and values of a sparse COO tensor, coalesced or not."""
    return [tensor._indices(), tensor._values()]
