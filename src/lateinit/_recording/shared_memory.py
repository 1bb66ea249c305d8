"""Real memory that a block shares with other code: by ``numpy()``, or ``set_`` of a real storage.

A deferred tensor has no memory to share. Code that needs it gets real memory, which is kept equal
to the tensor: results of recorded ops are written there, and writes there are recorded. One
deferred storage is shared as one real storage, so that all of its users see each other's writes.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lateinit._program import RealData, TensorRef
from lateinit._recording.value_reads import ValueReads
from lateinit._tensors import Real, slot_of
from lateinit._torch import is_held_elsewhere, is_plain, storage_key, without_modes


@dataclass(slots=True)
class Exposure:
    """One shared storage: the deferred tensor, the real one, and its contents when last compared.

    ``twin`` marks a real storage that becomes the deferred tensor's own when the block ends.
    """

    tensor: Tensor
    ref: TensorRef
    real: Tensor
    seen: Tensor
    twin: bool


class SharedMemory:
    """All memory that one recording shares.

    ``write(tensor, data)`` records ``tensor.copy_(data)``. In a boolean context the object is True
    if there is shared memory to compare. It is False while a write is recorded, which would compare
    again.

    Other code can write without an op that a mode intercepts. So memory is compared when an op is
    about to use it, or to write its real side.
    """

    def __init__(
        self, values: ValueReads, data: RealData, write: Callable[[Tensor, Tensor], None]
    ) -> None:
        self._values = values
        self._data = data
        self._write = weakref.WeakMethod(write)  # weak: the owner of the method owns this object
        self._exposed: dict[int, Exposure] = {}
        self._writing = False

    def __bool__(self) -> bool:
        return bool(self._exposed) and not self._writing

    def expose(self, tensor: Tensor, ref: TensorRef) -> Tensor:
        """A real tensor kept equal to a deferred one. Call without modes in force."""
        if self:
            self.take_back([ref.storage])
        value = self._values.read(ref)
        if value.device.type != "cpu":
            return value.clone()  # numpy() of another device raises torch's own error
        known = self._exposed.get(ref.storage)
        if known is None:
            # A tensor on all bytes of this storage, since ``tensor`` may be set to another storage
            # later while the array still refers to this one.
            whole = _bytes_on(tensor.untyped_storage())
            real = self._values.of(TensorRef.of(whole, ref.storage)).clone()
            known = self._add(whole, ref.storage, real, real.clone(), twin=False)
        return ref.on(known.real.untyped_storage())

    def has(self, ref: TensorRef) -> bool:
        """Whether other code has the memory of a deferred tensor, and so its address."""
        return ref.storage in self._exposed

    def twin_of(self, storage: torch.UntypedStorage) -> Tensor | None:
        """The deferred tensor that stands for a whole real storage, if there is one."""
        found = self._on([storage])
        return found[0].tensor if found else None

    def add_twin(self, tensor: Tensor, number: int, real: Tensor, seen: Tensor) -> None:
        """Let a deferred tensor stand for a whole real storage.

        Args:
            tensor: the deferred tensor.
            number: the number of its storage.
            real: a tensor of the bytes of the real storage.
            seen: a copy of ``real`` to which no code writes.
        """
        self._add(tensor, number, real, seen, twin=True)

    def _add(
        self, tensor: Tensor, number: int, real: Tensor, seen: Tensor, *, twin: bool
    ) -> Exposure:
        known = Exposure(tensor, TensorRef.of(tensor, number), real, seen, twin)
        self._exposed[number] = known
        return known

    def _on(self, storages: Iterable[torch.UntypedStorage]) -> list[Exposure]:
        """The shared memory on some real storages."""
        keys = set(map(storage_key, storages))
        return [e for e in self._exposed.values() if storage_key(e.real.untyped_storage()) in keys]

    def take_back(self, numbers: Iterable[int]) -> None:
        """Record the writes of other code to the real sides of some storages."""
        self._compare([self._exposed[n] for n in numbers if n in self._exposed])

    def take_back_real(self, written: Iterable[Tensor]) -> None:
        """Record the writes of an op to real tensors that may be on shared memory."""
        self._compare(self._on(t.untyped_storage() for t in written if is_plain(t)))

    def _compare(self, exposures: Iterable[Exposure]) -> None:
        self._writing = True
        try:
            with without_modes():
                for e in exposures:
                    if not _same_bits(e.real, e.seen):
                        self._note(e)
        finally:
            self._writing = False

    def _note(self, e: Exposure) -> None:
        write = self._write()
        assert write is not None
        # The new contents are recorded as a constant. If they include random values, these count as
        # read: another seed would give another constant.
        self._values.read(e.ref)
        e.seen = e.real.clone()
        write(e.tensor, e.seen)

    def show(self, written: Iterable[int]) -> None:
        """Write the results of a recorded op into the shared memory of the storages it wrote."""
        for number in written:
            e = self._exposed.get(number)
            if e is not None:
                # Recorded ops may read this memory as a constant, with its contents before the
                # write.
                self._data.before_write(e.real)
                with without_modes():
                    e.real.copy_(self._values.read(e.ref))
                    e.seen = e.real.clone()

    def finish(self) -> None:
        """Record the last writes, and give twins their real storages.

        A tensor whose memory is shared with a living array or tensor gets that memory too.
        """
        self.take_back(self._exposed)
        for e in self._exposed.values():
            slot = slot_of(e.tensor)
            if slot is not None and (e.twin or is_held_elsewhere(e.real)):
                slot.real = Real(e.real.untyped_storage())


def _bytes_on(storage: torch.UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device="meta").set_(storage)


def _same_bits(a: Tensor, b: Tensor) -> bool:
    return np.array_equal(a.numpy(), b.numpy())
