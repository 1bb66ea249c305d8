"""Allocate storages, with huge pages if the platform has them; raw bytes of tensors, and keys.

The operating system maps fresh memory page by page at the first touch. With small pages that costs
about as much as drawing random values into it, hence huge pages. Every storage is an allocation of
its own, so it is freed, shared and pickled like any other.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import mmap
import sys
import zlib
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from lateinit._torch.modes import without_functions, without_modes

LARGE = 4 << 20  # bytes: the smallest range that contains a whole huge page at any alignment
_HUGE_PAGE = 2 << 20  # bytes: on x86-64, and on ARM64 with pages of 4 KiB


def allocate(nbytes: int, device: torch.device) -> torch.UntypedStorage:
    """An uninitialised storage."""
    storage = torch.empty(nbytes, dtype=torch.uint8, device=device).untyped_storage()
    advise = _madvise()
    if nbytes >= LARGE and device.type == "cpu" and advise is not None:
        start = -(-storage.data_ptr() // _HUGE_PAGE) * _HUGE_PAGE
        end = (storage.data_ptr() + nbytes) // _HUGE_PAGE * _HUGE_PAGE
        # Only advice: if the kernel refuses it, the pages are small and nothing else changes.
        advise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), mmap.MADV_HUGEPAGE)
    return storage


def in_a_row(tensor: torch.Tensor) -> torch.Tensor:
    """The elements of a tensor in row-major order without gaps."""
    plain = tensor.detach().resolve_conj().resolve_neg()
    flat = plain.contiguous().reshape(-1)
    # A single element is contiguous with any stride, and view(dtype) requires stride 1
    # (aten/src/ATen/native/TensorConversions.cpp).
    if flat.numel() and flat.stride(0) != 1:
        flat = flat.clone(memory_format=torch.contiguous_format)
    return flat


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a tensor's elements in row-major order."""
    flat = in_a_row(tensor)
    return flat.view(torch.uint8) if flat.numel() else flat.new_empty(0, dtype=torch.uint8)


@functools.cache
def _madvise() -> Callable[..., int] | None:
    """The C function ``madvise``, or None if the system has none or no advice for huge pages."""
    if not sys.platform.startswith("linux") or not hasattr(mmap, "MADV_HUGEPAGE"):
        return None
    madvise: Callable[..., int] | None = getattr(ctypes.CDLL(None), "madvise", None)
    return madvise


def digest(value: Tensor) -> bytes:
    """A cryptographic digest of a tensor's bits, to compare values between two seeds."""
    with without_modes():
        value = value if value.layout is torch.strided else value.to_dense()
        return hashlib.sha256(as_bytes(value).cpu().numpy().tobytes()).digest()


def checksum(tensor: Tensor) -> int:
    """A fast checksum of a tensor's bits. Call it without modes in force."""
    return zlib.crc32(as_bytes(tensor).cpu().numpy().data)


def copied_with_strides(tensor: Tensor) -> Tensor:
    """A copy with exactly the strides of the original, overlapping ones and gaps included.

    Kernels derive the layout of results from their arguments, and ``clone`` keeps dense strides
    only.
    """
    if tensor.numel() == 0:
        return torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype)
    span = span_of(tensor.size(), tensor.stride())
    tensor = tensor.detach().resolve_conj().resolve_neg()
    window = tensor.as_strided((span,), (1,), tensor.storage_offset()).clone()
    return window.as_strided(tensor.size(), tensor.stride())


def span_of(size: Iterable[int], stride: Iterable[int]) -> int:
    """The elements from the first to the last one of a non-empty tensor, gaps included."""
    return 1 + sum((n - 1) * step for n, step in zip(size, stride, strict=True))


def is_plain(tensor: Tensor) -> bool:
    """Whether a tensor is a window on one storage: not sparse, quantised or nested."""
    return tensor.layout is torch.strided and not tensor.is_quantized and not tensor.is_nested


def is_zero_tensor(tensor: Tensor) -> bool:
    """Whether a tensor is one of autograd's zeros, which have no memory (ATen: ZeroTensor)."""
    zero: bool = tensor._is_zerotensor()
    return zero


def storage_key(storage: torch.UntypedStorage) -> int:
    """A key that all Python objects of one storage share, valid while the storage lives."""
    key: int = storage._cdata
    return key


def is_held_elsewhere(tensor: Tensor) -> bool:
    """Whether another object holds a tensor's memory too: another tensor, or a numpy array."""
    storage = tensor.untyped_storage()  # this Python object is one of the holders
    return torch._C._storage_Use_Count(storage._cdata) > 2


def memory_key(tensor: Tensor) -> int:
    """The key of a tensor's storage, read without calling any function mode."""
    with without_functions():
        return storage_key(tensor.untyped_storage())


def negative_view(tensor: Tensor) -> Tensor:
    """A view of a tensor with torch's negative bit set, as ``x.conj().imag`` has."""
    return torch._neg_view(tensor)


def sparse_parts(tensor: Tensor) -> list[Tensor]:
    """The indices and values of a sparse COO tensor, coalesced or not."""
    return [tensor._indices(), tensor._values()]


def base_of(tensor: Tensor) -> Tensor:
    """The base of a view, for autograd; of any other tensor, the tensor itself."""
    return tensor if tensor._base is None else tensor._base
