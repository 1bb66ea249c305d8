"""``Deferred``: a handle on a deferred tensor, through which all code reads its values."""

from __future__ import annotations

import torch
from torch import Tensor

from lateinit._program import Storage, TensorRef
from lateinit._replay import Computed, Execution, execution_of
from lateinit._tensors.cast import Cast, device_to_move_to
from lateinit._tensors.slots import ON_META, Slot, held, slot_of
from lateinit._torch import without_modes, without_subclass_functions
from lateinit.errors import NotRecordedError


class Deferred:
    """A deferred tensor, with its place in the program that recorded it.

    The place is looked up once. A handle must not be kept while a block records, as that may merge
    the program into another one.

    Attributes:
        tensor: the tensor; the values of a ``DTensor`` are those of its local part.
        name: its fully qualified name, if the caller knows it.
        slot: the place of its storage in the program.
        program: the program.
        ref: its window on the storage.
    """

    __slots__ = ("name", "program", "ref", "slot", "tensor")

    def __init__(self, tensor: Tensor, slot: Slot, name: str = "") -> None:
        self.tensor, self.slot, self.name = tensor, slot, name
        self.program, number = slot.resolve()
        self.ref = TensorRef.of(held(tensor), number)

    @classmethod
    def of(cls, tensor: Tensor, name: str = "") -> Deferred:
        """The handle on a deferred tensor, with its name if the caller knows it.

        Raises:
            NotRecordedError: the tensor is not deferred.
        """
        slot = slot_of(tensor)
        if slot is None or slot is ON_META:
            raise NotRecordedError(
                f"a meta tensor of shape {tuple(tensor.shape)} was never recorded: build it inside "
                "`with lateinit.deferred():`"
            )
        with without_subclass_functions():
            return cls(tensor, slot, name)

    @property
    def storage(self) -> Storage:
        """The program's record of its storage."""
        return self.program.storages[self.ref.storage]

    @property
    def device(self) -> torch.device:
        """The device that the constructor asked for."""
        return self.storage.device

    def destination(self, cast: Cast) -> torch.device:
        """The device on which the tensor will have its values."""
        return device_to_move_to(self.tensor, self.device, cast.device) or self.device

    def is_whole(self) -> bool:
        """Whether the tensor shows every byte of its storage exactly once."""
        return self.program.covers(self.ref)

    def real(self) -> Tensor | None:
        """A tensor on the real memory of its storage, cast included; None if not yet real.

        The memory becomes real with the first tensor on it, and is shared by the others.
        """
        real = self.slot.real
        if real is None:
            return None
        with without_modes():
            return real.window(self.ref).on(real.storage)

    def values(self, execution: Execution | None = None) -> Computed:
        """Its whole storage with the recorded values, in new memory that no tensor shares.

        Args:
            execution: computes the values; by default from the recorded random state.
        """
        number = self.ref.storage
        return (execution or execution_of(self.program)).values([number])[number]
