"""The class that guards deferred tensors outside the block that recorded them.

Inside a block deferred tensors are plain tensors under the recorder's modes. On leaving it they
become ``DeferredTensor``: still on ``meta`` to everyone who asks, but nothing can be silently
miscomputed with them, and they survive ``deepcopy`` and pickling.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedTensorMixin  # type: ignore[attr-defined]

from lateinit._program.program import TensorRef
from lateinit._tensors.copying import attributes, copied_by_deepcopy
from lateinit._tensors.slots import (
    PLAIN_CLASSES,
    Guarded,
    Slot,
    described,
    is_deferred_tensor,
    locate,
    original_class,
)
from lateinit._torch.callers import Asked, is_batch_norm_loading, why_is_meta
from lateinit._torch.modes import (
    below_python,
    without_subclass_functions,
)
from lateinit._torch.swap import as_subclass, mark_as_parameter, swap_with_hooks
from lateinit.errors import DeferredTensorError


class DeferredTensor(Guarded):
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
            if func == torch.Tensor.device.__get__ and is_batch_norm_loading():
                return _recorded_device(args[0])
            getter = getattr(func, "__name__", "") == "__get__"
            if func in _PLAIN or (getter and func not in _VIEWS):
                return func(*args, **(kwargs or {}))
            if func in _READERS:
                raise DeferredTensorError(
                    f"{func.__name__} needs the values of {described(args[0])}, which has none "
                    "yet: call lateinit.materialize() first"
                )
            if func == torch.Tensor.copy_ and args[0] is args[1]:
                return args[0]
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
        return _rebuild, (slot, ref, self.requires_grad, cls, attributes(self))


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


def _recorded_device(tensor: Tensor) -> torch.device:
    if not is_deferred_tensor(tensor):
        return tensor.device
    _, program, ref = locate(tensor)
    return program.storages[ref.storage].device


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


@functools.cache
def _guarding(cls: type[Tensor]) -> type[Tensor] | None:
    """The class that guards tensors of a class: itself also a subclass of that class."""
    if cls in PLAIN_CLASSES:
        return DeferredTensor
    own_guards = (Guarded, UninitializedTensorMixin)
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


def _deepcopied(tensor: Tensor, memo: dict[int, Any]) -> Tensor:
    if is_deferred_tensor(tensor):
        return copied_by_deepcopy(tensor, memo)
    copied: Tensor = copy.deepcopy(tensor, memo)
    return copied


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
