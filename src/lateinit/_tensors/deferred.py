"""Deferred tensors: how a ``meta`` tensor is known to be one, and what guards it.

What is known hangs on the tensor's *storage* (torch keeps a storage's Python object, attributes
included, for as long as the storage lives), so views, ``.data`` and ``Parameter(...)`` share it,
and it dies with the last tensor that looks at it.

Inside a block deferred tensors are plain tensors under the recorder's modes. On leaving the block
they become ``DeferredTensor``: still a ``meta`` tensor to everyone who asks, but one that cannot
be silently miscomputed with, and that survives ``deepcopy`` and pickling.
"""

from __future__ import annotations

import copy
import functools
import weakref
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedTensorMixin  # type: ignore[attr-defined]

from lateinit._program.program import Program, TensorRef
from lateinit._torch.callers import Asked, why_is_meta
from lateinit._torch.modes import (
    below_python,
    is_function_mode_in_force,
    without_functions,
    without_subclass_functions,
)
from lateinit._torch.swap import as_subclass, mark_as_parameter, swap_with_hooks
from lateinit._torch.wrappers import is_dtensor, local_part
from lateinit.errors import DeferredTensorError, NotRecordedError

_ATTRIBUTE = "_lateinit_slot"


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


_PLAIN_CLASSES = (torch.Tensor, nn.Parameter)
ON_META = Slot(Program(), 0)
"""The slot of storages that a recorded constructor itself asked to be on ``meta``."""


def attach(storage: torch.UntypedStorage, slot: Slot) -> None:
    """Let a ``meta`` storage carry a slot."""
    setattr(storage, _ATTRIBUTE, slot)


def slot_of(tensor: Tensor) -> Slot | None:
    """The slot of a tensor, or None if nothing was recorded of it."""
    plain = type(tensor) in _PLAIN_CLASSES
    guarded = not plain and isinstance(tensor, (DeferredTensor, UninitializedTensorMixin))
    if guarded or is_function_mode_in_force():
        with without_functions():
            return _slot_of(tensor)
    return _slot_of(tensor)


def _slot_of(tensor: Tensor) -> Slot | None:
    if not tensor.is_meta:
        return None
    if type(tensor) not in ORDINARY:
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


class DeferredTensor(torch.Tensor):
    """A deferred tensor outside the block that recorded it.

    It is a ``meta`` tensor to everyone who asks. Views, copies and casts of it are deferred too;
    writing to it, reading it and computing with it raise ``DeferredTensorError``.
    """

    # The layers above install these two: recording follows views and casts, and materialising
    # gives storage to a tensor that a checkpoint is copied into.
    follow: ClassVar[Callable[..., Any]]
    adopt: ClassVar[Callable[[Tensor, Tensor], None]]

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with without_subclass_functions():
            if func == torch.Tensor.is_meta.__get__:  # type: ignore[attr-defined]
                return _asked_is_meta(args[0], why_is_meta(args[0]))
            getter = getattr(func, "__name__", "") == "__get__"
            if func in _PLAIN or (getter and func not in _VIEWS):
                return func(*args, **(kwargs or {}))
            if func in _READERS:
                raise DeferredTensorError(
                    f"{func.__name__} needs the values of {described(args[0])}, which has none "
                    "yet: call lateinit.materialize() first"
                )
            if func == torch.Tensor.copy_ and is_whole_load(*args[:2]):
                DeferredTensor.adopt(args[0], args[1])
                return args[0]
            return DeferredTensor.follow(func, args, kwargs or {})

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        kind = "Parameter" if getattr(self, "_is_param", False) else "tensor"
        shape = ", ".join(map(str, self.shape))
        grad = ", requires_grad=True" if self.requires_grad else ""
        return f"<deferred {kind} ({shape}), {self.dtype}{grad}>"

    def __format__(self, spec: str) -> str:
        if not spec:
            return repr(self)
        raise DeferredTensorError(
            f"format {spec!r} needs the values of {described(self)}, which has none yet: call "
            "lateinit.materialize() first"
        )

    def __array__(self, *_: Any, **__: Any) -> Any:
        raise DeferredTensorError(
            f"numpy needs the values of {described(self)}, which has none yet: call "
            "lateinit.materialize() first"
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        if id(self) not in memo:
            memo[id(self)] = DeferredTensor.follow(_deepcopied, (self, memo), {})
        copied: Tensor = memo[id(self)]
        return copied

    def __reduce_ex__(self, proto: Any) -> Any:
        slot, _, ref = locate(self)
        cls = original_class(self)
        return _rebuild, (slot, ref, self.requires_grad, cls, _attributes(self))


class DeferredShard(DeferredTensor):
    """A deferred tensor that becomes the local part of a ``DTensor``, or that one is cut from.

    ``nn.Parameter(dtensor)`` makes a new local tensor by ``detach``, with torch functions
    disabled. So the guard has to be heard at the dispatcher, and to pass itself on.
    """

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        with below_python():
            result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.detach.default:
            guard_below_python(result)
        return result


def _asked_is_meta(tensor: Tensor, asked: Asked) -> bool:
    # load_state_dict asks only in order to warn that its copy into meta will do nothing; into a
    # deferred tensor it does something.
    if asked.why == "load":
        return False
    if asked.why == "distribute":
        guard_below_python(tensor)
    elif asked.why == "scatter":
        _scatter(asked.given)
    return True


def _scatter(asked: Mapping[str, Any]) -> None:
    """Record what torch leaves out on meta when it distributes a tensor: the copy of a part.

    Every rank holds the same deferred tensor: each takes its own part, and nothing is sent.
    """
    part = asked["scatter_list"][asked["mesh"].get_local_rank(asked["mesh_dim"])]
    with torch.no_grad():
        DeferredTensor.follow(torch.Tensor.copy_, (asked["output"], part), {})


def is_whole_load(target: Any, source: Any = None) -> bool:
    """Whether ``target.copy_(source)`` gives a deferred tensor all of its values."""
    return (
        isinstance(source, Tensor)
        and is_deferred_tensor(target)
        and not source.is_meta
        and source.shape == target.shape
    )


def is_parameter(tensor: Tensor) -> bool:
    """Whether a tensor is a parameter, guarded or not."""
    return isinstance(tensor, nn.Parameter)


@functools.cache
def _guarding(cls: type[Tensor]) -> type[Tensor] | None:
    """The class that guards tensors of a class: itself also a subclass of that class."""
    if cls in _PLAIN_CLASSES:
        return DeferredTensor
    own_guards = (DeferredTensor, UninitializedTensorMixin)
    if issubclass(cls, own_guards) or hasattr(cls, "__tensor_flatten__"):
        return None
    return type(f"Deferred{cls.__name__}", (DeferredTensor, cls), {"original": cls})


def guard(tensor: Tensor) -> None:
    """Make a deferred tensor a ``DeferredTensor``; the object stays the same."""
    guarding = _guarding(type(tensor))
    if guarding is not None:
        if type(tensor) is nn.Parameter:
            mark_as_parameter(tensor)
        tensor.__class__ = guarding


def guard_below_python(tensor: Tensor) -> None:
    """Make a deferred tensor of torch's own classes a ``DeferredShard``; the object stays."""
    guard(tensor)
    if type(tensor) is DeferredTensor:
        with without_subclass_functions(), torch.inference_mode(tensor.is_inference()):
            made = as_subclass(DeferredShard, tensor, tensor.requires_grad)
            swap_with_hooks(tensor, made)
        tensor.__class__ = DeferredShard


def unguard(tensor: Tensor) -> None:
    """Give a tensor that is deferred no longer its own class back."""
    if isinstance(tensor, DeferredTensor):
        tensor.__class__ = original_class(tensor)  # type: ignore[assignment]
        tensor.__dict__.pop("_is_param", None)


def original_class(tensor: Tensor) -> type[Tensor]:
    """The class that a tensor has when it is not guarded."""
    if type(tensor) in _OWN_CLASSES:
        return nn.Parameter if tensor.__dict__.get("_is_param") else torch.Tensor
    original: type[Tensor] = getattr(type(tensor), "original", type(tensor))
    return original


def _deepcopied(tensor: Tensor, memo: dict[int, Any]) -> Tensor:
    if is_deferred_tensor(tensor):
        return copied_by_deepcopy(tensor, memo)
    copied: Tensor = copy.deepcopy(tensor, memo)
    return copied


def copied_by_deepcopy(tensor: Tensor, memo: dict[int, Any]) -> Tensor:
    """What ``copy.deepcopy`` of a tensor would give if it were real.

    A parameter is cloned; of any other tensor the whole storage is copied, once a ``memo``, so
    that views which share it still do.
    """
    if not tensor.is_leaf:
        raise RuntimeError("only leaf tensors can be deep-copied: detach() this one first")
    with torch.no_grad():
        if is_parameter(tensor):
            data = tensor.detach().clone(memory_format=torch.preserve_format)
            return original_class(tensor)(data, tensor.requires_grad)
        storage = tensor.untyped_storage()
        key = id(storage)
        if key not in memo:
            memo[key] = torch.empty(0, dtype=torch.uint8, device="meta").set_(storage).clone()
        _, _, ref = locate(tensor)
        copied = ref._replace(bits=0).on(memo[key].untyped_storage())
        copied = copied.conj_physical() if tensor.is_conj() else copied
        copied = copied.neg() if tensor.is_neg() else copied
        copied.requires_grad_(tensor.requires_grad)
        copied.__dict__.update(_attributes(tensor))
        return copied


def _attributes(tensor: Tensor) -> dict[str, Any]:
    return {key: value for key, value in tensor.__dict__.items() if key != "_is_param"}


def _rebuild(
    slot: Slot,
    ref: TensorRef,
    requires_grad: bool,
    cls: type[Tensor],
    state: dict[str, Any],
) -> Tensor:
    tensor = slot.window(ref)
    if issubclass(cls, nn.Parameter):
        tensor = cls(tensor, requires_grad)
    else:
        tensor.requires_grad_(requires_grad)
    tensor.__dict__.update(state)
    slot.show(tensor)
    guard(tensor)
    return tensor


def described(tensor: Any) -> str:
    """A deferred tensor by its name, as far as one is known, and its shape."""
    slot = slot_of(tensor) if isinstance(tensor, Tensor) else None
    shape = tuple(getattr(tensor, "shape", ()))
    if slot is None or slot.name is None:
        return f"a deferred tensor {shape}"
    return f"the deferred tensor {slot.name!r} {shape}"


_OWN_CLASSES = (DeferredTensor, DeferredShard)
ORDINARY = frozenset({*_PLAIN_CLASSES, *_OWN_CLASSES})
"""The classes of nearly all tensors, which are neither shards nor lazy."""

_READERS = frozenset(
    {
        torch.Tensor.numpy,
        torch.Tensor.tolist,
        torch.Tensor.__dlpack__,
        torch.Tensor.share_memory_,
        torch.Tensor.backward,
        torch.Tensor.apply_,
        torch.Tensor.map_,
        torch.Tensor.map2_,
    }
)

_VIEWS = frozenset(
    getattr(torch.Tensor, name).__get__ for name in ("data", "T", "mT", "H", "mH", "real", "imag")
)
"""The attributes that are tensors on the same memory."""

_PLAIN = frozenset(
    {
        torch.Tensor.size,
        torch.Tensor.stride,
        torch.Tensor.storage_offset,
        torch.Tensor.dim,
        torch.Tensor.ndimension,
        torch.Tensor.numel,
        torch.Tensor.nelement,
        torch.Tensor.element_size,
        torch.Tensor.is_contiguous,
        torch.Tensor.is_floating_point,
        torch.Tensor.is_complex,
        torch.Tensor.is_conj,
        torch.Tensor.is_neg,
        torch.Tensor.is_inference,
        torch.Tensor.is_signed,
        torch.Tensor.is_shared,
        torch.Tensor.is_pinned,
        torch.Tensor.untyped_storage,
        torch.Tensor.data_ptr,
        torch.Tensor.get_device,
        torch.Tensor.requires_grad_,
        torch.Tensor.register_hook,
        torch.Tensor.register_post_accumulate_grad_hook,
        torch.Tensor.__hash__,
        torch.Tensor.__len__,
    }
)
