"""The records of a zip file of ``torch.save``, checked without reading tensor data.

Python's ``zipfile`` reads the directory at the end of the file. torch maps data at the position
given by each record's own header, so both are compared here.
"""

from __future__ import annotations

import io
import pickle
import struct
import zipfile
import zlib
from typing import IO, Any

import torch

# A local file header up to its name: signature, (skipped), the lengths of name and extra field.
_HEADER = struct.Struct("<4s22xHH")
_SIGNATURE = b"PK\x03\x04"

STORAGES = {
    ("torch", f"{name}Storage"): dtype
    for name, dtype in {
        "BFloat16": torch.bfloat16,
        "Bool": torch.bool,
        "Byte": torch.uint8,
        "Char": torch.int8,
        "ComplexDouble": torch.complex128,
        "ComplexFloat": torch.complex64,
        "Double": torch.float64,
        "Float": torch.float32,
        "Half": torch.float16,
        "Int": torch.int32,
        "Long": torch.int64,
        "Short": torch.int16,
    }.items()
} | {("torch.storage", "UntypedStorage"): torch.uint8}
"""The classes of storages that a pickle names, with their dtypes."""


class Records:
    """The position of each record. Records that are not tensor data are checked by checksum.

    Attributes:
        directory: the name, the checksum and the length of each record.

    Raises:
        ValueError: the file is no whole file of ``torch.save``.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        try:
            found = zipfile.ZipFile(file).infolist()
        except (zipfile.BadZipFile, NotImplementedError, OSError, EOFError, struct.error) as error:
            raise ValueError(str(error) or "it has no directory of its records") from error
        self._places: dict[str, tuple[int, int]] = {}
        self.directory: list[tuple[str, int, int]] = []
        tops = {info.filename.partition("/")[0] for info in found}
        for info in found:
            name = info.filename.partition("/")[2]
            start = self._start(info)
            file.seek(start + info.file_size)
            # After a record's data comes another signature, which begins with PK too: of a data
            # descriptor, of the next record or of the directory.
            stored = info.compress_type == zipfile.ZIP_STORED and file.read(2) == b"PK"
            if not stored or len(tops) != 1 or name in self._places:
                raise ValueError(f"its record {info.filename!r} is damaged")
            self._places[name] = start, info.file_size
            self.directory.append((name, info.CRC, info.file_size))
            # A checksum of zero was not computed: torch.serialization.set_crc32_options.
            if (
                info.CRC
                and not name.startswith("data/")
                and zlib.crc32(self.read(name)) != info.CRC
            ):
                raise ValueError(f"its record {info.filename!r} is damaged")

    def _start(self, info: zipfile.ZipInfo) -> int:
        """The first byte of a record's data, if its own header agrees with the directory."""
        self._file.seek(info.header_offset)
        header = self._file.read(_HEADER.size)
        if len(header) < _HEADER.size:
            raise ValueError(f"its record {info.filename!r} is cut off")
        signature, name, extra = _HEADER.unpack(header)
        if signature != _SIGNATURE or self._file.read(name) != info.filename.encode():
            raise ValueError(f"its record {info.filename!r} is not where its directory says")
        return info.header_offset + _HEADER.size + int(name) + int(extra)

    def __contains__(self, name: str) -> bool:
        return name in self._places

    def place(self, name: str) -> tuple[int, int]:
        """The first byte of a record's data, and its length."""
        if name not in self._places:
            raise ValueError(f"it has no record {name!r}")
        return self._places[name]

    def starts(self) -> set[int]:
        """The first byte of each record."""
        return {start for start, _ in self._places.values()}

    def read(self, name: str) -> bytes:
        start, length = self.place(name)
        self._file.seek(start)
        return self._file.read(length)

    def check_lengths(self) -> None:
        """Compare the length of each data record with the storage described in the pickle.

        ``torch.load`` does so too, unless it maps the file (torch/serialization.py, ``mmap=True``).

        Raises:
            ValueError: a record has another length.
        """
        storages = _Storages(io.BytesIO(self.read("data.pkl")))
        storages.load()
        for key, nbytes in storages.nbytes.items():
            _, length = self.place(f"data/{key}")
            if length != nbytes:
                raise ValueError(f"its record 'data/{key}' has {length} bytes in place of {nbytes}")


class _Storages(pickle.Unpickler):
    """Notes the sizes of the storages in a pickle; makes nothing, and runs no code of the file."""

    def __init__(self, file: IO[bytes]) -> None:
        super().__init__(file)
        self.nbytes: dict[str, int] = {}

    def persistent_load(self, saved: Any) -> None:
        _, dtype, key, _, numel = saved
        if isinstance(dtype, torch.dtype):
            self.nbytes[str(key)] = numel * dtype.itemsize

    def find_class(self, module: str, name: str) -> Any:
        return STORAGES.get((module, name), _Ignored)


class _Ignored:
    """Stands in for every object in a pickle but containers, numbers and strings."""

    def __init__(self, *_: Any) -> None: ...
    def __setstate__(self, state: Any) -> None: ...
    def __setitem__(self, key: Any, value: Any) -> None: ...
    def append(self, item: Any) -> None:
        """As of a list."""

    def extend(self, items: Any) -> None:
        """As of a list."""

    def add(self, item: Any) -> None:
        """As of a set."""
