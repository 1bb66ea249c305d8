"""Realise a deferred tensor in place: swap real storage into the existing tensor object.

The Python object stays and gets the implementation of a real tensor (see ``_torch.swap``). So
optimizers, ties, closures and weak references keep the object that they hold.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lateinit._program import TensorRef
from lateinit._replay import Replay
from lateinit._tensors.guard import DeferredTensor, unguard
from lateinit._tensors.slots import Slot, held, locate, slot_of
from lateinit._torch import allocate, is_dtensor, rewrap, without_modes
from lateinit._torch.swap import swap


@dataclass(frozen=True, slots=True)
class Cast:
    """The device and dtype of materialised tensors; None keeps the recorded one."""

    device: torch.device | None
    dtype: torch.dtype | None

    def dtype_of(self, ref: TensorRef) -> torch.dtype:
        wanted = self.dtype is not None and ref.dtype.is_floating_point
        return self.dtype if wanted and self.dtype is not None else ref.dtype

    def storage(self, storage: torch.UntypedStorage, refs: list[TensorRef]) -> Any:
        """Move and cast a whole storage, so that the tensors on it keep sharing memory.

        Args:
            storage: the computed values.
            refs: the windows on it. The storage is cast only if all of them have one dtype that
                changes; else its bytes are moved as they are.
        """
        if self.device is None and self.dtype is None:
            return storage
        dtypes = {ref.dtype for ref in refs}
        new = {self.dtype_of(ref) for ref in refs}
        dtype = dtypes.pop()
        if new == {dtype} or len(new) > 1:
            dtype = torch.uint8
            new = {dtype}
        whole = torch.empty(0, dtype=dtype, device=storage.device).set_(storage)
        return whole.to(device=self.device, dtype=new.pop()).untyped_storage()


def cast_to(device: torch.device | str | None, dtype: torch.dtype | None) -> Cast:
    """The checked ``Cast`` for the arguments ``device=`` and ``dtype=`` of a public function."""
    if dtype is not None and not isinstance(dtype, torch.dtype):
        raise TypeError(f"dtype={dtype!r}: a torch.dtype is meant, such as torch.bfloat16")
    if dtype is not None and not dtype.is_floating_point:
        raise ValueError(f"dtype={dtype}: weights are cast to a floating-point dtype")
    where = None if device is None else torch.device(device)
    if where is not None and where.type == "meta":
        raise ValueError("device='meta': materialised tensors need a device that has memory")
    if where is not None:
        torch.empty(0, device=where)  # raises torch's own error if the device is not there
    return Cast(where, dtype)


def place(
    tensors: list[tuple[str, Tensor, Slot, TensorRef]],
    storage: Any,
    cast: Cast,
    strides: dict[TensorRef, tuple[int, ...]],
    window: tuple[TensorRef, Tensor] | None = None,
) -> None:
    """Realise all deferred tensors that share one storage.

    Args:
        tensors: name, tensor, slot and window of each.
        storage: the computed values; not used if the slot has real storage already.
        cast: the device and dtype asked for.
        strides: the strides that a kernel gave a window, where they differ from those recorded.
        window: a tensor on ``storage`` without other owners, and its window. Its implementation is
            swapped in directly, which saves making another tensor.
    """
    slot = tensors[0][2]
    if slot.real is None:
        device = home(tensors[0][1], storage.device, cast.device)
        if device is not cast.device:
            cast = replace(cast, device=device)
        whole, storage = storage, cast.storage(storage, [ref for *_, ref in tensors])
        window = window if storage is whole else None
        # Before any tensor is given the storage: if the loop below is interrupted, a repeated call
        # must give the remaining tensors this same storage.
        slot.real, slot.cast = storage, (cast.device, cast.dtype)
    for _, tensor, _, ref in tensors:
        shown = ref
        if cast.dtype is not None or ref in strides:
            shown = ref._replace(dtype=cast.dtype_of(ref), stride=strides.get(ref, ref.stride))
        # The window can be swapped into one tensor; the others get new ones on the storage.
        if window is not None and window[0] == shown:
            give(tensor, shown, storage, window[1])
            window = None
        else:
            give(tensor, shown, storage)


def home(
    tensor: Any, recorded: torch.device, asked: torch.device | None = None
) -> torch.device | None:
    """The device to move a tensor to, or None to leave it where it was computed.

    A ``DTensor`` goes to the current device of its mesh's type, unless a device was asked for.

    Args:
        tensor: a deferred tensor or ``DTensor``.
        recorded: the device that the constructor asked for.
        asked: the device that the caller of a public function asked for.
    """
    if asked is None and is_dtensor(tensor) and tensor.device_mesh.device_type != recorded.type:
        kind = tensor.device_mesh.device_type
        return torch.device(kind, torch.get_device_module(kind).current_device())
    return asked


def destination(tensor: Tensor, cast: Cast) -> torch.device:
    """The device on which a deferred tensor will have its values."""
    _, program, ref = locate(tensor)
    recorded = program.storages[ref.storage].device
    return home(tensor, recorded, cast.device) or recorded


def as_cast(slot: Slot, ref: TensorRef) -> TensorRef:
    """A recorded window as it is on the slot's real storage, which may have been cast."""
    return ref._replace(dtype=Cast(*slot.cast).dtype_of(ref))


def give(
    tensor: Tensor, ref: TensorRef, storage: torch.UntypedStorage, window: Tensor | None = None
) -> None:
    """Swap a real tensor into a deferred tensor object.

    Args:
        tensor: the deferred tensor; of a ``DTensor`` the local part is swapped.
        ref: the window of the tensor on ``storage``.
        storage: the real storage.
        window: a real tensor that shows ``ref`` already and has no other owner.
    """
    if is_dtensor(tensor):
        give(held(tensor), ref, storage, window)
        rewrap(tensor)
        return
    # Being an inference tensor is part of the implementation (c10/core/TensorImpl.h): the real
    # one must be made inside inference mode exactly if the deferred one was.
    inference = tensor.is_inference()
    if window is not None and window.is_inference() == inference:
        swap(tensor, window)
    elif inference == torch.is_inference_mode_enabled():
        swap(tensor, ref.on(storage))
    else:
        with torch.inference_mode(inference):
            swap(tensor, ref.on(storage))
    unguard(tensor)


def share_real_storage(tensor: Tensor) -> None:
    """Realise a deferred tensor if its storage was materialised through another tensor."""
    slot = slot_of(tensor)
    if slot is not None and slot.real is not None:
        _, _, ref = locate(tensor)
        with without_modes():
            give(tensor, as_cast(slot, ref), slot.real)


def adopt(tensor: Tensor, source: Tensor) -> None:
    """Realise a deferred tensor with the values of a real one: ``tensor.copy_(source)``."""
    # If the tensor shows only part of its storage, other tensors may show the rest, which needs
    # its recorded values. If it shows all of it, nothing recorded survives the copy.
    slot, program, ref = locate(tensor)
    if slot.real is None and not program.covers(ref):
        slot.real = Replay(program).values([ref.storage])[ref.storage]
    adopt_uninitialized(tensor)
    with torch.no_grad():
        tensor.copy_(source)


def adopt_uninitialized(tensor: Tensor, device: torch.device | str | None = None) -> None:
    """Give a deferred tensor uninitialised memory, shared by all tensors on its storage."""
    slot, program, ref = locate(tensor)
    if slot.real is None:
        known = program.storages[ref.storage]
        with without_modes():
            slot.real = allocate(known.nbytes, torch.device(device or known.device))
    share_real_storage(tensor)


DeferredTensor.adopt = staticmethod(adopt)
