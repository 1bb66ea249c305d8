"""Read a file of ``torch.save``: mapped, and restricted to tensors and plain data."""

from __future__ import annotations

import pickle
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lateinit._checkpoint.formats.base import Reader, StoredTensor, block_of, size_of
from lateinit._checkpoint.formats.data_file import DataFile
from lateinit._checkpoint.formats.foreign_classes import without_foreign_classes
from lateinit._checkpoint.formats.torch_zip import Records
from lateinit._torch import is_out_of_memory, is_wrapper, storage_key
from lateinit.errors import CorruptCheckpointError, MismatchError


class TorchReader(Reader):
    """A file of ``torch.save`` that holds a state dict, or nested dicts with several."""

    format = "torch.save"

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        size_of(path)
        self._file = DataFile(path)
        self._mapped: int | None = None  # the address of the mapped file
        state, header, self._starts = _load(path)
        self.note_file(path, header)
        named = isinstance(state, dict) and all(isinstance(name, str) for name in state)
        if not named and not _holds_dict(state):
            raise CorruptCheckpointError(
                f"{path} holds a {type(state).__name__}, no state dict: save model.state_dict()"
            )
        if isinstance(state, dict) and state.keys() == {"state", "param_groups"}:
            raise MismatchError(
                f"{path} holds the state of an optimizer, not of a module: "
                "give it to optimizer.load_state_dict()"
            )
        self._tensors: dict[str, Tensor] = {}
        self._others: dict[str, Any] = {}
        versions: dict[str, Any] = {}
        self._flatten(state, "", versions)
        self.objects, self.versions = self._others, versions or None
        self.entries = {
            name: StoredTensor(name, value.dtype, tuple(value.shape))
            for name, value in self._tensors.items()
        }
        places: dict[int, list[str]] = {}
        for name, value in self._tensors.items():
            places.setdefault(storage_key(value.untyped_storage()), []).append(name)
        self.shared = {name: names for names in places.values() for name in names if names[1:]}
        self.memory = {name: self._tensors[name].untyped_storage().nbytes() for name in self.shared}

    def _flatten(self, state: Any, home: str, versions: dict[str, Any]) -> None:
        """Collect the tensors of a dict or list, and of the dicts and lists inside it."""
        for path, version in (getattr(state, "_metadata", None) or {}).items():
            versions[".".join(filter(None, (home, path)))] = version
        for key, value in state.items() if isinstance(state, dict) else enumerate(state):
            name = f"{home}.{key}" if home else str(key)
            if name in self._tensors or name in self._others:
                raise CorruptCheckpointError(f"{self.path} has two values for {name!r}")
            # An extra state is a single value of a module, even if it holds tensors.
            if _holds_tensor(value) and not name.endswith("_extra_state"):
                self._flatten(value, name, versions)
                continue
            (self._tensors if _plain(value) else self._others)[name] = value
            if home:
                self.homes[name] = home

    def _read(
        self, name: str, offsets: tuple[int, ...], sizes: tuple[int, ...], alone: bool
    ) -> Tensor:
        block = block_of(self._tensors[name].detach(), offsets, sizes)
        start = self._place(block) if alone else None
        return block if start is None else self._file.read(start, block)

    def _place(self, tensor: Tensor) -> int | None:
        """The first byte of a tensor's storage in the file; None if it is not known."""
        address = tensor.untyped_storage().data_ptr()
        if self._mapped is None:
            start = self._file.place_of(address)
            self._mapped = None if start is None else address - start
        # torch maps the file in one piece.
        start = None if self._mapped is None else address - self._mapped
        return start if start in self._starts else None


def _load(path: Path) -> tuple[Any, bytes, set[int]]:
    """The unpickled contents, the directory of the records, and the first byte of each record."""
    is_zip, header, starts = starts_as_zip(path), b"", set[int]()
    try:
        if is_zip:
            with path.open("rb") as file:
                records = Records(file)
                records.check_lengths()
            header, starts = repr(records.directory).encode(), records.starts()
        # Only the zip format, torch's since 1.6, can be mapped. `Records` has checked the positions
        # that a mapping relies on.
        found = _unpickled(path, is_zip=is_zip)
    except pickle.UnpicklingError as error:
        raise CorruptCheckpointError(
            f"{path} is a pickle of more than tensors and plain data, or a corrupt one. It could "
            "run any code, so it is not unpickled: save model.state_dict() in its place. "
            f"({_reason(error)})"
        ) from error
    except Exception as error:  # a corrupt pickle fails in any way
        if is_out_of_memory(error):
            raise
        raise CorruptCheckpointError(
            f"{path} is no whole file of torch.save: {_first_line(error)}; fetch or write it again"
        ) from error
    return found, header, starts


def _unpickled(path: Path, *, is_zip: bool) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except pickle.UnpicklingError:
        found = without_foreign_classes(path) if is_zip else None
        if not _holds_tensor([found]):
            raise
        return found


def starts_as_zip(path: Path) -> bool:
    """Whether a file starts with the signature of a zip file."""
    with path.open("rb") as file:
        return file.read(4) == b"PK\x03\x04"


def _reason(error: Exception) -> str:
    """The reason that torch gives, without its advice to unpickle the file without a check."""
    found = re.search(r"WeightsUnpickler error: (.+?)(?:\. |\n|$)", str(error))
    return found.group(1) if found else "torch.load(weights_only=True) refuses it"


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def _plain(value: Any) -> bool:
    """Whether a value is a tensor that is fully described by dtype and shape."""
    return (
        isinstance(value, Tensor)
        and value.layout is torch.strided
        and not value.is_nested
        and not value.is_quantized
        and not value.is_meta
        and not is_wrapper(value)
    )


def _holds_dict(value: Any) -> bool:
    """Whether a value is a list that contains a dict with tensors."""
    return isinstance(value, (list, tuple)) and any(
        isinstance(item, dict) and _holds_tensor(item) for item in value
    )


def _holds_tensor(value: Any) -> bool:
    """Whether a value is a dict or list that contains a tensor, at any depth."""
    if isinstance(value, dict):
        value = list(value.values())
    return type(value) in (list, tuple) and any(
        isinstance(item, Tensor) or _holds_tensor(item) for item in value
    )
