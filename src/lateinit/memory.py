"""Allocating storages, large ones on huge pages where the platform has them.

Fresh memory is mapped in page by page as it is first touched, at a cost near that of drawing the
values. Each storage is an allocation of its own: it is freed, shared and pickled as any other.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import sys
from collections.abc import Callable

import torch

_LARGE = 4 << 20
_HUGE_PAGE = 2 << 20


def allocate(nbytes: int, device: torch.device) -> torch.UntypedStorage:
    """An uninitialised storage."""
    storage = torch.empty(nbytes, dtype=torch.uint8, device=device).untyped_storage()
    advise = _madvise()
    if nbytes >= _LARGE and device.type == "cpu" and advise is not None:
        start = -(-storage.data_ptr() // _HUGE_PAGE) * _HUGE_PAGE
        end = (storage.data_ptr() + nbytes) // _HUGE_PAGE * _HUGE_PAGE
        # Advice: where it is refused, the pages are small and all is well.
        advise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), mmap.MADV_HUGEPAGE)
    return storage


@functools.cache
def _madvise() -> Callable[..., int] | None:
    if not sys.platform.startswith("linux") or not hasattr(mmap, "MADV_HUGEPAGE"):
        return None
    madvise: Callable[..., int] | None = getattr(ctypes.CDLL(None), "madvise", None)
    return madvise
