"""A file of tensor data: mapped, or read byte for byte.

When a page of a mapped file is touched, the kernel reads far more (``read_ahead_kb`` around it,
often megabytes), and touched pages count as memory of the process. So a whole tensor that takes the
file's memory is mapped, and a rank reads only the bytes of its shards.
"""

from __future__ import annotations

import mmap
import os
import threading
import weakref
from pathlib import Path

import torch
from torch import Tensor

from lateinit._checkpoint.formats.base import StoredTensor
from lateinit._torch import as_bytes
from lateinit.errors import CorruptCheckpointError

# A private mapping reserves swap for its whole length, as every page might be written to. With this
# flag only written pages count. Python has the constant where the system does.
_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0)
# Shorter runs of bytes are read together with the gaps between them: the system reads whole pages
# of 4,096 bytes in any case, and a system call takes as long as copying 16 KB.
_RUN = 16 << 10
_PIECE = 4 << 20  # the most bytes that are read together


class DataFile:
    """An open file.

    Args:
        path: the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        # Kept open, since another file may take this name while this one is read.
        self._file = path.open("rb", buffering=0)
        weakref.finalize(self, self._file.close)
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
        self._turn = threading.Lock()
        self._data: mmap.mmap | None = None

    def mapped(self, start: int, entry: StoredTensor) -> Tensor:
        """The tensor at a byte of the file; copied if its dtype does not allow that address.

        It is a window on a private mapping: a page that is written to is copied, and the file never
        changes.
        """
        if not entry.nbytes:
            return torch.empty(entry.shape, dtype=entry.dtype, device="cpu")
        if start % entry.dtype.itemsize:
            return self.read(start, entry.layout())
        if self._data is None:
            self._data = _map(self._file.fileno())
        count = entry.nbytes // entry.dtype.itemsize
        data = torch.frombuffer(self._data, dtype=entry.dtype, count=count, offset=start)
        return data.view(entry.shape)

    def read(self, start: int, layout: Tensor) -> Tensor:
        """A tensor of the file, in memory of its own.

        Args:
            start: the byte of the file at which the tensor's storage starts.
            layout: a tensor with its dtype, shape, strides and offset in the storage. Its values
                are not read, so it may be on ``meta``.
        """
        size, stride = layout.size(), layout.stride()
        # With the dims in the order of the file, the elements of one index of a dim are neighbours.
        order = sorted(range(layout.dim()), key=lambda dim: (-stride[dim], dim))
        made = torch.empty([size[d] for d in order], dtype=layout.dtype, device="cpu")
        if made.numel():
            self._fill(made, start, layout.permute(order))
        return made.permute([order.index(dim) for dim in range(layout.dim())])

    def read_bytes(self, start: int, into: memoryview) -> None:
        """Fill a buffer with the bytes from ``start`` on."""
        with self._turn:
            self._file.seek(start)
            while into:
                # The kernel reads at most 2 GB at a time.
                count = self._file.readinto(into)
                if not count:
                    raise CorruptCheckpointError(
                        f"{self.path} ends at byte {self._file.tell():,}, before the end of its "
                        "data: it was truncated since it was opened; fetch or write it again"
                    )
                into = into[count:]

    def place_of(self, address: int) -> int | None:
        """The byte of the file that is mapped at an address; None if none is.

        Also None if the system has no list of mappings. Needed since ``torch.load(mmap=True)`` does
        not report where in the file a storage is.
        """
        try:
            lines = Path("/proc/self/maps").read_text("utf-8", "surrogateescape").splitlines()
        except OSError:
            return None
        own = os.fstat(self._file.fileno()).st_ino
        for line in lines:  # man 5 proc: first-last, permissions, place, device, inode, path
            addresses, _, place, _, inode, *_ = line.split(maxsplit=5)
            first, last = (int(number, 16) for number in addresses.split("-"))
            if first <= address < last:
                return int(place, 16) + address - first if int(inode) == own else None
        return None

    def _fill(self, out: Tensor, start: int, layout: Tensor) -> None:
        if layout.is_contiguous():
            first = start + int(layout.storage_offset()) * layout.dtype.itemsize
            self.read_bytes(first, _bytes_of(out))
            return
        rows, between = layout.size(0), layout.stride(0) * layout.dtype.itemsize
        together = 1 if _run(layout) >= _RUN else max(1, _PIECE // max(1, between))
        if rows == 1 or together == 1:
            for row in range(rows):
                self._fill(out.select(0, row), start, layout.select(0, row))
        elif together >= rows:
            self._fill_from_span(out, start, layout)
        else:
            for row in range(0, rows, together):
                count = min(together, rows - row)
                self._fill(out.narrow(0, row, count), start, layout.narrow(0, row, count))

    def _fill_from_span(self, out: Tensor, start: int, layout: Tensor) -> None:
        """Read the whole range from the first element to the last one."""
        count = 1 + sum((n - 1) * s for n, s in zip(layout.size(), layout.stride(), strict=True))
        span = torch.empty(count, dtype=layout.dtype, device="cpu")
        first = start + int(layout.storage_offset()) * layout.dtype.itemsize
        self.read_bytes(first, _bytes_of(span))
        out.copy_(span.as_strided(layout.size(), layout.stride()))


def _bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor."""
    return memoryview(as_bytes(tensor).numpy().data)


def _run(layout: Tensor) -> int:
    """The number of bytes in each contiguous run of a layout."""
    count = 1
    for length, stride in zip(reversed(layout.size()), reversed(layout.stride()), strict=True):
        if stride != count and length != 1:
            break
        count *= length
    return count * layout.dtype.itemsize


def _map(number: int) -> mmap.mmap:
    if hasattr(mmap, "MAP_PRIVATE"):
        flags, access = mmap.MAP_PRIVATE | _NORESERVE, mmap.PROT_READ | mmap.PROT_WRITE
        return mmap.mmap(number, 0, flags=flags, prot=access)
    return mmap.mmap(number, 0, access=mmap.ACCESS_COPY)
