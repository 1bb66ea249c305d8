"""The interface of every checkpoint format: named tensors, read whole or one block at a time."""

from __future__ import annotations

import abc
import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import Tensor

from lateinit.errors import CorruptCheckpointError, candidates


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """The name, dtype and shape of a tensor in a checkpoint."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """The bytes of its data."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    def layout(self) -> Tensor:
        """A tensor on ``meta`` with its dtype and shape."""
        return torch.empty(self.shape, dtype=self.dtype, device="meta")


@dataclass(frozen=True, slots=True)
class StoredFile:
    """A file of a checkpoint: its size and its metadata."""

    nbytes: int
    metadata: Mapping[str, Any]


class Objects(Mapping[str, Any]):
    """Values by name, each read at its first access."""

    def __init__(self, reads: Mapping[str, Callable[[], Any]]) -> None:
        self._reads = dict(reads)
        self._found: dict[str, Any] = {}

    def __getitem__(self, name: str) -> Any:
        if name not in self._found:
            self._found[name] = self._reads[name]()
        return self._found[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._reads)

    def __len__(self) -> int:
        return len(self._reads)


class Reader(abc.ABC):
    """An open checkpoint whose structure has been checked. It knows no module.

    Attributes:
        format: the name of the format.
        path: the file or folder, for messages.
        entries: the dtype and shape of every tensor, by name.
        objects: values that are no plain tensors, such as the extra state of a module, by name.
        homes: for a tensor or an object in a nested dict of the checkpoint, the keys that lead to
            that dict, joined by dots. Its name begins with them.
        aliases: the names of tied tensors that were not written, each with the name that was.
        shared: for a tensor that shares its memory with others, the names of all of them.
        memory: the bytes of the storage of such a tensor.
        versions: the ``_metadata`` of a state dict, if the format keeps it.
        origins: for a tensor or an object that has another name in the files, its names there.
        hint: a sentence to add to a message about names that do not fit.
        under: the prefix that all names have in the files and not here.
        headers: for each file, its size and a digest of its header.
        files: every file.
    """

    format: str = ""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.entries: dict[str, StoredTensor] = {}
        self.objects: Mapping[str, Any] = {}
        self.homes: dict[str, str] = {}
        self.aliases: dict[str, str] = {}
        self.shared: dict[str, list[str]] = {}
        self.memory: dict[str, int] = {}
        self.versions: Mapping[str, Any] | None = None
        self.origins: dict[str, list[str]] = {}
        self.hint = ""
        self.under = ""
        self.headers: list[tuple[int, str]] = []
        self.files: dict[Path, StoredFile] = {}

    def __str__(self) -> str:
        return f"{self.path} (under {self.under!r})" if self.under else str(self.path)

    def note_file(
        self, path: Path, header: bytes, metadata: Mapping[str, Any] | None = None
    ) -> None:
        """Add a file to ``files``, and its header to ``headers``."""
        self.files[path] = StoredFile(size_of(path), metadata or {})
        self.headers.append((self.files[path].nbytes, hashlib.sha256(header).hexdigest()))

    def files_of(self, name: str) -> list[Path]:
        """The files that hold a tensor."""
        del name
        return list(self.files)

    def described(self) -> str:
        """A text that identifies the contents by headers and names; equal for copies of files."""
        entries = sorted((e.name, str(e.dtype), e.shape) for e in self.entries.values())
        named = [sorted(names.items()) for names in (self.aliases, self.origins)]
        told = sorted(self.headers), entries, named, sorted(self.objects)
        digest = hashlib.sha256(repr(told).encode()).hexdigest()[:12]
        nbytes = sum(size for size, _ in self.headers)
        under = f" under {self.under!r}" if self.under else ""
        return (
            f"{len(entries)} tensors{under} in {nbytes:,} bytes of files (of the digest {digest})"
        )

    def read(
        self,
        name: str,
        offsets: Sequence[int] | None = None,
        sizes: Sequence[int] | None = None,
        *,
        alone: bool = False,
    ) -> Tensor:
        """Read a tensor, or the block that starts at ``offsets`` and has the shape ``sizes``.

        The result is on the CPU. If the format allows, it is a window on a private mapping of the
        file: only touched pages are read, and writing to it never changes the file.

        Args:
            name: the tensor.
            offsets: where the block starts, by default at the first element.
            sizes: the shape of the block, by default that of the tensor.
            alone: whether to read only the bytes of the block, into memory of its own, if the
                format allows. For a mapping, the system reads much more than is touched.

        Raises:
            CorruptCheckpointError: there is no tensor of this name.
            ValueError: the block is not inside the tensor.
        """
        entry = self.entries.get(name)
        if entry is None:
            raise CorruptCheckpointError(
                f"{self.path} has no tensor {name!r}; there are: {candidates(name, self.entries)}"
            )
        begin = tuple(offsets or (0,) * len(entry.shape))
        shape = entry.shape if sizes is None else tuple(sizes)
        inside = len(begin) == len(shape) == len(entry.shape) and all(
            min(start, size) >= 0 and start + size <= length
            for start, size, length in zip(begin, shape, entry.shape, strict=True)
        )
        if not inside:
            raise ValueError(f"{name!r} is {entry.shape}: no block {shape} at {begin}")
        return self._read(name, begin, shape, alone)

    @abc.abstractmethod
    def _read(
        self, name: str, offsets: tuple[int, ...], sizes: tuple[int, ...], alone: bool
    ) -> Tensor:
        """Read a block, already checked to be inside its tensor."""


def block_of(tensor: Tensor, offsets: Sequence[int], sizes: Sequence[int]) -> Tensor:
    """A block of a tensor, as a view."""
    for dim, (start, size) in enumerate(zip(offsets, sizes, strict=True)):
        if size != tensor.shape[dim]:
            tensor = tensor.narrow(dim, start, size)
    return tensor


def size_of(path: Path) -> int:
    """The size of a file in bytes.

    Raises:
        CorruptCheckpointError: there is no such file, or it cannot be read.
    """
    try:
        with path.open("rb") as file:
            return os.fstat(file.fileno()).st_size
    except OSError as error:
        raise CorruptCheckpointError(f"{path} cannot be read: {error.strerror}") from error


def inside(folder: Path, name: object, source: str) -> Path:
    """The path of a file that a checkpoint names, which must lie in the checkpoint's own folder.

    Args:
        folder: that folder.
        name: the name in the checkpoint, which may be any object.
        source: the file that contains the name, for the message.

    Raises:
        CorruptCheckpointError: ``name`` is no file name, or leads out of the folder.
    """
    pure = PurePosixPath(name) if isinstance(name, str) else None
    bad = (
        pure is None
        or pure.is_absolute()
        or ".." in pure.parts
        or not pure.parts
        or "\0" in str(name)
        or "\\" in str(name)
    )
    if bad or pure is None:
        raise CorruptCheckpointError(
            f"{source} names the file {name!r}, which is not inside of {folder}: refused"
        )
    return folder / pure
