"""Write a safetensors file from first byte to last, one piece of a tensor at a time.

The format: the length of the header (8 bytes, little-endian), the header (JSON: dtype, shape and
data offsets of each tensor), and the data without gaps.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable, Mapping
from typing import BinaryIO

import torch
from torch import Tensor

from lateinit._checkpoint.formats import DTYPES, RESERVED, StoredTensor
from lateinit._torch import in_a_row

# Bytes that are moved to the CPU, cast and written at a time (16 MiB). Bounds the memory of a cast.
_PIECE = 1 << 24


def header(entries: Iterable[StoredTensor], metadata: Mapping[str, str]) -> bytes:
    """Everything before the data, for tensors whose data follow each other in this order."""
    described: dict[str, object] = {RESERVED: dict(metadata)} if metadata else {}
    end = 0
    for entry in entries:
        start, end = end, end + entry.nbytes
        described[entry.name] = {
            "dtype": DTYPES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(described, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # the format requires the data to start at a multiple of 8
    return len(text).to_bytes(8, "little") + text


class SafetensorsWriter:
    """Writes the header of a file, then its tensors in the same order; computes a checksum."""

    def __init__(
        self, file: BinaryIO, entries: Iterable[StoredTensor], metadata: Mapping[str, str]
    ) -> None:
        self._file = file
        self._due = list(reversed(list(entries)))
        self._sum = 0
        self._put(header(reversed(self._due), metadata))

    def write(self, tensor: Tensor) -> int:
        """Write the next tensor, cast to its dtype in the header; returns its bytes."""
        entry = self._due.pop()
        assert tuple(tensor.shape) == entry.shape, entry.name
        flat = in_a_row(tensor)
        step = max(1, _PIECE // max(flat.element_size(), entry.dtype.itemsize))
        for start in range(0, flat.numel(), step):
            piece = flat[start : start + step].to(device="cpu", dtype=entry.dtype)
            self._put(piece.view(torch.uint8).numpy().data)
        return entry.nbytes

    def finish(self) -> str:
        """Check that every tensor was written; returns the file's checksum (CRC-32, in hex)."""
        assert not self._due, f"{len(self._due)} tensors were not written"
        return f"{self._sum:08x}"

    def _put(self, data: bytes | memoryview) -> None:
        self._sum = zlib.crc32(data, self._sum)
        self._file.write(data)
