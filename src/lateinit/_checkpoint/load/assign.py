"""Put the values of a checkpoint into the tensors of a module, as cheaply as each allows."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from lateinit._identity import IdentityMap
from lateinit._materialize.materialize import materialize
from lateinit._program import Program, TensorRef
from lateinit._replay import Replay
from lateinit._tensors import (
    ON_META,
    Cast,
    Slot,
    Wanted,
    destination,
    held,
    home,
    is_deferred_tensor,
    locate,
    place,
    slot_of,
)
from lateinit._torch import allocate, is_dtensor, without_modes

_NO_STRIDES: dict[TensorRef, tuple[int, ...]] = {}
_Entry = tuple[str, Tensor, Slot, TensorRef]


class Placer:
    """Puts values into tensors, one at a time.

    A deferred tensor on the CPU with the dtype of the values takes their memory (*zero-copy*); for
    any other deferred tensor memory is allocated and copied into; a real tensor is copied into. All
    tensors on one storage become real together.
    """

    def __init__(self, groups: Iterable[Wanted], cast: Cast) -> None:
        self._cast = cast
        self._sharing: dict[Slot, list[_Entry]] = {
            tensors[0][2]: tensors for group in groups for tensors in group.tensors.values()
        }
        self._known = IdentityMap(
            (tensor, (slot, group.program, ref))
            for group in groups
            for tensors in group.tensors.values()
            for _, tensor, slot, ref in tensors
        )
        # Data pointers of the memory that was given away: no second tensor may have it.
        self._taken: set[int] = set()

    def holds(self, tensor: Tensor) -> bool:
        """Whether a tensor is deferred: in a load it is a stand-in for itself, without values."""
        return is_deferred_tensor(tensor) and not is_lazy(tensor)

    def device(self, tensor: Tensor) -> torch.device:
        """The device where the values of a deferred tensor will be."""
        return destination(tensor, self._cast)

    def reveal(self, tensor: Tensor) -> None:
        """Materialise a tensor if it is deferred, and the tensors that share its memory."""
        if not self.holds(tensor):
            return
        entries = self._sharing.get(locate(tensor)[0], ())
        together = [tensor, *(entry[1] for entry in entries)]
        materialize(together, device=self._cast.device, dtype=self._cast.dtype)

    def put(self, target: Tensor, source: Tensor, *, take: bool) -> None:
        """Do ``target.copy_(source)``; ``target`` may be deferred, or a shard of the whole.

        Args:
            target: a tensor of the module.
            source: its values.
            take: whether ``target`` may keep the memory of ``source``, which nobody else may use
                then.
        """
        source = source.detach()
        known = self._place_in_program(target)
        if known is not None:
            with without_modes():
                taken = self._given_memory_of(target, source, *known, take=take)
            if taken:
                return
        inference = held(target).is_inference()
        with torch.inference_mode() if inference else torch.no_grad():
            held(target).copy_(source)

    def put_plainly(self, pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Put values into tensors of torch's own classes, one after another."""
        with without_modes():
            for target, source in pairs:
                known = self._place_in_program(target)
                if known is None or not self._given_memory_of(target, source, *known):
                    target.copy_(source)

    def _place_in_program(self, target: Tensor) -> tuple[Slot, Program, TensorRef] | None:
        """Where a tensor's construction is recorded; None if it is not deferred."""
        slot = slot_of(target)
        if slot is None or slot is ON_META:
            return None
        found = self._known.get(target)
        return found if found is not None and found[0] is slot else locate(target)

    def _given_memory_of(
        self,
        target: Tensor,
        source: Tensor,
        slot: Slot,
        program: Program,
        ref: TensorRef,
        *,
        take: bool = True,
    ) -> bool:
        """Make a deferred tensor real; returns whether it has its values already.

        It has not if its storage was real already, or if the checkpoint holds only a part of it and
        the rest was computed: then the caller copies the values.
        """
        tensors = self._sharing.get(slot) or [("", target, slot, ref)]
        own = not is_dtensor(target) or home(target, torch.device("cpu")) is None
        storage, strides, filled = slot.real, _NO_STRIDES, False
        if storage is None and take and own and self._may_take(source, program, ref):
            self._taken.add(source.data_ptr())
            storage, filled = source.untyped_storage(), True
        elif storage is None and (is_dtensor(target) or program.covers(ref)):
            storage, filled = self._made(target, program, ref), True
            ref._replace(dtype=self._cast.dtype_of(ref)).on(storage).copy_(source)
        if filled:  # not before: an interruption up to here leaves a deferred tensor
            slot.real = storage
        if storage is None:  # the checkpoint has a part of it: the rest is computed
            replay = Replay(program)
            storage = replay.values([ref.storage])[ref.storage]
            strides = replay.strides
        place(tensors, storage, self._cast, strides)
        return filled

    def _made(self, target: Tensor, program: Program, ref: TensorRef) -> torch.UntypedStorage:
        """Allocate memory for a tensor that will be copied into."""
        if is_dtensor(target):
            return self._padded(target, program, ref)
        dtype = self._cast.dtype_of(ref)
        return allocate(ref.numel * dtype.itemsize, self._device(program, ref))

    def _padded(self, shard: Tensor, program: Program, ref: TensorRef) -> torch.UntypedStorage:
        """Allocate memory for a shard, with the zeros that FSDP2 pads uneven shards with."""
        known, dtype = program.storages[ref.storage], self._cast.dtype_of(ref)
        nbytes = known.nbytes // ref.dtype.itemsize * dtype.itemsize
        storage = allocate(nbytes, self.device(shard))
        if not program.covers(ref):
            torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage).zero_()
        return storage

    def _may_take(self, source: Tensor, program: Program, ref: TensorRef) -> bool:
        """Whether a storage can be the memory of the values.

        It must be exactly as long and contiguous, on the CPU, in the dtype that the tensor will
        have, and must not have been given to another tensor.
        """
        nbytes = ref.numel * ref.dtype.itemsize
        return (
            nbytes > 0
            and ref.bits == 0
            and source.device.type == self._device(program, ref).type == "cpu"
            and source.dtype == self._cast.dtype_of(ref)
            and program.covers(ref)
            and ref.is_contiguous()
            and source.is_contiguous()
            and not (source.is_conj() or source.is_neg())
            and not source.is_inference()
            and source.storage_offset() == 0
            and source.untyped_storage().nbytes() == ref.numel * source.dtype.itemsize
            and source.data_ptr() not in self._taken
        )

    def _device(self, program: Program, ref: TensorRef) -> torch.device:
        return self._cast.device or program.storages[ref.storage].device
