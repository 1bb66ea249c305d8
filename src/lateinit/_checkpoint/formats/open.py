"""Open a checkpoint of any format: one file, or a folder of shards with their index."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from lateinit._checkpoint.formats.base import Reader, inside, size_of
from lateinit._checkpoint.formats.dcp import METADATA, DcpReader
from lateinit._checkpoint.formats.safetensors import SafetensorsReader
from lateinit._checkpoint.formats.torch_save import TorchReader, starts_as_zip
from lateinit.errors import CorruptCheckpointError, listing

# The first line of the text file that replaces a large file in a clone without Git LFS.
_POINTER = b"version https://git-lfs"
_TORCH = (".pt", ".pth", ".bin", ".ckpt")
_INDEX = ".index.json"
# `model-00002-of-00003.safetensors`. A name that ends in `-of-00001` is a whole checkpoint.
_SHARD = re.compile(r"(-\d+-of-(?!0*1\.)\d+)(\.[a-z]+)$")


def open_checkpoint(path: Path) -> Reader:
    """Open a checkpoint, and check the structure of all of its files.

    Args:
        path: a file, an index of shards, or a folder.

    Raises:
        CorruptCheckpointError: this is no checkpoint, or a part of it is missing, truncated or
            corrupt.
    """
    try:
        if path.is_dir():
            return _open_folder(path)
        exists = path.exists()
    except OSError as error:
        raise CorruptCheckpointError(f"{path} cannot be read: {error.strerror}") from error
    if not exists:
        raise CorruptCheckpointError(
            f"{path} does not exist: a file or folder of weights is meant (nothing is downloaded)"
        )
    if path.name.endswith(_INDEX):
        return _Sharded(path)
    return _open_file(path)


def _open_file(path: Path) -> Reader:
    size_of(path)
    if _is_pointer(path):
        raise CorruptCheckpointError(
            f"{path} is a pointer of Git LFS, not the file itself: `git lfs pull` fetches that"
        )
    if path.suffix == ".safetensors":
        return SafetensorsReader(path)
    if path.suffix in _TORCH or starts_as_zip(path):
        return TorchReader(path)
    raise CorruptCheckpointError(
        f"{path} is no checkpoint: a .safetensors, .pt, .pth or .bin file is meant, or a folder"
    )


def _is_pointer(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(len(_POINTER)) == _POINTER


def _open_folder(path: Path) -> Reader:
    if (path / METADATA).is_file():
        return DcpReader(path)
    for pattern, opened in _KINDS:
        found = sorted(path.glob(pattern))
        shards = [file.name for file in found if _SHARD.search(file.name)]
        if shards:
            index = _SHARD.sub(rf"\2{_INDEX}", shards[0])
            raise CorruptCheckpointError(
                f"{path} has no index of its shards, {listing(shards)}: fetch {index}"
            )
        if len(found) > 1:
            names = listing(file.name for file in found)
            raise CorruptCheckpointError(f"{path} has several checkpoints: name one of {names}")
        if found:
            return opened(found[0])
    names = listing(sorted(file.name for file in path.iterdir())) or "nothing"
    raise CorruptCheckpointError(
        f"{path} is no checkpoint: it has no index, no .safetensors, no pytorch_model.bin and no "
        f"{METADATA}, but {names}"
    )


class _Sharded(Reader):
    """Shard files, with an index that maps each tensor to its file."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        places, metadata = _index(path)
        names = sorted(set(places.values()))
        files = {name: inside(path.parent, name, str(path)) for name in names}
        gone = [name for name, file in files.items() if not file.is_file()]
        if gone:
            raise CorruptCheckpointError(
                f"{path} names {listing(gone)}: missing; fetch what is missing"
            )
        shards = {name: _open_file(file) for name, file in files.items()}
        self.format = "shards of " + listing(sorted({s.format for s in shards.values()}))
        lacking = [name for name, file in places.items() if name not in shards[file].entries]
        if lacking:
            wrong = listing(sorted({places[name] for name in lacking}))
            raise CorruptCheckpointError(
                f"{path} says that {listing(lacking)} would be in {wrong}, which it is not"
            )
        self.note_file(path, path.read_bytes(), metadata)
        for shard in shards.values():
            self.headers += shard.headers
            self.files |= shard.files
            self.aliases |= shard.aliases
            self.objects = {**self.objects, **shard.objects}
        # In the order of the files. Tensors that the index leaves out are included.
        found = {name: shard for shard in shards.values() for name in shard.entries}
        self._shards = found | {name: shards[file] for name, file in places.items()}
        self.shared = {n: s.shared[n] for n, s in self._shards.items() if n in s.shared}
        self.memory = {n: self._shards[n].memory[n] for n in self.shared}
        self.entries = {name: shard.entries[name] for name, shard in self._shards.items()}
        self.aliases = {k: v for k, v in self.aliases.items() if k not in self.entries}

    def files_of(self, name: str) -> list[Path]:
        return self._shards[name].files_of(name)

    def _read(
        self, name: str, offsets: tuple[int, ...], sizes: tuple[int, ...], alone: bool
    ) -> Tensor:
        return self._shards[name].read(name, offsets, sizes, alone=alone)


def _index(path: Path) -> tuple[dict[str, str], dict[str, Any]]:
    """The file of each tensor, and the metadata of the index."""
    size_of(path)
    try:
        index = json.loads(path.read_bytes())
        places = index["weight_map"]
        if not all(isinstance(item, str) for pair in places.items() for item in pair):
            raise ValueError("its weight_map holds values that are no strings")  # noqa: TRY301
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CorruptCheckpointError(
            f"{path} is no index of shards: {type(error).__name__}: {error}"
        ) from error
    metadata = index.get("metadata")
    return places, metadata if isinstance(metadata, dict) else {}


_KINDS: tuple[tuple[str, Callable[[Path], Reader]], ...] = (
    (f"*.safetensors{_INDEX}", _Sharded),
    ("*.safetensors", _open_file),
    (f"*.bin{_INDEX}", _Sharded),
    ("pytorch_model.bin", _open_file),
    ("*.pt", _open_file),
    ("*.pth", _open_file),
)
