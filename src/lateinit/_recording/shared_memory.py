"""Memory that a recording shares with the outside: ``numpy()``, and ``set_`` of a real storage.

A deferred tensor has no memory to share. Outsiders get real memory that is kept equal to it: what
is recorded is shown there, and what is written there is noted. It is the whole of a storage, once,
so that all who share it see each other's writes.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lateinit._program.constants import RealData
from lateinit._program.program import TensorRef
from lateinit._recording.value_reads import ValueReads
from lateinit._tensors.slots import slot_of
from lateinit._torch.modes import without_modes
from lateinit._torch.storage import storage_key


@dataclass(slots=True)
class Exposure:
    """Shared memory and what it held when last looked at; all of them show bytes.

    ``watched`` marks memory that can be written unseen; ``twin`` that which the deferred tensor
    takes for its own when it is materialised.
    """

    tensor: Tensor
    ref: TensorRef
    real: Tensor
    seen: Tensor
    writes: int
    watched: bool
    twin: bool


class SharedMemory:
    """All that one recording shares. ``write(tensor, data)`` records ``tensor.copy_(data)``."""

    def __init__(
        self, values: ValueReads, data: RealData, write: Callable[[Tensor, Tensor], None]
    ) -> None:
        self._values = values
        self._data = data
        self._write = weakref.WeakMethod(write)  # of whoever holds this, and is to go with it
        self._exposed: dict[int, Exposure] = {}
        self._writing = False

    def __bool__(self) -> bool:
        return bool(self._exposed) and not self._writing

    def expose(self, tensor: Tensor, ref: TensorRef) -> Tensor:
        """A real tensor that shares its life with a deferred one, without modes."""
        if self:
            self.take_back()
        value = self._values.read(ref)
        if value.device.type != "cpu":
            return value.clone()  # numpy refuses it
        known = self._exposed.get(ref.storage)
        if known is None:
            # Whatever becomes of the tensor, the array shows the storage that it shows now.
            whole = _bytes_on(tensor.untyped_storage())
            all_of_it = TensorRef.of(whole, ref.storage)
            known = self._add(whole, all_of_it, self._values.of(all_of_it).clone())
        known.watched = True
        return ref.on(known.real.untyped_storage())

    def twin_of(self, storage: torch.UntypedStorage) -> Tensor | None:
        """The deferred tensor that stands for the whole of a real storage."""
        for e in self._exposed.values():
            if storage_key(e.real.untyped_storage()) == storage_key(storage):
                return e.tensor
        return None

    def add_twin(self, tensor: Tensor, ref: TensorRef, real: Tensor) -> None:
        """Let a deferred tensor stand for the whole of a real storage."""
        known = self._add(tensor, ref, real)
        known.watched, known.twin = not real.untyped_storage().resizable(), True

    def _add(self, tensor: Tensor, ref: TensorRef, real: Tensor) -> Exposure:
        writes, seen = self._values.writes(ref), real.clone()
        known = Exposure(tensor, ref, real, seen, writes, watched=False, twin=False)
        self._exposed[ref.storage] = known
        return known

    def take_back(self, *, every: bool = False) -> None:
        """Note what was written outside: to ``watched`` memory, or to any."""
        self._writing = True
        try:
            with without_modes():
                for e in self._exposed.values():
                    if (every or e.watched) and not _same_bits(e.real, e.seen):
                        self._note(e)
        finally:
            self._writing = False

    def _note(self, e: Exposure) -> None:
        write = self._write()
        assert write is not None
        self._values.read(e.ref)  # what stays of random values is real data from now on
        e.seen = e.real.clone()
        write(e.tensor, e.seen)
        e.writes = self._values.writes(e.ref)

    def show(self) -> None:
        """Write outside what was recorded."""
        for e in self._exposed.values():
            writes = self._values.writes(e.ref)
            if writes != e.writes:
                self._data.before_write(e.real)
                with without_modes():
                    e.real.copy_(self._values.read(e.ref))
                    e.seen = e.real.clone()
                e.writes = writes

    def finish(self) -> None:
        """Take back what is left, and let twins have the storages that they stand for."""
        self.take_back(every=True)
        for e in self._exposed.values():
            slot = slot_of(e.tensor)
            if e.twin and slot is not None:
                slot.real = e.real.untyped_storage()


def _bytes_on(storage: torch.UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device="meta").set_(storage)


def _same_bits(a: Tensor, b: Tensor) -> bool:
    return np.array_equal(a.numpy(), b.numpy())
