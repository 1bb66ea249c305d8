"""Answer reads of deferred values while a program is being recorded."""

from __future__ import annotations

import weakref
from collections.abc import Iterable

import torch
from torch import Tensor

from lateinit._program import Program, Read, TensorRef, is_random
from lateinit._replay import execution_of
from lateinit._torch import digest, without_modes

# 64 MiB: bounds the memory of recording, and suffices for the small tables that constructors read.
_KEPT = 1 << 26


class ValueReads:
    """Replays the ops that a read needs, and keeps up to 64 MiB of results for later reads.

    A kept storage is valid for as long as no op writes to it, so the number of writes is its key.
    A result of any size that other code keeps alive is found again, so that tensors on one storage
    are pickled with one storage.
    """

    def __init__(self, program: Program) -> None:
        self.program = program
        self._known: dict[int, tuple[int, torch.UntypedStorage]] = {}
        self._alive: weakref.WeakValueDictionary[tuple[int, int], torch.UntypedStorage] = (
            weakref.WeakValueDictionary()
        )

    def of(self, ref: TensorRef) -> Tensor:
        """The current values of a deferred tensor; not noted as a read."""
        writes = self.writes(ref)
        known = self._known.get(ref.storage)
        storage = known[1] if known is not None and known[0] == writes else None
        storage = storage or self._alive.get((ref.storage, writes))
        if storage is None:
            storage = execution_of(self.program).values([ref.storage])[ref.storage].storage
            self._alive[ref.storage, writes] = storage
            self._keep(ref.storage, (writes, storage))
        with without_modes():
            return ref.on(storage)

    def read(self, ref: TensorRef) -> Tensor:
        """The current values of a deferred tensor; notes the read if they are random.

        Python code may have acted on the values. Materialising under another ``seed=`` must
        therefore find the same ones, or raise ``SeedError``.
        """
        value = self.of(ref)
        if self.are_random([ref]):
            self.program.reads.append(Read(ref, len(self.program.ops), digest(value)))
        return value

    def are_random(self, refs: Iterable[TensorRef]) -> bool:
        """Whether any of some tensors depends on a draw."""
        return is_random(self.program, [ref.storage for ref in refs])

    def writes(self, ref: TensorRef) -> int:
        """How many ops have written to a tensor's storage so far."""
        return len(self.program.writers(ref.storage))

    def _keep(self, number: int, known: tuple[int, torch.UntypedStorage]) -> None:
        size = known[1].nbytes()
        if size + sum(storage.nbytes() for _, storage in self._known.values()) > _KEPT:
            self._known.clear()
        if size <= _KEPT:
            self._known[number] = known
