"""Read a folder of ``torch.distributed.checkpoint`` (DCP), without a process group.

The ``.metadata`` of such a folder is a pickle. It is read by an unpickler that knows only the few
classes which belong there. Only the requested parts of the data are read.
"""

from __future__ import annotations

import io
import math
import pickle
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lateinit._checkpoint.formats.base import (
    Objects,
    Reader,
    StoredTensor,
    block_of,
    inside,
    size_of,
)
from lateinit._checkpoint.formats.data_file import DataFile
from lateinit._checkpoint.formats.zip_block import Part, StoredLayout, stored_layout
from lateinit.errors import CorruptCheckpointError, listing

METADATA = ".metadata"
_DCP = "torch.distributed.checkpoint"
# The edges of a tensor's blocks form a grid. The blocks of a mesh are its cells, one each.
_MOST_CELLS = 1 << 26
# The class of a path depends on the system, and its module on the Python version.
_PATHS = {"Path", "PosixPath", "PurePosixPath", "PureWindowsPath", "WindowsPath"}
# The classes that `FileSystemWriter` puts into `.metadata` (torch/distributed/checkpoint/
# metadata.py and filesystem.py), and no other.
_KNOWN = {
    f"{_DCP}.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    f"{_DCP}.filesystem": {"_StorageInfo"},
    "torch": {"Size"},
    "torch.serialization": {"_get_layout"},
    "collections": {"OrderedDict"},
    "pathlib": _PATHS,
    "pathlib._local": _PATHS,
}


class _Properties:
    """The dtype of a tensor: all that is read of its ``TensorProperties``."""

    dtype: torch.dtype

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        """Restore the state that torch/distributed/checkpoint/metadata.py writes."""
        self.dtype = state[0]


# Neither a memory format nor a layout is read; `torch.Size` has no subclasses.
_STAND_INS = {
    "Size": tuple,
    "TensorProperties": _Properties,
    "_MEM_FORMAT_ENCODING": int,
    "_get_layout": str,
}


class _Unpickler(pickle.Unpickler):
    """Makes objects of the classes that belong there, and changes nothing else.

    A pickle can set attributes of everything it names (``load_build`` in Lib/pickle.py), classes
    included. So it gets subclasses, which are dropped with the unpickler.
    """

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if name not in _KNOWN.get(module, ()):
            raise pickle.UnpicklingError(f"{module}.{name} does not belong there")
        return type(name, (_STAND_INS.get(name) or super().find_class(module, name),), {})


@dataclass(frozen=True, slots=True)
class _Bytes:
    """A range of a file."""

    file: Path
    start: int
    length: int


@dataclass(frozen=True, slots=True)
class _Block:
    """A block of a tensor: its bytes, its offsets in the tensor, and its layout in those bytes."""

    at: _Bytes
    offsets: tuple[int, ...]
    layout: StoredLayout


class DcpReader(Reader):
    """A folder that the ``FileSystemWriter`` of DCP wrote."""

    format = "torch.distributed.checkpoint"

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._files: dict[Path, DataFile] = {}
        self._blocks: dict[str, list[_Block]] = {}
        metadata = _metadata(path / METADATA)
        self.note_file(path / METADATA, (path / METADATA).read_bytes())
        try:
            self._describe(metadata)
        except CorruptCheckpointError:
            raise
        except Exception as error:  # a corrupt pickle can yield any object
            raise CorruptCheckpointError(
                f"{path / METADATA} describes no checkpoint: {type(error).__name__}: {error}"
            ) from error

    def _describe(self, metadata: Any) -> None:
        stored = metadata.storage_data.items()
        places = {(i.fqn, None if i.offset is None else tuple(i.offset)): at for i, at in stored}
        objects: dict[str, Callable[[], Any]] = {}
        for name, about in metadata.state_dict_metadata.items():
            if not hasattr(about, "chunks"):
                at = self._place(name, places.get((name, None)))
                objects[name] = partial(self._object, at)
                continue
            self.entries[name] = StoredTensor(name, about.properties.dtype, tuple(about.size))
            self._blocks[name] = [
                self._block(name, places.get((name, tuple(chunk.offsets))), chunk)
                for chunk in about.chunks
            ]
            self._check_cover(name)
        self._join(metadata.planner_data or {}, objects)
        self.objects = Objects(objects)

    def _place(self, name: str, place: Any) -> _Bytes:
        """Check the place of a block, and open its file."""
        if place is None:
            raise CorruptCheckpointError(f"{self.path} does not say where {name!r} is")
        if getattr(place, "transform_descriptors", None):
            raise CorruptCheckpointError(
                f"{self.path}: {name!r} was written with {listing(place.transform_descriptors)}; "
                "only plain blocks are read: write it without extensions"
            )
        file = inside(self.path, place.relative_path, METADATA)
        start, length, size = int(place.offset), int(place.length), size_of(file)
        if start < 0 or length <= 0 or start + length > size:
            raise CorruptCheckpointError(
                f"{file} has {size:,} bytes, but {name!r} is at {start:,} to {start + length:,}: "
                "it is truncated; fetch or write it again"
            )
        if file not in self._files:
            self._files[file] = DataFile(file)
            self.note_file(file, b"")
        return _Bytes(file, start, length)

    def _block(self, name: str, place: Any, chunk: Any) -> _Block:
        """Check a block of a tensor, except for its data."""
        at, entry = self._place(name, place), self.entries[name]
        offsets, sizes = tuple(chunk.offsets), tuple(chunk.sizes)
        fits = len(sizes) == len(offsets) == len(entry.shape) and all(
            o >= 0 and s >= 0 and o + s <= n
            for o, s, n in zip(offsets, sizes, entry.shape, strict=True)
        )
        if not fits:
            raise CorruptCheckpointError(
                f"{self.path}: the block {sizes} at {offsets} of {name!r} is not in {entry.shape}"
            )
        try:
            layout = stored_layout(self._part(at))
        except ValueError as error:
            raise CorruptCheckpointError(
                f"{at.file}: the block of {name!r} at byte {at.start:,} is corrupt: {error}"
            ) from error
        if (layout.dtype, layout.size) != (entry.dtype, sizes):
            raise CorruptCheckpointError(
                f"{at.file}: the block of {name!r} at byte {at.start:,} is {layout.dtype} "
                f"{layout.size}, not {entry.dtype} {sizes}"
            )
        return _Block(at, offsets, layout)

    def _part(self, at: _Bytes) -> Part:
        return Part(self._files[at.file], at.start, at.length)

    def _check_cover(self, name: str) -> None:
        """Check that every element of a tensor is in one of its blocks."""
        spans = [
            [(o, o + n) for o, n in zip(block.offsets, block.layout.size, strict=True)]
            for block in self._blocks[name]
        ]
        # Between two neighbouring edges of blocks, one element stands for all.
        edges = [
            sorted({0, size, *(edge for block in spans for edge in block[dim])})
            for dim, size in enumerate(self.entries[name].shape)
        ]
        cells = [len(cuts) - 1 for cuts in edges]
        if math.prod(cells) > _MOST_CELLS:
            raise CorruptCheckpointError(
                f"{self.path} says that {name!r} is in {len(spans):,} blocks that form no grid"
            )
        covered = torch.zeros(cells, dtype=torch.bool, device="cpu")
        for block in spans:
            within = zip(edges, block, strict=True)
            covered[
                tuple(slice(bisect_left(cuts, a), bisect_left(cuts, b)) for cuts, (a, b) in within)
            ] = True
        if not covered.all():
            places = covered.logical_not().nonzero()[0].tolist()
            first = tuple(cuts[place] for cuts, place in zip(edges, places, strict=True))
            raise CorruptCheckpointError(
                f"{self.path} has no block with the element {first} of {name!r}"
            )

    def _object(self, at: _Bytes) -> Any:
        try:
            return torch.load(
                io.BytesIO(self._part(at).read()), map_location="cpu", weights_only=True
            )
        except Exception as error:
            raise CorruptCheckpointError(
                f"{at.file}: at byte {at.start:,} is more than tensors and plain data, so "
                f"it is not unpickled, or it is corrupt: {str(error).partition(chr(10))[0]}"
            ) from error

    def _join(self, paths: dict[str, Any], objects: dict[str, Callable[[], Any]]) -> None:
        """Find the dicts that tensors and objects were in; put extra states back together.

        DCP flattens nested dicts and lists when it writes (``flatten_state_dict``), and keeps the
        path of each leaf in ``planner_data``.
        """
        extra: dict[tuple[Any, ...], list[tuple[tuple[Any, ...], Callable[[], Any]]]] = {}
        for name, path in paths.items():
            if not isinstance(path, tuple) or name != _dotted(path):
                continue
            depth = next((i for i, key in enumerate(path, 1) if _is_extra(key)), len(path))
            if depth < len(path):
                read = objects.pop(name, None) or partial(self._copied, name, self.entries[name])
                self.entries.pop(name, None)
                extra.setdefault(path[:depth], []).append((path[depth:], read))
            if depth > 1:
                self.homes[_dotted(path[:depth])] = _dotted(path[: depth - 1])
        objects |= {_dotted(path): partial(_joined, leaves) for path, leaves in extra.items()}

    def _copied(self, name: str, entry: StoredTensor) -> Tensor:
        return self._read(name, (0,) * len(entry.shape), entry.shape, alone=True)

    def files_of(self, name: str) -> list[Path]:
        return list(dict.fromkeys(block.at.file for block in self._blocks[name]))

    def _read(
        self, name: str, offsets: tuple[int, ...], sizes: tuple[int, ...], alone: bool
    ) -> Tensor:
        blocks = self._blocks[name]
        if len(blocks) == 1 and not alone:
            return self._mapped(blocks[0], offsets, sizes)
        if len(blocks) == 1:
            return self._alone(blocks[0], offsets, sizes)
        result = torch.empty(sizes, dtype=self._blocks[name][0].layout.dtype, device="cpu")
        for part in blocks:
            start = [max(a, b) for a, b in zip(offsets, part.offsets, strict=True)]
            ends = [
                min(a + n, b + m) - s
                for a, n, b, m, s in zip(
                    offsets, sizes, part.offsets, part.layout.size, start, strict=True
                )
            ]
            if min(ends, default=1) > 0:
                there = [s - o for s, o in zip(start, part.offsets, strict=True)]
                here = [s - o for s, o in zip(start, offsets, strict=True)]
                block_of(result, here, ends).copy_(self._alone(part, there, ends))
        return result

    def _mapped(self, part: _Block, offsets: Sequence[int], sizes: Sequence[int]) -> Tensor:
        layout = part.layout
        whole = StoredTensor("", layout.dtype, (layout.numel,))
        data = self._files[part.at.file].mapped(part.at.start + layout.start, whole)
        return block_of(data.as_strided(layout.size, layout.stride, layout.offset), offsets, sizes)

    def _alone(self, part: _Block, offsets: Sequence[int], sizes: Sequence[int]) -> Tensor:
        layout = part.layout
        shape = torch.empty(layout.numel, dtype=layout.dtype, device="meta")
        whole = shape.as_strided(layout.size, layout.stride, layout.offset)
        window = block_of(whole, offsets, sizes)
        return self._files[part.at.file].read(part.at.start + layout.start, window)


def _metadata(path: Path) -> Any:
    size_of(path)
    try:
        return _Unpickler(io.BytesIO(path.read_bytes())).load()
    except Exception as error:  # a corrupt pickle fails in any way
        raise CorruptCheckpointError(
            f"{path} is not what torch.distributed.checkpoint writes, so it is not unpickled: "
            f"{str(error) or type(error).__name__}"
        ) from error


def _dotted(path: Sequence[Any]) -> str:
    return ".".join(map(str, path))


def _is_extra(key: Any) -> bool:
    return isinstance(key, str) and key.endswith("_extra_state")


def _joined(leaves: list[tuple[tuple[Any, ...], Callable[[], Any]]]) -> Any:
    """An extra state from its leaves, each at the end of a path."""
    found: dict[Any, Any] = {}
    for path, read in leaves:
        _put(found, path, read())
    return _with_lists(found)


def _put(target: dict[Any, Any], path: tuple[Any, ...], value: Any) -> None:
    for key in path[:-1]:
        target = target.setdefault(key, {})
    target[path[-1]] = value


def _with_lists(value: Any) -> Any:
    """Turn dicts whose keys are 0, 1, 2, ... back into the lists that they were."""
    if not isinstance(value, dict):
        return value
    inner = {key: _with_lists(item) for key, item in value.items()}
    if inner and list(inner) == list(range(len(inner))):
        return list(inner.values())
    return inner
