"""Safetensors files of whole tensors, into which every rank writes its blocks.

The first rank makes the files with their headers, so that every position in them is known before
any value is computed.
"""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

import torch
from torch import Tensor

from lateinit._checkpoint.save.manifest import ShardFile
from lateinit._checkpoint.save.safetensors_writer import header
from lateinit._distributed import Box
from lateinit.errors import ShardingError


class Place(NamedTuple):
    """The place of a whole tensor: its file, its first byte there, and its shape."""

    file: str
    start: int
    shape: tuple[int, ...]


class WholeFiles:
    """Safetensors files of whole tensors, into which every rank writes its blocks.

    Args:
        shards: the files and their tensors.
        metadata: the metadata of every file.

    Attributes:
        places: the place of each tensor, by name.
    """

    def __init__(self, shards: Iterable[ShardFile], metadata: dict[str, str]) -> None:
        self.places: dict[str, Place] = {}
        self._headers: dict[str, bytes] = {}
        self._nbytes: dict[str, int] = {}
        for shard in shards:
            tied = {alias: item.entry.name for item in shard.items for alias in item.aliases}
            entries = [item.entry for item in shard.items]
            self._headers[shard.file] = header(entries, tied | metadata)
            end = len(self._headers[shard.file])
            for entry in entries:
                self.places[entry.name] = Place(shard.file, end, entry.shape)
                end += entry.nbytes
            self._nbytes[shard.file] = end

    def make(self, folder: Path) -> None:
        """Make the files, without values."""
        for name, text in self._headers.items():
            with (folder / name).open("wb") as file:
                file.write(text)
                file.truncate(self._nbytes[name])

    def check(self, folder: Path) -> None:
        """Raise ``ShardingError`` if the rank that made the files describes other tensors."""
        for name, text in self._headers.items():
            with (folder / name).open("rb") as file:
                if file.read(len(text)) != text:
                    raise ShardingError(
                        f"{name}: the first rank would write other tensors than this one, or under "
                        "other names: build the same model on every rank"
                    )


def put_block(file: BinaryIO, place: Place, box: Box, block: Tensor) -> None:
    """Write a block at its place in the file of the whole tensor."""
    data = block.reshape(-1).view(torch.uint8).numpy().data
    size = block.element_size()
    step = _run(place.shape, box) * size
    for number, element in enumerate(_starts(place.shape, box)):
        file.seek(place.start + element * size)
        file.write(data[number * step : (number + 1) * step])


def _run(shape: tuple[int, ...], box: Box) -> int:
    """The number of elements of a box that are neighbours in a contiguous tensor: a run."""
    return math.prod(box.size[_cut(shape, box) :])


def _starts(shape: tuple[int, ...], box: Box) -> Iterator[int]:
    """The index of the element at which each run of a box starts in a contiguous tensor."""
    cut = _cut(shape, box)
    strides = [math.prod(shape[dim + 1 :]) for dim in range(len(shape))]
    rows = [range(s, s + n) for s, n in zip(box.start[:cut], box.size[:cut], strict=True)]
    for row in itertools.product(*rows, *([start] for start in box.start[cut:])):
        yield sum(map(operator.mul, row, strides))


def _cut(shape: tuple[int, ...], box: Box) -> int:
    """The last dim that a box does not span completely; all dims after it are in one run."""
    return max((dim for dim, size in enumerate(box.size) if size != shape[dim]), default=0)
