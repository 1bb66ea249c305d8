"""Read a safetensors file: its header and lengths are checked, its data are mapped.

``DTYPES`` holds the dtypes that the format and torch have in common.
"""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lateinit._checkpoint.formats.base import Reader, StoredTensor, block_of, size_of
from lateinit._checkpoint.formats.data_file import DataFile
from lateinit.errors import CorruptCheckpointError

DTYPES = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e4m3fnuz: "F8_E4M3FNUZ",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e5m2fnuz: "F8_E5M2FNUZ",
    torch.float8_e8m0fnu: "F8_E8M0",
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
OWN_KEYS = ("format", "lateinit", "seed", "torch")
"""Keys of the metadata that name no tied tensor; ``transformers`` requires ``format``."""
RESERVED = "__metadata__"
"""The name in a header under which the metadata are."""
# The limit of the safetensors library (MAX_HEADER_SIZE in its tensor.rs). A file's first 8 bytes
# give the length of the header; this bounds the bytes that a corrupt length can cause to be read.
_LONGEST_HEADER = 100_000_000
_BY_CODE = {code: dtype for dtype, code in DTYPES.items()}


class SafetensorsReader(Reader):
    """One safetensors file, mapped into memory."""

    format = "safetensors"

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        size = size_of(path)
        self._starts: dict[str, int] = {}
        try:
            base, text = _header(path, size)
            described = _parsed(text)
            metadata = _metadata(described)
            self._place(base, size, described)
        except ValueError as error:
            raise CorruptCheckpointError(
                f"{path} is no whole safetensors file: {error}; fetch or write it again"
            ) from error
        self.aliases = {
            name: kept
            for name, kept in metadata.items()
            if kept in self.entries and name not in (*self.entries, *OWN_KEYS)
        }
        own = {key: value for key, value in metadata.items() if key not in self.aliases}
        self.note_file(path, text, own)
        self._file = DataFile(path)

    def _place(self, base: int, size: int, described: dict[str, Any]) -> None:
        """Check that the tensors fill the data part of the file, without gaps or overlaps."""
        spans = []
        for name, value in described.items():
            entry, start, end = _entry(name, value)
            spans.append((start, end, name))
            self.entries[name] = entry
            self._starts[name] = base + start
        spans.sort()
        for (_, end, name), (start, _, other) in pairwise([(0, 0, "the header"), *spans]):
            if start != end:
                raise ValueError(f"{other!r} starts at byte {start}, but {name!r} ends at {end}")
        end = spans[-1][1] if spans else 0
        if base + end != size:
            raise ValueError(f"it has {size:,} bytes, but its header describes {base + end:,}")

    def _read(
        self, name: str, offsets: tuple[int, ...], sizes: tuple[int, ...], alone: bool
    ) -> Tensor:
        start, entry = self._starts[name], self.entries[name]
        if alone:
            return self._file.read(start, block_of(entry.layout(), offsets, sizes))
        return block_of(self._file.mapped(start, entry), offsets, sizes)


def _header(path: Path, size: int) -> tuple[int, bytes]:
    """The position of the data, and the header."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8:
            raise ValueError(f"it has {size} bytes")
        if length > min(size - 8, _LONGEST_HEADER):
            raise ValueError(f"its header would take {length:,} bytes of {size:,}")
        return 8 + length, file.read(length)


def _parsed(text: bytes) -> dict[str, Any]:
    try:
        described = json.loads(text, object_pairs_hook=_once)
    except RecursionError as error:
        raise ValueError("its header is nested without end") from error
    if not isinstance(described, dict):
        raise ValueError("its header is no JSON object")  # noqa: TRY004 - of the file's
    return described


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("its header has a name twice")
    return found


def _metadata(described: dict[str, Any]) -> dict[str, str]:
    found = described.pop(RESERVED, {})
    if not isinstance(found, dict) or not all(isinstance(value, str) for value in found.values()):
        raise ValueError("its __metadata__ holds values that are no strings")
    return found


def _entry(name: str, value: Any) -> tuple[StoredTensor, int, int]:
    """The tensor that the header describes, with the first byte of its data and the one after."""
    if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"its header has no dtype, shape and place of {name!r}")
    code, shape, place = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(code, str) or code not in _BY_CODE:
        raise ValueError(f"{name!r} has the dtype {code!r}, which torch has not")
    if not _sizes(shape) or not _sizes(place) or len(place) != 2:
        raise ValueError(f"{name!r} has the shape {shape} and the place {place}")
    entry = StoredTensor(name, _BY_CODE[code], tuple(shape))
    start, end = place
    nbytes = _numel(shape) * entry.dtype.itemsize
    if end - start != nbytes:
        raise ValueError(f"{name!r} takes {end - start:,} bytes, but its shape asks for {nbytes:,}")
    return entry, start, end


def _sizes(value: Any) -> bool:
    """Whether this is a list of sizes within torch's range: signed 64 bits."""
    return isinstance(value, list) and all(
        isinstance(n, int) and not isinstance(n, bool) and 0 <= n < 1 << 62 for n in value
    )


def _numel(shape: list[int]) -> int:
    count = 1
    for length in shape:
        count *= length
    return count
