"""The rows of a summary: one for each tensor of a model, and sums over them."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from lateinit._lazy import known_shape
from lateinit._program import describe_initialisation
from lateinit._tensors import (
    Deferred,
    Found,
    Init,
    Kind,
    Only,
    Rules,
    find_tensors,
    is_placeholder,
    select,
    told,
)
from lateinit._torch import storage_key, without_subclass_functions
from lateinit.errors import listing

State = Literal["deferred", "lazy", "real", "meta"]


@dataclass(frozen=True, slots=True)
class Row:
    """One tensor.

    Attributes:
        names: all names of the tensor, the first one first.
        kind: parameter, buffer or attribute.
        persistent: whether a state dict holds it.
        shape: its shape, with None for each unknown size; None alone if not even the rank is known.
        dtype: its dtype, without ``torch.``.
        device: the device it is on, or was recorded for.
        requires_grad: whether it requires gradients.
        state: deferred, lazy, real, or plain ``meta``.
        nbytes: its bytes; None if its shape is not known.
        init: how it is initialised; None if nothing was recorded.
        shares: the name of an earlier tensor on the same storage.
    """

    names: tuple[str, ...]
    kind: Kind
    persistent: bool
    shape: tuple[int | None, ...] | None
    dtype: str
    device: str
    requires_grad: bool
    state: State
    nbytes: int | None
    init: str | None
    shares: str | None

    @property
    def name(self) -> str:
        """Its first name."""
        return self.names[0]

    @property
    def numel(self) -> int:
        """The number of its elements; 0 if not known."""
        return _numel(self.shape)

    @property
    def notes(self) -> str:
        """Its ties and aliases, in words."""
        ties = [f"= {listing(self.names[1:], 3)}"] if len(self.names) > 1 else []
        return ", ".join([*ties, *([f"shares memory with {self.shares}"] if self.shares else [])])

    @property
    def what(self) -> str:
        """Its kind, in words, with a note if a state dict leaves it out."""
        return self.kind if self.kind != "buffer" or self.persistent else "buffer (not saved)"


@dataclass(frozen=True, slots=True)
class Totals:
    """Sums over a model, without tensors of unknown size; bytes count shared memory once."""

    tensors: int
    unsized_tensors: int
    parameters: int
    buffers: int
    bytes: int
    deferred_bytes: int
    bytes_by_dtype: dict[str, int]


Entry = tuple[Row, int, Tensor]


def entries(module: Any, only: Only | None, init: Init | None = None) -> list[Entry]:
    """Each tensor's row, the key of its storage, and the tensor."""
    first: dict[int, str] = {}  # the first name on each storage, by its key
    every = find_tensors(module)
    found, rules = select(every, only), Rules(init, every)
    return [(_row(each, first, rules), _storage_key(each.tensor), each.tensor) for each in found]


class _Memory:
    """The bytes of one storage, as far as some tensors cover it."""

    def __init__(self, row: Row) -> None:
        self.dtype = row.dtype
        self.deferred = row.state == "deferred"
        self.nbytes = 0

    def add(self, nbytes: int, tensor: Tensor) -> None:
        """Count a tensor on this storage; views of the same bytes do not count twice."""
        self.nbytes = min(self.nbytes + nbytes, max(_storage_bytes(tensor), nbytes))


def _row(found: Found, first: dict[int, str], rules: Rules) -> Row:
    tensor = found.tensor
    shape = known_shape(tensor)
    state, device, init = _state(found)
    rule = rules.of(tensor)
    if state == "deferred" and rule is not None:
        init = told(rule)
    owner = first.setdefault(_storage_key(tensor), found.name)
    return Row(
        names=tuple(found.names),
        kind=found.kind,
        persistent=found.persistent,
        shape=shape,
        dtype=str(tensor.dtype).removeprefix("torch."),
        device=device,
        requires_grad=tensor.requires_grad,
        state=state,
        nbytes=None if shape is None or None in shape else _numel(shape) * tensor.dtype.itemsize,
        init=init,
        shares=owner if owner != found.name else None,
    )


def _numel(shape: tuple[int | None, ...] | None) -> int:
    """The number of elements of a shape; 0 if not known."""
    return 0 if shape is None else math.prod(size or 0 for size in shape)


def _state(found: Found) -> tuple[State, str, str | None]:
    """The state of a tensor, its device (or the recorded one), and its initialisation."""
    tensor = found.tensor
    if is_placeholder(tensor):
        return "lazy", str(tensor.device), None
    if not found.deferred:
        return "meta" if tensor.is_meta else "real", str(tensor.device), None
    deferred = Deferred.of(tensor)
    how = describe_initialisation(deferred.program, deferred.ref)
    return "deferred", str(deferred.device), how


def _storage_key(tensor: Tensor) -> int:
    storage = _storage(tensor)
    return id(tensor) if storage is None else storage_key(storage)


def _storage_bytes(tensor: Tensor) -> int:
    storage = _storage(tensor)
    return 0 if storage is None else storage.nbytes()


def _storage(tensor: Tensor) -> torch.UntypedStorage | None:
    if is_placeholder(tensor):
        return None
    with without_subclass_functions():
        try:
            return tensor.untyped_storage()
        except (NotImplementedError, RuntimeError):  # layouts that have no storage
            return None


def totals(entries: list[Entry]) -> Totals:
    rows = [row for row, _, _ in entries]
    memories: dict[int, _Memory] = {}
    for row, key, tensor in entries:
        if row.nbytes is not None:
            memories.setdefault(key, _Memory(row)).add(row.nbytes, tensor)
    by_dtype: Counter[str] = Counter()
    deferred = 0
    for memory in memories.values():
        by_dtype[memory.dtype] += memory.nbytes
        deferred += memory.nbytes if memory.deferred else 0
    return Totals(
        tensors=len(rows),
        unsized_tensors=sum(row.nbytes is None for row in rows),
        parameters=sum(row.numel for row in rows if row.kind == "parameter"),
        buffers=sum(row.numel for row in rows if row.kind == "buffer"),
        bytes=by_dtype.total(),
        deferred_bytes=deferred,
        bytes_by_dtype=dict(by_dtype.most_common()),
    )
