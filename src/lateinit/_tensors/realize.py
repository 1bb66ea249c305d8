"""Realise deferred tensors in place: swap real memory into the existing tensor objects.

The Python object stays and gets the implementation of a real tensor (see ``_torch.swap``). So
optimizers, ties, closures and weak references keep the object that they hold.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lateinit._program import Read, Storage, TensorRef, is_random
from lateinit._replay import Computed, execution_of, one_thread
from lateinit._tensors.cast import AS_RECORDED, Cast, Real, device_to_move_to
from lateinit._tensors.deferred import Deferred
from lateinit._tensors.slots import (
    PLAIN_CLASSES,
    Slot,
    described,
    held,
    is_deferred_tensor,
    original_class,
    slot_of,
    unguard,
)
from lateinit._torch import (
    Held,
    allocate,
    digest,
    held_by_script,
    inference_mode,
    is_dtensor,
    noted_scripts,
    outside_functorch,
    restoring,
    rewrap,
    without_modes,
)
from lateinit._torch.swap import as_subclass, hears_ops, swap
from lateinit.errors import DeferredTensorError


@dataclass(slots=True)
class SharedStorage:
    """The deferred tensors on one storage, which become real together.

    Attributes:
        slot: the slot of the storage.
        tensors: the tensors.
        as_recorded: whether only objects keep the tensors. ``Module.to`` leaves such tensors, and
            other modules may share them.
        cast: the device and dtype that the tensors get.
    """

    slot: Slot
    tensors: list[Deferred]
    as_recorded: bool = False
    cast: Cast = AS_RECORDED

    @property
    def record(self) -> Storage:
        """The program's record of the storage."""
        return self.tensors[0].storage

    @property
    def names(self) -> list[str]:
        """The names of the tensors."""
        return [tensor.name for tensor in self.tensors]

    @property
    def refs(self) -> list[TensorRef]:
        """The windows of the tensors."""
        return [tensor.ref for tensor in self.tensors]

    def give(self, computed: Computed) -> None:
        """Realise the tensors on memory with their values, after moving and casting it."""
        cast = self.cast
        device = device_to_move_to(self.tensors[0].tensor, computed.storage.device, cast.device)
        if device is not cast.device:
            cast = replace(cast, device=device)
        # The slot gets the memory first: if `share` is interrupted, a repeated call must give the
        # remaining tensors this same memory.
        real = self.slot.real = cast.apply(computed, self.refs)
        self.share(computed.window if real.storage is computed.storage else None)

    def put(self, storage: torch.UntypedStorage) -> None:
        """Realise the tensors on memory with their values that is already moved and cast."""
        self.slot.real = Real(storage, self.cast, self.cast.from_dtype(self.refs))
        self.share()

    def share(self, window: tuple[TensorRef, Tensor] | None = None) -> None:
        """Realise the tensors on the memory of the slot.

        Args:
            window: a tensor on that memory and its window, if no other code has the tensor. It is
                swapped in directly, which saves making another tensor.
        """
        real = self.slot.real
        assert real is not None
        for deferred in self.tensors:
            shown = real.window(deferred.ref)
            if window is not None and window[0] == shown:
                give(deferred.tensor, shown, real.storage, window[1])
                window = None  # a tensor can be swapped in only once
            else:
                give(deferred.tensor, shown, real.storage)


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
        local = held(tensor)
        unguard(tensor)
        try:
            give(local, ref, storage, window)
            rewrap(tensor)
        except BaseException:
            if not local.is_meta:  # swapped before an interrupt: the shard must not report meta
                rewrap(tensor)
            raise
        return
    cls, inference = type(tensor), tensor.is_inference()
    gradient = tensor.grad if tensor.is_leaf else None
    scripts = _scripts_with(tensor)
    try:
        # Being an inference tensor is part of the implementation (c10/core/TensorImpl.h): the real
        # one must be made inside inference mode exactly if the deferred one was.
        if window is not None and window.is_inference() == inference:
            left = swap(tensor, _as_original(tensor, window))
        elif inference == torch.is_inference_mode_enabled():
            left = swap(tensor, _as_original(tensor, ref.on(storage)))
        else:
            with inference_mode(inference):
                left = swap(tensor, _as_original(tensor, ref.on(storage)))
        # Last: a thread that finds a tensor without a guard must find its values too.
        unguard(tensor)
    except BaseException:
        if not is_deferred_tensor(tensor):
            unguard(tensor)
        raise
    # TorchScript holds implementations, not objects: it may still hold the deferred one.
    left.__class__ = cls
    for script in scripts:
        script.put_back()
    if gradient is not None:
        _carry(gradient, tensor)


def _scripts_with(tensor: Tensor) -> list[Held]:
    """The places of a tensor in modules that were scripted after the block, while deferred."""
    scripts = noted_scripts()
    found = held_by_script(scripts) if scripts else ()
    return [one for one in found if any(t is tensor for t in one.tensors())]


def _carry(gradient: Tensor, tensor: Tensor) -> None:
    """Give a realised tensor the gradient that the constructor left, cast and moved like it."""
    realize_now(gradient)
    if (gradient.dtype, gradient.device) != (tensor.dtype, tensor.device):
        gradient = gradient.to(tensor.device, tensor.dtype)
    tensor.grad = gradient


def _as_original(tensor: Tensor, real: Tensor) -> Tensor:
    """``real``, with an implementation made for the class of ``tensor`` if the class needs it."""
    cls = original_class(tensor)
    if cls in PLAIN_CLASSES or not hears_ops(cls):
        return real
    return as_subclass(cls, real, requires_grad=False)


def share_real_storage(tensor: Tensor) -> None:
    """Realise a deferred tensor if its storage was materialised through another tensor."""
    slot = slot_of(tensor)
    if slot is not None and slot.real is not None:
        with outside_functorch(), without_modes():
            SharedStorage(slot, [Deferred.of(tensor)]).share()


@restoring
def realize_now(tensor: Tensor) -> None:
    """Realise a deferred tensor with its recorded values; no generator moves.

    Random values are drawn under the seed that ``materialize`` was last given, and a later
    ``seed=`` for the program must give the same values.
    """
    with one_thread, outside_functorch(), without_modes():
        share_real_storage(tensor)
        if not is_deferred_tensor(tensor):  # another thread has realised it
            return
        deferred = Deferred.of(tensor)
        program, ref = deferred.program, deferred.ref
        computed = deferred.values(execution_of(program, program.seed))
        if is_random(program, [ref.storage]):
            name = deferred.slot.name or f"a tensor {ref.size}"
            read = Read(ref, len(program.ops), digest(ref.on(computed.storage)), name)
            program.reads.append(read)
        try:
            SharedStorage(deferred.slot, [deferred]).give(computed)
        except RuntimeError as error:  # torch/csrc/autograd/python_variable.cpp: it has weakrefs
            raise DeferredTensorError(
                f"{described(tensor)} cannot be given its values while torch holds its memory, as "
                "torch.jit.trace does: call lateinit.materialize() on it before"
            ) from error


@restoring
def show(tensor: Tensor, real: Tensor) -> None:
    """Realise a deferred tensor on the memory of a real one, as ``tensor.data = real`` does.

    The other tensors on its storage stay deferred.
    """
    with without_modes():
        give(tensor, TensorRef.of(real, 0), real.untyped_storage())


@restoring
def adopt(tensor: Tensor, source: Tensor) -> None:
    """Realise a deferred tensor with the values of a real one: ``tensor.copy_(source)``."""
    # If the tensor shows only part of its storage, other tensors may show the rest, which needs
    # its recorded values. If it covers all of it, the copy overwrites every recorded value.
    deferred = Deferred.of(tensor)
    if deferred.slot.real is None and not deferred.is_whole():
        deferred.slot.real = AS_RECORDED.apply(deferred.values(), [deferred.ref])
    adopt_uninitialized(tensor)
    with torch.no_grad():
        tensor.copy_(source)


def adopt_uninitialized(tensor: Tensor, device: torch.device | None = None) -> None:
    """Give a deferred tensor uninitialised memory, shared by all tensors on its storage."""
    deferred = Deferred.of(tensor)
    with without_modes():
        if deferred.slot.real is None:
            memory = allocate(deferred.storage.nbytes, device or deferred.device)
            deferred.slot.real = Real(memory, Cast(device, None))
        SharedStorage(deferred.slot, [deferred]).share()
