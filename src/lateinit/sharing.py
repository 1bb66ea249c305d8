"""Memory that a recording shares with the outside: ``numpy()``, and ``set_`` of a real storage.

A deferred tensor has no memory to share. Outsiders get real memory that is kept equal to it: what
is recorded is shown there, and what is written there is noted.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lateinit.program import TensorRef
from lateinit.realdata import RealData
from lateinit.replay import without_modes
from lateinit.tensors import slot_of
from lateinit.values import Values


@dataclass(slots=True)
class Exposure:
    """Shared memory and what it held when last looked at.

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
        self, values: Values, data: RealData, write: Callable[[Tensor, Tensor], None]
    ) -> None:
        self._values = values
        self._data = data
        self._write = weakref.WeakMethod(write)  # of whoever holds this, and is to go with it
        self._exposed: list[Exposure] = []
        self._writing = False

    def __bool__(self) -> bool:
        return bool(self._exposed) and not self._writing

    def expose(self, tensor: Tensor, ref: TensorRef) -> Tensor:
        """A real tensor that shares its life with a deferred one."""
        real = self._values.read(ref).clone()
        self._add(tensor, ref, real, watched=True)
        return real

    def twin_of(self, storage: torch.UntypedStorage) -> Tensor | None:
        """The deferred tensor that stands for the whole of a real storage."""
        for e in self._exposed:
            if e.twin and e.real.untyped_storage()._cdata == storage._cdata:
                return e.tensor
        return None

    def add_twin(self, tensor: Tensor, ref: TensorRef, real: Tensor) -> None:
        """Let a deferred tensor stand for the whole of a real storage."""
        watched = not real.untyped_storage().resizable()
        self._add(tensor, ref, real, watched=watched, twin=True)

    def _add(
        self, tensor: Tensor, ref: TensorRef, real: Tensor, *, watched: bool, twin: bool = False
    ) -> None:
        writes = self._values.writes(ref)
        self._exposed.append(Exposure(tensor, ref, real, real.clone(), writes, watched, twin))

    def take_back(self, *, every: bool = False) -> None:
        """Note what was written outside: to ``watched`` memory, or to any."""
        for e in self._exposed:
            if (every or e.watched) and not _same_bits(e.real, e.seen):
                e.seen = e.real.clone()
                self._writing = True
                write = self._write()
                assert write is not None
                try:
                    write(e.tensor, e.seen)
                finally:
                    self._writing = False
                e.writes = self._values.writes(e.ref)

    def show(self) -> None:
        """Write outside what was recorded."""
        for e in self._exposed:
            writes = self._values.writes(e.ref)
            if writes != e.writes:
                self._data.before_write(e.real)
                with without_modes():
                    e.real.copy_(self._values.of(e.ref))
                    e.seen = e.real.clone()
                e.writes = writes

    def finish(self) -> None:
        """Take back what is left, and let twins have the storages that they stand for."""
        self.take_back(every=True)
        for e in self._exposed:
            slot = slot_of(e.tensor)
            if e.twin and slot is not None:
                slot.real = e.real.untyped_storage()


def _same_bits(a: Tensor, b: Tensor) -> bool:
    return a.numpy().tobytes() == b.numpy().tobytes()
