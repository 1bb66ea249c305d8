"""Writing a safetensors file from first byte to last, holding one piece of it at a time.

The format: the length of the header (8 bytes, little-endian), the header (JSON: for each tensor its
dtype, shape and place in the data), the data without gaps.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import BinaryIO

import torch
from torch import Tensor

from lateinit._torch.storage import in_a_row

DTYPES = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e4m3fnuz: "F8_E4M3FNUZ",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e5m2fnuz: "F8_E5M2FNUZ",
    torch.int16: "I16",
    torch.uint16: "U16",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int32: "I32",
    torch.uint32: "U32",
    torch.float32: "F32",
    torch.int64: "I64",
    torch.uint64: "U64",
    torch.float64: "F64",
    torch.complex64: "C64",
}
_PIECE = 1 << 24  # bytes that are cast and written at a time


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor as a file holds it."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """The bytes of its data."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def header(entries: Iterable[Entry], metadata: Mapping[str, str]) -> bytes:
    """Everything before the data, for tensors that follow each other in this order."""
    described: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for entry in entries:
        start, end = end, end + entry.nbytes
        described[entry.name] = {
            "dtype": DTYPES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(described, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # the data start at a multiple of 8, for memory maps
    return len(text).to_bytes(8, "little") + text


class Writer:
    """Writes a file's header, then its tensors in the header's order, and sums up the bytes."""

    def __init__(
        self, file: BinaryIO, entries: Iterable[Entry], metadata: Mapping[str, str]
    ) -> None:
        self._file = file
        self._due = list(reversed(list(entries)))
        self._sum = 0
        self._put(header(reversed(self._due), metadata))

    def write(self, tensor: Tensor) -> int:
        """Write the next tensor, cast to the dtype that the header says; gives its bytes."""
        entry = self._due.pop()
        assert tuple(tensor.shape) == entry.shape, entry.name
        flat = in_a_row(tensor)
        step = max(1, _PIECE // max(flat.element_size(), entry.dtype.itemsize))
        for start in range(0, flat.numel(), step):
            piece = flat[start : start + step].to(device="cpu", dtype=entry.dtype)
            self._put(piece.view(torch.uint8).numpy().data)
        return entry.nbytes

    def finish(self) -> str:
        """Check that all was written; gives the checksum of the file."""
        assert not self._due, f"{len(self._due)} tensors were not written"
        return f"{self._sum:08x}"

    def _put(self, data: bytes | memoryview) -> None:
        self._sum = zlib.crc32(data, self._sum)
        self._file.write(data)
