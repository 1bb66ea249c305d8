"""Put the values of a checkpoint into the tensors of a module, without a copy where possible."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from lateinit._identity import IdentityMap
from lateinit._materialize import Filling
from lateinit._tensors import (
    ON_META,
    Cast,
    Casts,
    Deferred,
    Rules,
    SharedStorage,
    Slot,
    Wanted,
    device_to_move_to,
    held,
    is_deferred_tensor,
    slot_of,
)
from lateinit._torch import allocate, is_dtensor, without_modes


class Placer:
    """Puts values into tensors, one at a time.

    A deferred tensor on the CPU with the dtype of the values takes their memory (*zero-copy*); for
    any other deferred tensor memory is allocated and copied into; a real tensor is copied into. All
    tensors on one storage become real together.
    """

    def __init__(self, groups: Iterable[Wanted], casts: Casts, rules: Rules) -> None:
        self._casts, self._rules = casts, rules
        self._sharing: dict[Slot, SharedStorage] = {}
        self._known: IdentityMap[Tensor, Deferred] = IdentityMap()
        for group in groups:
            self._sharing.update({shared.slot: shared for shared in group.storages.values()})
            self._known.update((deferred.tensor, deferred) for deferred in group.tensors())
        # Data pointers of the memory that a tensor has taken: no second tensor may take it.
        self._taken: set[int] = set()

    def holds(self, tensor: Tensor) -> bool:
        """Whether a tensor is deferred; during a load it serves as its own stand-in."""
        return is_deferred_tensor(tensor) and not is_lazy(tensor)

    def device(self, tensor: Tensor) -> torch.device:
        """The device where the values of a deferred tensor will be."""
        return Deferred.of(tensor).destination(self._casts.of_tensor(tensor))

    def reveal(self, tensor: Tensor) -> None:
        """Materialise a tensor if it is deferred, and the tensors that share its memory."""
        if not self.holds(tensor):
            return
        shared = self._together(Deferred.of(tensor))
        together = [tensor, *(deferred.tensor for deferred in shared.tensors)]
        Filling(together, None, self._casts, rules=self._rules).run()

    def put(self, target: Tensor, source: Tensor, *, take: bool) -> None:
        """Do ``target.copy_(source)``; ``target`` may be deferred, or a shard.

        Args:
            target: a tensor of the module.
            source: its values.
            take: whether ``target`` may take the memory of ``source``, which must have no other
                user then.
        """
        source = source.detach()
        deferred = self._recorded(target)
        if deferred is not None:
            with without_modes():
                taken = self._given_memory_of(source, deferred, take=take)
            if taken:
                return
        inference = held(target).is_inference()
        with torch.inference_mode() if inference else torch.no_grad():
            held(target).copy_(source)

    def _recorded(self, target: Tensor) -> Deferred | None:
        """The handle on a tensor; None if it is not deferred."""
        slot = slot_of(target)
        if slot is None or slot is ON_META:
            return None
        found = self._known.get(target)
        return found if found is not None and found.slot is slot else Deferred.of(target)

    def _together(self, deferred: Deferred) -> SharedStorage:
        """The tensors of the module that share the memory of a tensor, itself included."""
        shared = self._sharing.get(deferred.slot)
        cast = self._casts.of_tensor(deferred.tensor)
        return shared or SharedStorage(deferred.slot, [deferred], cast=cast)

    def _given_memory_of(self, source: Tensor, deferred: Deferred, *, take: bool = True) -> bool:
        """Make a deferred tensor real; returns whether it now has its values.

        If not, its storage was real already, or the checkpoint holds only a part of it and the rest
        was computed: then the caller must copy the values.
        """
        shared, target = self._together(deferred), deferred.tensor
        if deferred.slot.real is not None:
            shared.share()
            return False
        own = not is_dtensor(target) or device_to_move_to(target, torch.device("cpu")) is None
        if take and own and self._may_take(source, deferred, shared.cast):
            self._taken.add(source.data_ptr())
            shared.put(source.untyped_storage())
        elif is_dtensor(target) or deferred.is_whole():
            memory = self._made(deferred, shared.cast)
            window = deferred.ref._replace(dtype=shared.cast.dtype_of(deferred.ref))
            window.on(memory).copy_(source)
            shared.put(memory)
        else:  # the checkpoint has only a part of the storage: compute all of it first
            shared.give(deferred.values())
            return False
        return True

    def _made(self, deferred: Deferred, cast: Cast) -> torch.UntypedStorage:
        """Allocate memory for a tensor that will be copied into."""
        ref, dtype = deferred.ref, cast.dtype_of(deferred.ref)
        if not is_dtensor(deferred.tensor):
            return allocate(ref.numel * dtype.itemsize, cast.device or deferred.device)
        # FSDP2 pads uneven shards with zeros.
        nbytes = deferred.storage.nbytes // ref.dtype.itemsize * dtype.itemsize
        storage = allocate(nbytes, deferred.destination(cast))
        if not deferred.is_whole():
            torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage).zero_()
        return storage

    def _may_take(self, source: Tensor, deferred: Deferred, cast: Cast) -> bool:
        """Whether a deferred tensor can take the memory of ``source``.

        That memory must be contiguous and of exactly the right length, on the CPU, in the dtype
        that the tensor will have, and no other tensor may have taken it.
        """
        ref = deferred.ref
        nbytes = ref.numel * ref.dtype.itemsize
        return (
            nbytes > 0
            and ref.bits == 0
            and source.device.type == (cast.device or deferred.device).type == "cpu"
            and source.dtype == cast.dtype_of(ref)
            and deferred.is_whole()
            and ref.is_contiguous()
            and source.is_contiguous()
            and not (source.is_conj() or source.is_neg())
            and not source.is_inference()
            and source.storage_offset() == 0
            and source.untyped_storage().nbytes() == ref.numel * source.dtype.itemsize
            and source.data_ptr() not in self._taken
        )
