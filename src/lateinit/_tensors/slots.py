"""Tell deferred tensors from other ``meta`` tensors: a deferred storage carries a ``Slot``.

The slot is an attribute of the storage's Python object. torch keeps that object, attributes
included, for as long as the storage lives (torch/csrc/Storage.cpp). So views, ``.data`` and
``Parameter(...)`` share the slot, and the slot dies with the last tensor on the storage.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedTensorMixin  # type: ignore[attr-defined]

from lateinit._program import Program, TensorRef
from lateinit._replay import drop_later
from lateinit._tensors.cast import Real
from lateinit._tensors.storage import SLOT, DeferredStorage
from lateinit._torch import (
    is_dtensor,
    is_function_mode_in_force,
    local_part,
    without_functions,
)
from lateinit.errors import DeferredTensorError

PLAIN_CLASSES = (torch.Tensor, nn.Parameter)
_PICKLED = ("lazy", "name", "of_waiting", "waits")


class Slot:
    """The place of one storage in a program.

    ``real`` is the materialised memory, None before the first tensor on the storage becomes real.
    Tensors on the same storage that are materialised later share it. ``waits`` is True if one of
    the tensors is a parameter or a shard, or was computed from one after the block: these wait for
    ``materialize``, all others realise themselves. ``of_waiting`` is True if the storage was made
    from a waiting tensor or from its shape (``zeros_like``): a parameter or a shard made from it
    waits too. ``lazy`` is the name of another library's placeholder if this storage is its empty
    data, where writes would be lost.
    """

    __slots__ = ("_storage", "lazy", "name", "number", "of_waiting", "program", "real", "waits")

    def __init__(self, program: Program, number: int) -> None:
        self.program = program
        self.number = number
        self.name: str | None = None  # fqn of the first tensor on the storage that has one
        self.real: Real | None = None
        self.waits = self.of_waiting = False
        self.lazy: str | None = None
        self._storage: Callable[[], torch.UntypedStorage | None] = _nothing

    def __del__(self) -> None:
        if not hasattr(self, "number"):  # a pickle was not read to its end
            return
        program, number = self.resolve()
        if number < len(program.storages):
            program.storages[number].gone = True
            program.gone += 1
            if program.gone >= program.drop_at:
                drop_later(program)

    def resolve(self) -> tuple[Program, int]:
        """The program and the storage's number in it, after any merging of programs."""
        # Program.absorb() leaves a forwarding address in the absorbed program. It is followed here,
        # at the first look-up after the merge, so that a merge need not search for all slots.
        while self.program.merged_into is not None:
            self.program, bases = self.program.merged_into
            self.number += bases.storage
        return self.program, self.number

    def window(self, ref: TensorRef) -> Tensor:
        """The meta tensor of a window, on the storage that carries this slot.

        Used to unpickle: the first window makes the storage, later windows find it.
        """
        storage = self._storage()
        if storage is None:
            program, number = self.resolve()
            storage = torch.UntypedStorage(program.storages[number].nbytes, device="meta")
            attach(storage, self)
            self._storage = weakref.ref(storage)
        return ref.on(storage)

    def __getstate__(self) -> dict[str, Any]:
        # torch pickles the real tensors on this storage separately: they would no longer share
        # memory with the deferred ones.
        if self.real is not None:
            raise DeferredTensorError(
                "cannot pickle a deferred tensor whose storage is shared with one that is "
                "materialised already: materialise the rest first"
            )
        program, number = self.resolve()
        named = {name: getattr(self, name) for name in _PICKLED}
        return {"program": program, "number": number, **named}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["program"], state["number"])  # type: ignore[misc]
        for name in _PICKLED:
            setattr(self, name, state[name])


def _nothing() -> None:
    return None


ON_META = Slot(Program(), 0)
"""The slot of storages that a recorded constructor itself put on ``meta``: never materialised."""


class Guarded(torch.Tensor):
    """Base of the classes of deferred tensors outside a block (see ``guard``).

    ``original`` is the class of the tensor without its guard.
    """

    original: ClassVar[type[Tensor]] = torch.Tensor


class GuardedShard:
    """Base of the classes of ``DTensor`` whose local part is deferred, outside a block.

    ``original`` is the class of the shard without its guard.
    """

    __slots__ = ()
    original: ClassVar[type[Tensor]]


def unguard(tensor: Tensor) -> None:
    """Give a tensor its original class back, since it becomes real."""
    if isinstance(tensor, (Guarded, GuardedShard)):
        tensor.__class__ = original_class(tensor)  # type: ignore[assignment]


def is_ordinary(tensor: Any) -> bool:
    """Whether a tensor is a plain, parameter or guarded tensor: no ``DTensor``, not lazy."""
    cls = type(tensor)
    return cls in PLAIN_CLASSES or (issubclass(cls, Guarded) and cls.original in PLAIN_CLASSES)


def attach(storage: torch.UntypedStorage, slot: Slot) -> None:
    """Attach a slot to a ``meta`` storage."""
    setattr(storage, SLOT, slot)
    if slot is not ON_META:
        storage.__class__ = DeferredStorage


_HEARING = (Guarded, GuardedShard, UninitializedTensorMixin)


def slot_of(tensor: Tensor) -> Slot | None:
    """The slot of a tensor, or None if its storage was not recorded."""
    # Guarded and lazy tensors, and function modes, override ``is_meta``: a block's function mode
    # returns False for a deferred tensor. Only with all of them off is the answer the real one.
    # Plain tensors outside function modes skip this, since it runs for every op.
    plain = type(tensor) in PLAIN_CLASSES
    guarded = not plain and isinstance(tensor, _HEARING)
    if guarded or is_function_mode_in_force():
        with without_functions():
            return _slot_of(tensor)
    return _slot_of(tensor)


def _slot_of(tensor: Tensor) -> Slot | None:
    if not tensor.is_meta:
        return None
    if type(tensor) not in PLAIN_CLASSES and not isinstance(tensor, Guarded):
        tensor = held(tensor)
    try:
        return getattr(tensor.untyped_storage(), SLOT, None)
    except (NotImplementedError, RuntimeError):  # layouts that have no storage
        return None


def held(tensor: Tensor) -> Tensor:
    """The tensor that owns the memory: the local part of a ``DTensor``, else the tensor itself."""
    return local_part(tensor) if is_dtensor(tensor) else tensor


def is_deferred_tensor(tensor: Tensor) -> bool:
    """Whether a tensor is deferred: its construction is recorded and not yet run."""
    slot = slot_of(tensor)
    return slot is not None and slot is not ON_META


def take_place(tensor: Tensor, other: Tensor) -> None:
    """Have a deferred tensor wait if ``other``, which it replaces, waits."""
    slot, source = slot_of(tensor), slot_of(other)
    if slot is not None and source is not None:
        slot.name, slot.waits = source.name, source.waits
        slot.of_waiting = source.of_waiting
        (program, number), (origins, origin) = slot.resolve(), source.resolve()
        program.storages[number].made_of = origins.storages[origin].made_of


def waits(tensor: Tensor) -> bool:
    """Whether a deferred tensor waits for ``materialize``: a parameter, or on the storage of one.

    Any other deferred tensor realises itself when its values are needed.
    """
    slot = slot_of(tensor)
    return slot is not None and slot.waits


def is_of_waiting(tensor: Tensor) -> bool:
    """Whether a deferred tensor waits, or was made from one that waits."""
    slot = slot_of(tensor)
    return slot is not None and (slot.waits or slot.of_waiting)


def is_parameter(tensor: Tensor) -> bool:
    """Whether a tensor is a parameter, guarded or not."""
    return isinstance(tensor, nn.Parameter)


def address_of(tensor: Tensor) -> int:
    """``data_ptr()`` of a deferred tensor: code compares addresses to find ties and overlaps."""
    if tensor.numel() == 0:  # on every device, an empty tensor has address 0
        return 0
    storage = tensor.untyped_storage()
    return int(storage.data_ptr() + tensor.storage_offset() * tensor.element_size())


def described(tensor: Any) -> str:
    """The words for a deferred tensor in an error message: its name, if known, and its shape."""
    slot = slot_of(tensor) if isinstance(tensor, Tensor) else None
    shape = tuple(getattr(tensor, "shape", ()))
    if slot is None or slot.name is None:
        return f"a deferred tensor {shape}"
    return f"the deferred tensor {slot.name!r} {shape}"


def original_class(tensor: Tensor) -> type[Tensor]:
    """The class of a tensor without its guard."""
    return tensor.original if isinstance(tensor, (Guarded, GuardedShard)) else type(tensor)
