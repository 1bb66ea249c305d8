"""Giving a deferred tensor its storage, in place.

The tensor objects stay: each gets the real tensor's implementation (``_swap_tensor_impl``, which
keeps hooks and weak references), so optimizers, ties and closures hold what they held.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lateinit._program.program import TensorRef
from lateinit._replay.replay import Replay
from lateinit._tensors.guard import DeferredTensor, unguard
from lateinit._tensors.slots import Slot, held, locate, slot_of
from lateinit._torch.modes import without_modes
from lateinit._torch.storage import allocate
from lateinit._torch.swap import swap
from lateinit._torch.wrappers import is_dtensor, rewrap


@dataclass(frozen=True, slots=True)
class Cast:
    """Where values go after they are computed."""

    device: torch.device | None
    dtype: torch.dtype | None

    def dtype_of(self, ref: TensorRef) -> torch.dtype:
        wanted = self.dtype is not None and ref.dtype.is_floating_point
        return self.dtype if wanted and self.dtype is not None else ref.dtype

    def storage(self, storage: torch.UntypedStorage, refs: list[TensorRef]) -> Any:
        """A storage moved and cast as a whole, so that tensors which share it still do."""
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
    """Where values are to go, checked before anything is touched."""
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
    """Let the tensors that share a storage have it, now that it is real.

    ``window`` is a tensor on it that nobody else has, and what it shows.
    """
    slot = tensors[0][2]
    if slot.real is None:
        device = home(tensors[0][1], storage.device, cast.device)
        if device is not cast.device:
            cast = replace(cast, device=device)
        whole, storage = storage, cast.storage(storage, [ref for *_, ref in tensors])
        window = window if storage is whole else None
        # First of all: if giving it breaks off, those that have none yet are to share this one.
        slot.real, slot.cast = storage, (cast.device, cast.dtype)
    for _, tensor, _, ref in tensors:
        shown = ref
        if cast.dtype is not None or ref in strides:
            shown = ref._replace(dtype=cast.dtype_of(ref), stride=strides.get(ref, ref.stride))
        if window is not None and window[0] == shown:
            give(tensor, shown, storage, window[1])
            window = None
        else:
            give(tensor, shown, storage)


def home(
    tensor: Any, recorded: torch.device, asked: torch.device | None = None
) -> torch.device | None:
    """Where a tensor is to be moved, if anywhere: a shard to the devices of its mesh."""
    if asked is None and is_dtensor(tensor) and tensor.device_mesh.device_type != recorded.type:
        kind = tensor.device_mesh.device_type
        return torch.device(kind, torch.get_device_module(kind).current_device())
    return asked


def destination(tensor: Tensor, cast: Cast) -> torch.device:
    """Where a deferred tensor will have its values."""
    _, program, ref = locate(tensor)
    recorded = program.storages[ref.storage].device
    return home(tensor, recorded, cast.device) or recorded


def as_cast(slot: Slot, ref: TensorRef) -> TensorRef:
    """A window as it is on the real storage that took the place of its own."""
    return ref._replace(dtype=Cast(*slot.cast).dtype_of(ref))


def give(
    tensor: Tensor, ref: TensorRef, storage: torch.UntypedStorage, window: Tensor | None = None
) -> None:
    """Make a deferred tensor object a window on a real storage, or take over one."""
    if is_dtensor(tensor):
        give(held(tensor), ref, storage, window)
        rewrap(tensor)
        return
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
    """Let a deferred tensor have the storage that took the place of its own, if one did."""
    slot = slot_of(tensor)
    if slot is not None and slot.real is not None:
        _, _, ref = locate(tensor)
        with without_modes():
            give(tensor, as_cast(slot, ref), slot.real)


def adopt(tensor: Tensor, source: Tensor) -> None:
    """``tensor.copy_(source)`` for a deferred tensor: it becomes real, with those values."""
    slot, program, ref = locate(tensor)
    if slot.real is None and not program.covers(ref):
        slot.real = Replay(program).values([ref.storage])[ref.storage]
    adopt_uninitialized(tensor)
    with torch.no_grad():
        tensor.copy_(source)


def adopt_uninitialized(tensor: Tensor, device: torch.device | str | None = None) -> None:
    """Give a deferred tensor memory, shared with those on its storage, and no values."""
    slot, program, ref = locate(tensor)
    if slot.real is None:
        known = program.storages[ref.storage]
        with without_modes():
            slot.real = allocate(known.nbytes, torch.device(device or known.device))
    share_real_storage(tensor)


DeferredTensor.adopt = staticmethod(adopt)
