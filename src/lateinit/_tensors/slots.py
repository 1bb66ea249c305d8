"""How a ``meta`` tensor is known to be deferred: by a slot that its storage carries.

torch keeps a storage's Python object, attributes included, for as long as the storage lives. So
views, ``.data`` and ``Parameter(...)`` share the slot, and it dies with the last tensor on it.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedTensorMixin  # type: ignore[attr-defined]

from lateinit._program.program import Program, TensorRef
from lateinit._torch.modes import (
    is_function_mode_in_force,
    without_functions,
    without_subclass_functions,
)
from lateinit._torch.wrappers import is_dtensor, local_part
from lateinit.errors import DeferredTensorError, NotRecordedError

_ATTRIBUTE = "_lateinit_slot"
PLAIN_CLASSES = (torch.Tensor, nn.Parameter)


class Slot:
    """The place of a storage in a program.

    ``real`` is the storage that took its place once a tensor on it was materialised, ``cast`` the
    device and dtype that were asked for then: those that are materialised later must share it.
    """

    __slots__ = ("_shown", "cast", "name", "number", "program", "real")

    def __init__(self, program: Program, number: int) -> None:
        self.program = program
        self.number = number
        self.name: str | None = None  # of the first tensor on it that hangs on a module
        self.real: torch.UntypedStorage | None = None
        self.cast: tuple[torch.device | None, torch.dtype | None] = (None, None)
        self._shown: Callable[[], Tensor | None] = _nothing

    def resolve(self) -> tuple[Program, int]:
        """The program and the number in it, wherever programs have been merged to."""
        while self.program.merged_into is not None:
            self.program, bases = self.program.merged_into
            self.number += bases.storage
        return self.program, self.number

    def window(self, ref: TensorRef) -> Tensor:
        """A meta tensor on the storage that carries this slot, made anew in another process."""
        shown = self._shown()
        if shown is None:
            program, number = self.resolve()
            storage = torch.UntypedStorage(program.storages[number].nbytes, device="meta")
            attach(storage, self)
        else:
            storage = shown.untyped_storage()
        tensor = ref.on(storage)
        self.show(tensor)
        return tensor

    def show(self, tensor: Tensor) -> None:
        """Remember a tensor on the storage, for as long as it lives."""
        self._shown = weakref.ref(tensor)

    def __getstate__(self) -> dict[str, Any]:
        if self.real is not None:
            raise DeferredTensorError(
                "cannot pickle a deferred tensor whose storage is shared with one that is "
                "materialised already: materialise the rest first"
            )
        program, number = self.resolve()
        return {"program": program, "number": number, "name": self.name}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["program"], state["number"])  # type: ignore[misc]
        self.name = state["name"]


def _nothing() -> None:
    return None


ON_META = Slot(Program(), 0)
"""The slot of storages that a recorded constructor itself asked to be on ``meta``."""


class Guarded(torch.Tensor):
    """The base of the classes that guard deferred tensors after the block (see ``guard``).

    ``original`` is the class that a tensor has when it is not guarded, if it is not torch's own.
    """

    original: ClassVar[type[Tensor] | None] = None


def is_ordinary(tensor: Any) -> bool:
    """Whether a tensor is of one of the classes of nearly all: neither a shard nor lazy."""
    return type(tensor) in PLAIN_CLASSES or isinstance(tensor, Guarded)


def attach(storage: torch.UntypedStorage, slot: Slot) -> None:
    """Let a ``meta`` storage carry a slot."""
    setattr(storage, _ATTRIBUTE, slot)


def slot_of(tensor: Tensor) -> Slot | None:
    """The slot of a tensor, or None if nothing was recorded of it."""
    plain = type(tensor) in PLAIN_CLASSES
    guarded = not plain and isinstance(tensor, (Guarded, UninitializedTensorMixin))
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
        return getattr(tensor.untyped_storage(), _ATTRIBUTE, None)
    except (NotImplementedError, RuntimeError):  # layouts that have no storage
        return None


def held(tensor: Tensor) -> Tensor:
    """The tensor that has the memory: of a ``DTensor`` its local shard."""
    return local_part(tensor) if is_dtensor(tensor) else tensor


def is_deferred_tensor(tensor: Tensor) -> bool:
    """Whether a tensor's construction is recorded and not yet run."""
    slot = slot_of(tensor)
    return slot is not None and slot is not ON_META


def locate(tensor: Tensor) -> tuple[Slot, Program, TensorRef]:
    """Where the construction of a deferred tensor is recorded."""
    slot = slot_of(tensor)
    if slot is None or slot is ON_META:
        raise NotRecordedError(
            f"a meta tensor of shape {tuple(tensor.shape)} was never recorded: build it inside "
            "`with lateinit.deferred():`"
        )
    program, number = slot.resolve()
    with without_subclass_functions():
        ref = TensorRef.of(held(tensor), number)
    return slot, program, ref


def is_parameter(tensor: Tensor) -> bool:
    """Whether a tensor is a parameter, guarded or not."""
    return isinstance(tensor, nn.Parameter)


def described(tensor: Any) -> str:
    """A deferred tensor by its name, as far as one is known, and its shape."""
    slot = slot_of(tensor) if isinstance(tensor, Tensor) else None
    shape = tuple(getattr(tensor, "shape", ()))
    if slot is None or slot.name is None:
        return f"a deferred tensor {shape}"
    return f"the deferred tensor {slot.name!r} {shape}"


def original_class(tensor: Tensor) -> type[Tensor]:
    """The class that a tensor has when it is not guarded."""
    if not isinstance(tensor, Guarded):
        return type(tensor)
    original = type(tensor).original
    if original is not None:
        return original
    return nn.Parameter if tensor.__dict__.get("_is_param") else torch.Tensor
