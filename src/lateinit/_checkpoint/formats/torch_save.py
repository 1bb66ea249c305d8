"""Read a file of ``torch.save``: mapped, and never anything but tensors and plain data."""

from __future__ import annotations

import pickle
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lateinit._checkpoint.formats.base import Reader, StoredTensor, block_of, size_of
from lateinit._checkpoint.formats.torch_zip import Records
from lateinit._torch import is_out_of_memory, is_wrapper, storage_key
from lateinit.errors import CorruptCheckpointError, listing


class TorchReader(Reader):
    """A file of ``torch.save`` that holds a state dict."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        size_of(path)
        state, header = _load(path)
        self.note_header(path, header)
        if not isinstance(state, dict) or not all(isinstance(name, str) for name in state):
            raise CorruptCheckpointError(
                f"{path} holds a {type(state).__name__}, no state dict: save model.state_dict()"
            )
        self._tensors = {name: value for name, value in state.items() if _plain(value)}
        self.objects = {k: v for k, v in state.items() if k not in self._tensors}
        if state.keys() == {"state", "param_groups"} and not self._tensors:
            raise CorruptCheckpointError(
                f"{path} holds the state of an optimizer, not of a module: "
                "give it to optimizer.load_state_dict()"
            )
        nested = [k for k, v in self.objects.items() if _is_state(v)]
        if nested and not self._tensors:
            raise CorruptCheckpointError(
                f"{path} holds a dict of {listing(self.objects)}, no state dict: save what is "
                f"under {listing(map(repr, nested))} alone, or give it to module.load_state_dict()"
            )
        self.entries = {
            name: StoredTensor(name, value.dtype, tuple(value.shape))
            for name, value in self._tensors.items()
        }
        places: dict[int, list[str]] = {}
        for name, value in self._tensors.items():
            places.setdefault(storage_key(value.untyped_storage()), []).append(name)
        self.shared = {name: names for names in places.values() for name in names if names[1:]}
        self.versions = getattr(state, "_metadata", None)

    def _read(self, name: str, offsets: tuple[int, ...], sizes: tuple[int, ...]) -> Tensor:
        return block_of(self._tensors[name].detach(), offsets, sizes)


def _load(path: Path) -> tuple[Any, bytes]:
    """What the file holds, and the directory of its records."""
    is_zip, header = starts_as_zip(path), b""
    try:
        if is_zip:
            with path.open("rb") as file:
                records = Records(file)
                records.check_lengths()
            header = repr(records.directory).encode()
        # Only the zip format, torch's since 1.6, can be mapped. `Records` has checked the places
        # that a mapping relies on.
        return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip), header
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
    """Whether a value is a tensor that dtype and shape describe."""
    return (
        isinstance(value, Tensor)
        and value.layout is torch.strided
        and not value.is_quantized
        and not value.is_meta
        and not is_wrapper(value)
    )


def _is_state(value: Any) -> bool:
    return isinstance(value, dict) and any(isinstance(item, Tensor) for item in value.values())
