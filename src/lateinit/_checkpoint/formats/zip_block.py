"""A tensor in a ``torch.save`` file that is itself a part of a larger file, as in DCP folders.

The pickle is read by an unpickler that knows tensors only, to find the position of the data. The
data themselves are not read.
"""

from __future__ import annotations

import io
import pickle
from collections import OrderedDict
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from lateinit._checkpoint.formats.data_file import DataFile
from lateinit._checkpoint.formats.torch_zip import STORAGES, Records
from lateinit._torch import REBUILD_PARAMETER, REBUILD_TENSOR, REBUILD_TENSOR_WITH_DTYPE


class Part(io.RawIOBase):
    """A range of a file, as a read-only file."""

    def __init__(self, file: DataFile, start: int, length: int) -> None:
        self._file, self._start, self._length = file, start, length
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        base = (0, self._at, self._length)[whence]
        if base + offset < 0:
            raise OSError("seek before the start")
        self._at = base + offset
        return self._at

    def readinto(self, buffer: Any) -> int:
        count = max(0, min(len(buffer), self._length - self._at))
        self._file.read_bytes(self._start + self._at, memoryview(buffer)[:count])
        self._at += count
        return count

    def tell(self) -> int:
        return self._at


@dataclass(frozen=True, slots=True)
class StoredLayout:
    """The layout of a tensor in its part of the file.

    Attributes:
        start: the first byte of its storage.
        numel: the elements of its storage.
        dtype: the dtype.
        offset: the element of the storage at which the tensor starts.
        size: its shape.
        stride: its strides, in elements.
    """

    start: int
    numel: int
    dtype: torch.dtype
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


def stored_layout(part: Part) -> StoredLayout:
    """Find the one tensor of a file.

    Raises:
        ValueError: the part is no whole file with one plain tensor.
    """
    try:
        return _layout_of(Records(io.BufferedReader(part)))
    except pickle.UnpicklingError as error:
        raise ValueError(str(error)) from error
    except Exception as error:  # a corrupt pickle fails in any way
        raise ValueError(f"{type(error).__name__}: {error}") from error


def _layout_of(records: Records) -> StoredLayout:
    found = _Unpickler(io.BytesIO(records.read("data.pkl"))).load()
    if not isinstance(found, _Tensor):
        raise pickle.UnpicklingError(f"a {type(found).__name__}, no tensor")
    if "byteorder" in records and records.read("byteorder") != b"little":
        raise pickle.UnpicklingError("big-endian data")
    start, length = records.place(f"data/{found.storage.key}")
    itemsize = found.storage.dtype.itemsize
    if length != found.storage.numel * itemsize:
        raise pickle.UnpicklingError("its data have another length")
    layout = StoredLayout(
        start, found.storage.numel, found.dtype, found.offset, found.size, found.stride
    )
    _check(layout, itemsize)
    return layout


def _check(layout: StoredLayout, itemsize: int) -> None:
    """Check that a tensor lies inside its storage."""
    numbers = (layout.offset, *layout.size, *layout.stride)
    last = layout.offset + sum((n - 1) * s for n, s in zip(layout.size, layout.stride, strict=True))
    empty = 0 in layout.size
    if any(n < 0 for n in numbers) or layout.dtype.itemsize != itemsize:
        raise pickle.UnpicklingError("its tensor has a negative size")
    if not empty and last >= layout.numel:
        raise pickle.UnpicklingError("its tensor is larger than its data")


@dataclass(frozen=True, slots=True)
class _Storage:
    dtype: torch.dtype
    key: str
    numel: int


@dataclass(frozen=True, slots=True)
class _Tensor:
    storage: _Storage
    dtype: torch.dtype
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


class _Unpickler(pickle.Unpickler):
    """Describes tensors; knows nothing else, and makes none."""

    def persistent_load(self, saved: Any) -> _Storage:
        kind, dtype, key, _, numel = saved
        if kind != "storage":
            raise pickle.UnpicklingError(f"a {kind} in place of a storage")
        return _Storage(dtype, str(key), int(numel))

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _REBUILDERS:
            # A new object each time: a pickle can set attributes on it (`load_build` in
            # Lib/pickle.py).
            return partial(_REBUILDERS[module, name])
        if (module, name) in STORAGES:
            return STORAGES[module, name]
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        raise pickle.UnpicklingError(f"{module}.{name} is no part of a tensor")


def _rebuild(storage: Any, offset: int, size: Any, stride: Any, *_: Any) -> _Tensor:
    return _Tensor(storage, storage.dtype, offset, tuple(size), tuple(stride))


def _rebuild_with_dtype(
    storage: Any, offset: int, size: Any, stride: Any, grad: Any, hooks: Any, dtype: Any, *_: Any
) -> _Tensor:
    del grad, hooks
    numel = storage.numel // dtype.itemsize
    return _Tensor(_Storage(dtype, storage.key, numel), dtype, offset, tuple(size), tuple(stride))


def _rebuild_parameter(data: _Tensor, *_: Any) -> _Tensor:
    return data


_REBUILDERS: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("torch", "Size"): tuple,
    REBUILD_TENSOR: _rebuild,
    REBUILD_TENSOR_WITH_DTYPE: _rebuild_with_dtype,
    REBUILD_PARAMETER: _rebuild_parameter,
}
