"""What every checkpoint format offers: named tensors, read whole or one window at a time."""

from __future__ import annotations

import abc
import mmap
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import Tensor

from lateinit.errors import CorruptCheckpointError, candidates

_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0)  # only what is written needs memory of its own


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor as a file holds it."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """The bytes of its data."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


class Reader(abc.ABC):
    """An open checkpoint whose structure has been checked; knows of no module.

    Attributes:
        path: the file or folder, for messages.
        entries: dtype and shape of every tensor, by name.
        objects: what is no plain tensor, by name, such as the extra state of a module.
        aliases: names of tied tensors that were left out, with the name that was kept.
        shared: of tensors that have memory in common, all names of it, by name.
        versions: the ``_metadata`` of a state dict, where a format keeps it.
        origins: names in the files, by name, of what has another name there.
        hint: what to say beside names that do not fit.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.entries: dict[str, StoredTensor] = {}
        self.objects: dict[str, Any] = {}
        self.aliases: dict[str, str] = {}
        self.shared: dict[str, list[str]] = {}
        self.versions: Mapping[str, Any] | None = None
        self.origins: dict[str, list[str]] = {}
        self.hint = ""

    def read(
        self,
        name: str,
        offsets: Sequence[int] | None = None,
        sizes: Sequence[int] | None = None,
    ) -> Tensor:
        """A tensor, or the block of it that starts at ``offsets`` and has the shape ``sizes``.

        On the CPU; where the format allows, a window on the file, mapped so that writing to it
        never changes the file and that only what is touched is read.
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
        return self._read(name, begin, shape)

    @abc.abstractmethod
    def _read(self, name: str, offsets: tuple[int, ...], sizes: tuple[int, ...]) -> Tensor:
        """A block that is known to lie inside its tensor."""


def block_of(tensor: Tensor, offsets: Sequence[int], sizes: Sequence[int]) -> Tensor:
    """The block of a tensor, without a copy."""
    for dim, (start, size) in enumerate(zip(offsets, sizes, strict=True)):
        if size != tensor.shape[dim]:
            tensor = tensor.narrow(dim, start, size)
    return tensor


def mapped(path: Path) -> mmap.mmap:
    """A file in memory, copied where it is written to: the file itself is never changed."""
    with path.open("rb") as file:
        if hasattr(mmap, "MAP_PRIVATE"):
            flags, access = mmap.MAP_PRIVATE | _NORESERVE, mmap.PROT_READ | mmap.PROT_WRITE
            return mmap.mmap(file.fileno(), 0, flags=flags, prot=access)
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)


def tensor_at(data: mmap.mmap, start: int, entry: StoredTensor) -> Tensor:
    """A tensor that starts at a byte of a mapped file; copied if that is no place for its dtype."""
    if not entry.nbytes:
        return torch.empty(entry.shape, dtype=entry.dtype, device="cpu")
    if start % entry.dtype.itemsize:
        raw = torch.frombuffer(data, dtype=torch.uint8, count=entry.nbytes, offset=start)
        return raw.clone().view(entry.dtype).view(entry.shape)
    count = entry.nbytes // entry.dtype.itemsize
    return torch.frombuffer(data, dtype=entry.dtype, count=count, offset=start).view(entry.shape)


def size_of(path: Path) -> int:
    """The bytes of a file.

    Raises:
        CorruptCheckpointError: there is none, or it cannot be read.
    """
    try:
        with path.open("rb") as file:
            return os.fstat(file.fileno()).st_size
    except OSError as error:
        raise CorruptCheckpointError(f"{path} cannot be read: {error.strerror}") from error


def inside(folder: Path, name: object, source: str) -> Path:
    """The place of a file that a checkpoint names, which must lie in its own folder.

    Raises:
        CorruptCheckpointError: the name leads out of the folder.
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
