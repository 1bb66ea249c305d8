"""Classify torch's exceptions by their text: torch raises a bare ``RuntimeError`` for most."""

from __future__ import annotations

import errno
import re

_OUT_OF_MEMORY = (
    "can't allocate memory",  # c10/core/impl/alloc_cpu.cpp
    "Cannot allocate memory",  # aten/src/ATen/MapAllocator.cpp: the error of mmap
    "not enough memory",
    "out of memory",
)
_WITHOUT_MEMORY = ("meta", "unallocated storage")
_NO_DATA = "its data is not allocated yet"  # c10/core/TensorImpl.h
_MIXED_GRAPH = "returned an invalid gradient at index"  # torch/csrc/autograd/engine.cpp
_LAZY = "Attempted to use an uninitialized parameter"  # torch/nn/parameter.py
_LEGACY = re.compile(r"expected TensorOptions\(.*\(got TensorOptions\(.*device=meta")
_MISFIT = "Error(s) in loading state_dict for "


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception of torch or Python means that memory ran out."""
    if isinstance(error, MemoryError):
        return True
    if isinstance(error, OSError):  # of mmap
        return error.errno == errno.ENOMEM
    # torch.OutOfMemoryError is for accelerators. The CPU allocator (c10/core/impl/alloc_cpu.cpp)
    # raises a bare RuntimeError.
    return isinstance(error, RuntimeError) and any(word in str(error) for word in _OUT_OF_MEMORY)


def asks_for_values(error: BaseException) -> bool:
    """Whether an exception means that an op needs the memory of a meta tensor."""
    said = str(error).lower()
    return any(word in said for word in _WITHOUT_MEMORY)


def reaches_for_memory(error: BaseException) -> bool:
    """Whether an exception means that a kernel for real tensors accessed memory on meta."""
    return _NO_DATA in str(error)


def is_of_mixed_graph(error: BaseException) -> bool:
    """Whether an exception means that a graph joins tensors on meta with real ones."""
    said = str(error)
    return _MIXED_GRAPH in said and "expected device" in said and "meta" in said


def is_of_legacy_type(error: BaseException) -> bool:
    """Whether a legacy tensor type, such as ``torch.FloatTensor``, has refused a tensor on meta.

    torch/csrc/utils/tensor_new.cpp: legacy_tensor_generic_ctor_new. No mode intercepts the call.
    """
    return isinstance(error, TypeError) and _LEGACY.match(str(error)) is not None


def is_misfit(error: BaseException) -> bool:
    """Whether ``load_state_dict`` raised an exception because keys or shapes do not fit."""
    return str(error).startswith(_MISFIT)


def is_lazy_misuse(error: BaseException) -> bool:
    """Whether a placeholder of torch raised an exception because it has no shape yet."""
    return str(error).startswith(_LAZY)
