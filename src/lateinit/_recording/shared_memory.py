"""Real memory that a block shares with other code: by ``numpy()``, or ``set_`` of a real storage.

A deferred tensor has no memory to share. Code that asks for it gets real memory, which is kept
equal to the tensor: recorded ops are shown there, and writes there are recorded. One deferred
storage is shared as one real storage, so that all of its users see each other's writes.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lateinit._program import RealData, TensorRef
from lateinit._recording.value_reads import ValueReads
from lateinit._tensors import Real, slot_of
from lateinit._torch import storage_key, without_modes


@dataclass(slots=True)
class Exposure:
    """One shared storage: the deferred tensor, the real one, and its contents when last compared.

    ``writes`` counts the recorded ops that the real memory shows. ``watched`` marks memory that can
    be written without an op that a mode sees, such as that of an array. ``twin`` marks a real
    storage that becomes the deferred tensor's own when the block ends.
    """

    tensor: Tensor
    ref: TensorRef
    real: Tensor
    seen: Tensor
    writes: int
    watched: bool
    twin: bool


class SharedMemory:
    """All memory that one recording shares.

    ``write(tensor, data)`` records ``tensor.copy_(data)``. True in a boolean context if there is
    shared memory to compare. It is False while a write is recorded, which would compare again.
    """

    def __init__(
        self, values: ValueReads, data: RealData, write: Callable[[Tensor, Tensor], None]
    ) -> None:
        self._values = values
        self._data = data
        self._write = weakref.WeakMethod(write)  # weak: the recorder that it belongs to owns this
        self._exposed: dict[int, Exposure] = {}
        self._writing = False

    def __bool__(self) -> bool:
        return bool(self._exposed) and not self._writing

    def expose(self, tensor: Tensor, ref: TensorRef) -> Tensor:
        """A real tensor kept equal to a deferred one. Call without modes in force."""
        if self:
            self.take_back()
        value = self._values.read(ref)
        if value.device.type != "cpu":
            return value.clone()  # numpy() of another device raises torch's own error
        known = self._exposed.get(ref.storage)
        if known is None:
            # A tensor of the bytes of the storage, since the tensor may be set to another storage
            # later and the array still shows this one.
            whole = _bytes_on(tensor.untyped_storage())
            all_of_it = TensorRef.of(whole, ref.storage)
            known = self._add(whole, all_of_it, self._values.of(all_of_it).clone())
        known.watched = True
        return ref.on(known.real.untyped_storage())

    def twin_of(self, storage: torch.UntypedStorage) -> Tensor | None:
        """The deferred tensor that stands for a whole real storage, if there is one."""
        for e in self._exposed.values():
            if storage_key(e.real.untyped_storage()) == storage_key(storage):
                return e.tensor
        return None

    def add_twin(self, tensor: Tensor, ref: TensorRef, real: Tensor) -> None:
        """Let a deferred tensor stand for a whole real storage.

        Storages that are not resizable belong to other libraries, which may write to them.
        """
        known = self._add(tensor, ref, real)
        known.watched, known.twin = not real.untyped_storage().resizable(), True

    def _add(self, tensor: Tensor, ref: TensorRef, real: Tensor) -> Exposure:
        writes, seen = self._values.writes(ref), real.clone()
        known = Exposure(tensor, ref, real, seen, writes, watched=False, twin=False)
        self._exposed[ref.storage] = known
        return known

    def take_back(self, *, every: bool = False) -> None:
        """Record what other code wrote: to ``watched`` memory, or with ``every`` to any."""
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
        # The new contents are recorded as a constant. Where they include random values, they were
        # read: another seed would give another constant.
        self._values.read(e.ref)
        e.seen = e.real.clone()
        write(e.tensor, e.seen)
        e.writes = self._values.writes(e.ref)

    def show(self) -> None:
        """Write the results of newly recorded ops into the shared memory."""
        for e in self._exposed.values():
            writes = self._values.writes(e.ref)
            if writes != e.writes:
                # Recorded ops may read this memory as a constant, in its state before the write.
                self._data.before_write(e.real)
                with without_modes():
                    e.real.copy_(self._values.read(e.ref))
                    e.seen = e.real.clone()
                e.writes = writes

    def finish(self) -> None:
        """Record the last writes, and give twins the real storages that they stand for."""
        self.take_back(every=True)
        for e in self._exposed.values():
            slot = slot_of(e.tensor)
            if e.twin and slot is not None:
                slot.real = Real(e.real.untyped_storage())


def _bytes_on(storage: torch.UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device="meta").set_(storage)


def _same_bits(a: Tensor, b: Tensor) -> bool:
    return np.array_equal(a.numpy(), b.numpy())
