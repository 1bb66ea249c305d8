"""Map deferred tensors to windows on the storages of a program, and make new deferred tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lateinit._program import Program, RealData, Storage, TensorRef
from lateinit._tensors import Deferred, Slot, attach, described, slot_of
from lateinit._torch import META, Kwargs, WeakTensor, device_of_result
from lateinit.errors import RecordingError

CPU = torch.device("cpu")


class Windows:
    """The deferred tensors of a program, as windows on its storages.

    Args:
        program: the program.
        drawing: False marks the storages as made after the block.
        alone: True refuses the deferred tensors of other programs.

    Attributes:
        program: the program.
        born: the tensors that were made, weakly.
        data: the real data that the program keeps.
    """

    def __init__(self, program: Program, *, drawing: bool = True, alone: bool = False) -> None:
        self.program = program
        self._alone = alone
        self._drawing = drawing
        self.born: list[WeakTensor] = []
        self.data = RealData(program)

    def ref(self, tensor: Tensor) -> TensorRef:
        """The window of a deferred tensor on its storage."""
        slot = slot_of(tensor)
        assert slot is not None
        return self._ref(slot, tensor)

    def _ref(self, slot: Slot, tensor: Tensor) -> TensorRef:
        if slot.real is not None:
            raise RecordingError(
                f"{described(tensor)} shares its memory with a tensor that is materialised, whose "
                "values may have changed since: call lateinit.materialize() on this one too, "
                "before it is used in a block"
            )
        program, number = slot.resolve()
        # The tensor comes from another block. Its program is appended to this one, and the slot
        # then resolves to a number in this one.
        if program is not self.program and self._alone:
            raise RecordingError(
                f"{described(tensor)} is used, which is another deferred tensor and has no values "
                "yet"
            )
        if program is not self.program:
            self.program.absorb(program)
            _, number = slot.resolve()
        return TensorRef.of(tensor, number)

    def referred(self, value: Any) -> Any:
        """An argument in the form that ops store: ``TensorRef``, ``Const``, tuple or number."""
        if isinstance(value, Tensor):
            if not value.is_meta:
                return self.data.refer(value)
            slot = slot_of(value)
            assert slot is not None
            if slot.real is None or slot.waits:
                return self._ref(slot, value)
            # A table has realised itself, and this other tensor on its storage was not used since.
            real = Deferred.of(value).real()
            assert real is not None
            return self.data.refer(real)
        if isinstance(value, (list, tuple)):
            return tuple(self.referred(item) for item in value)
        if isinstance(value, torch.Generator):
            return None  # the place of the draw replaces it; some ops take it positionally
        if isinstance(value, torch.UntypedStorage):
            raise RecordingError(
                "an untyped storage was written to while recording: write to a tensor instead"
            )
        return value

    def device_of(self, tensor: Tensor) -> torch.device:
        """The device that the constructor asked for."""
        return self.storage_of(tensor).device

    def storage_of(self, tensor: Tensor) -> Storage:
        """The program's record of a deferred tensor's storage."""
        slot = slot_of(tensor)
        assert slot is not None
        program, number = slot.resolve()
        return program.storages[number]

    def device_for(self, kwargs: Kwargs, deferred: list[Tensor]) -> torch.device:
        """The device of the results of a call."""
        asked = kwargs.get("device")
        if asked is not None:
            return device_of_result(asked)
        # A CPU tensor without dims may be combined with tensors of any device, so it comes last.
        for tensor in sorted(deferred, key=lambda t: t.dim() == 0):
            return self.device_of(tensor)
        return CPU

    def adopt(self, tensor: Tensor, device: torch.device) -> bool:
        """Number a new meta storage, or update the size of a known one (``resize_``).

        Returns:
            Whether the storage is new.
        """
        slot = slot_of(tensor)
        if slot is None:
            self._number(tensor, device)
            return True
        program, number = slot.resolve()
        program.storages[number].nbytes = tensor.untyped_storage().nbytes()
        self.born.append(WeakTensor(tensor))
        return False

    def _number(self, tensor: Tensor, device: torch.device) -> int:
        """Give a new meta storage a number in the program."""
        number = len(self.program.storages)
        storage = tensor.untyped_storage()
        attach(storage, Slot(self.program, number))
        self.program.storages.append(Storage(storage.nbytes(), device, not self._drawing))
        self.born.append(WeakTensor(tensor))
        return number

    def mirror(self, real: Any, device: torch.device) -> Any:
        """A new deferred tensor with the layout of a real one; any other value unchanged."""
        if not isinstance(real, Tensor):
            return real
        tensor = torch.empty_strided(real.size(), real.stride(), dtype=real.dtype, device=META)
        self.adopt(tensor, device)
        return tensor
