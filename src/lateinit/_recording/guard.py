"""The class of deferred tensors outside the block that recorded them.

Inside a block a deferred tensor is a plain tensor under the modes of the recorder. When the block
ends, its class becomes ``DeferredTensor``. No op can silently compute a wrong result from it, and
it can be deep-copied and pickled. A guard intercepts at two levels: ``__torch_function__`` the
calls of Python code, and ``__torch_dispatch__`` every op, also those of TorchScript, of ``vmap``,
of collectives and of a ``DTensor`` on its local part.

So this module answers the question "what happens if I call X on a deferred tensor outside a block".
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling
from torch.nn.parameter import UninitializedTensorMixin  # type: ignore[attr-defined]

from lateinit._integrations import NEEDS_VALUES, SEES_RECORDED
from lateinit._program import Program, TensorRef
from lateinit._recording import calls_after_block
from lateinit._recording.after_block import Follower, device_to, is_meta_to, is_real
from lateinit._recording.answers import (
    ANSWERS,
    PLAIN,
    VIEWS,
    is_table,
    is_whole_load,
    mark,
    need_values_of,
    realises_itself,
)
from lateinit._recording.sharding import shard_by_fsdp, take_part
from lateinit._recording.shards import watch_new_shards
from lateinit._recording.unheard import watch
from lateinit._recording.watched import Watched
from lateinit._recording.writer import current
from lateinit._tensors import (
    PLAIN_CLASSES,
    Deferred,
    Guarded,
    Slot,
    adopt,
    attributes,
    is_deferred_tensor,
    is_of_waiting,
    is_parameter,
    original_class,
    realize_now,
    share_real_storage,
    slot_of,
    waits,
)
from lateinit._torch import (
    Args,
    Kwargs,
    as_subclass,
    below_python,
    class_of_new_parameter,
    collective_that_compares,
    copy_into,
    enable_functions,
    graph_break,
    has_own_dispatch,
    inference_mode,
    is_batching,
    is_making_parameter,
    is_torch_saving,
    meant_by_device,
    restoring,
    set_eval_frame,
    tell_of_cuts,
    tell_of_fsdp_parameters,
    tensors_in,
    why_is_meta,
    without_subclass_functions,
)
from lateinit._torch.swap import swap, swap_with_hooks


class DeferredTensor(Guarded):
    """A deferred tensor outside the block that recorded it.

    Views, copies, casts and writes of it, and arithmetic among deferred tensors, are recorded.
    Reads, draws, and ops that mix it with real tensors need its values. A parameter, or a tensor on
    its storage, then raises ``DeferredTensorError``; it reports the device ``meta``. Any other
    deferred tensor realises itself, and reports the device that it was recorded for. ``copy_`` of a
    whole real tensor of the same shape makes both kinds real.
    """

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """``type(p)(data, requires_grad=...)``: a new tensor of the original class."""
        return cls.original(*args, **kwargs)

    @classmethod
    def __torch_function__(  # noqa: PLR0912 - what looks at frames has to be called from here
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if is_dynamo_compiling():
            graph_break()  # torch.compile must not trace this: the op runs outside of the graph
        compiling = set_eval_frame(None)
        try:
            with without_subclass_functions():
                # Getters arrive as fresh method-wrappers: equal to those bound here, not identical.
                if func == torch.Tensor.is_meta.__get__:  # type: ignore[attr-defined]
                    asked = why_is_meta(args[0])
                    if asked.why == "scatter":
                        _scatter(asked.given)
                    return is_meta_to(asked, args[0])
                if func == torch.Tensor.device.__get__:
                    return device_to(meant_by_device(NEEDS_VALUES, SEES_RECORDED), args[0])
                # Sizes, flags and hooks belong to the meta tensor and need no values.
                if func in PLAIN:
                    if func in _ASKED_BY_VMAP and is_batching() and realises_itself(args[0]):
                        realize_now(args[0])  # once vmap has wrapped it, that is impossible
                    with below_python():  # some are ops, such as is_pinned
                        return func(*args, **(kwargs or {}))
                if func in _MAKING and is_making_parameter() and _is_stale(args[0]):
                    # It becomes real when `_is_param` is set: only then its class is known.
                    with below_python():
                        made = func(*args, **(kwargs or {}))
                    made.__class__ = type(args[0])
                    return made
                answer = ANSWERS.get(func)
                if answer is not None and isinstance(args[0], Guarded):
                    share_real_storage(args[0])
                    if is_deferred_tensor(args[0]):
                        answered = answer(func, *args, **(kwargs or {}))
                        if answered is not NotImplemented:
                            return answered
                if getattr(func, "__name__", "") == "__get__" and func not in VIEWS:
                    return _got(func, args, kwargs or {}, collective_that_compares())
                result = follow(func, args, kwargs or {})
                if func == torch.Tensor.detach and is_making_parameter():
                    _same_class(result, args[0])
                return result
        except BaseException:
            enable_functions()  # they were enabled, since this method was called
            raise
        finally:
            set_eval_frame(compiling)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return hear(func, args, kwargs or {})

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        kind = "Parameter" if is_parameter(self) else "tensor"
        shape = ", ".join(map(str, self.shape))
        grad = ", requires_grad=True" if self.requires_grad else ""
        return f"<deferred {kind} ({shape}), {self.dtype}{grad}>"

    @property
    def _is_param(self) -> bool:
        return issubclass(self.original, nn.Parameter)

    @_is_param.setter
    def _is_param(self, value: bool) -> None:
        # torch/nn/parameter.py: Parameter.__new__ sets it on data.detach(), and would return that
        # as a tensor of the class of the data.
        made = class_of_new_parameter()
        if _is_stale(self):
            share_real_storage(self)
            self.__class__ = made  # type: ignore[assignment]
            return
        if realises_itself(self) and not is_of_waiting(self):
            # A parameter made from a table belongs to no deferred model, so it is not deferred.
            realize_now(self)
            self.__class__ = made  # type: ignore[assignment]
            return
        guarding = _guarding(made)
        if guarding is not None:
            self.__class__ = guarding  # type: ignore[assignment]
            slot = slot_of(self)
            if slot is not None and current() is None:
                slot.waits = True

    def __str__(self) -> str:
        if not waits(self):  # unlike repr, which debuggers call
            realize_now(self)
        return repr(self)

    def __format__(self, spec: str) -> str:
        if waits(self) and not spec:
            return repr(self)
        need_values_of(f"format {spec!r}", self)
        return format(self, spec)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Any:
        need_values_of("numpy", self)
        array = self.numpy()
        return array if dtype is None else array.astype(dtype, copy=False)

    def as_subclass(self, cls: Any) -> Any:
        """A deferred tensor of another class on the same memory."""
        share_real_storage(self)
        # torch/csrc/autograd/python_variable.cpp makes an object of ``cls`` for the result of an
        # op, and cannot if a guard has made one.
        with below_python():
            made = torch.Tensor.as_subclass(self, cls)
        if is_deferred_tensor(made):
            guard(made)
        return made

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        if id(self) not in memo:
            memo[id(self)] = follow(calls_after_block.deepcopied, (self, memo), {})
        copied: Tensor = memo[id(self)]
        return copied

    @restoring
    def __reduce_ex__(self, proto: Any) -> Any:
        # A table that no module of a block holds is saved as a plain tensor, without lateinit.
        if is_torch_saving(between=1) and is_table(self):
            realize_now(self)
            return self.__reduce_ex__(proto)
        if _is_stale(self) and not waits(self):
            share_real_storage(self)
            return self.__reduce_ex__(proto)
        deferred = Deferred.of(self)
        cls = original_class(self)
        return _rebuild, (deferred.slot, deferred.ref, self.requires_grad, cls, attributes(self))


def _got(func: Any, args: Args, kwargs: Kwargs, collective: str | None) -> Any:
    """A property of the meta tensor; a collective that compares it will need the values next."""
    if collective is not None and not is_real(args[0]):
        need_values_of(collective, args[0])
    return func(*args, **kwargs)


def _is_stale(tensor: Tensor) -> bool:
    """Whether the storage of a deferred tensor has become real through another tensor."""
    slot = slot_of(tensor)
    return slot is not None and slot.real is not None


def _same_class(made: Tensor, data: Tensor) -> None:
    """Give ``data.detach()`` the class of ``data``, which ``nn.Parameter(data)`` requires."""
    if isinstance(made, Guarded) and isinstance(data, Guarded):
        made.__class__ = type(data)


def _scatter(asked: Mapping[str, Any]) -> None:
    """Record the copy that ``mesh_scatter`` skips on meta: this rank's part into its output.

    Every rank holds the same deferred tensor, so each takes its own part and nothing is sent.

    Args:
        asked: the local variables of torch/distributed/tensor/_collective_utils.py: mesh_scatter.
    """
    part = asked["scatter_list"][asked["mesh"].get_local_rank(asked["mesh_dim"])]
    with torch.no_grad():
        follow(torch.Tensor.copy_, (asked["output"], part), {})


@functools.cache
def _guarding(cls: type[Tensor]) -> type[Tensor] | None:
    """The guarding subclass of a tensor class, or None if its tensors are not guarded.

    Not guarded are tensors that are guarded already, lazy placeholders, and wrapper subclasses.
    """
    if cls is torch.Tensor:
        return DeferredTensor
    own_guards = (Guarded, UninitializedTensorMixin)
    if issubclass(cls, own_guards) or hasattr(cls, "__tensor_flatten__"):
        return None
    return type(f"Deferred{cls.__name__}", (DeferredTensor, cls), {"original": cls})


def hear(func: Callable[..., Any], args: Args, kwargs: Kwargs) -> Any:
    """Call an op on deferred tensors that has reached the dispatcher."""
    # In a block the recorder has intercepted the op already, and runs it on meta for its shapes.
    # Also, a tensor that was set to memory which no block recorded still has its guard.
    if current() is not None or not any(map(is_deferred_tensor, tensors_in(args, kwargs))):
        with below_python():
            return func(*args, **kwargs)
    if func is copy_into and is_whole_load(*args[:2]):  # for a shard, on its local part
        adopt(args[0], args[1])
        return args[0]
    return follow(func, args, kwargs, at_dispatch=True)


def guard(tensor: Tensor) -> None:
    """Give a deferred tensor object its guarding class, in place."""
    guarding = _guarding(type(tensor))
    if guarding is None:
        return
    if issubclass(guarding, nn.Parameter):
        mark(tensor)
    # Assigning the class is not enough: the dispatcher calls __torch_dispatch__ only for tensors
    # that were created with such a class. So create one, and exchange implementations.
    inference = tensor.is_inference()
    try:
        if inference == torch.is_inference_mode_enabled():
            _exchange(tensor, guarding)
        else:
            with inference_mode(inference):
                _exchange(tensor, guarding)
        tensor.__class__ = guarding
    except BaseException:
        if has_own_dispatch(tensor):
            tensor.__class__ = guarding
        raise


def _exchange(tensor: Tensor, guarding: type[Tensor]) -> None:
    leaf = tensor.is_leaf
    requires = leaf and tensor.requires_grad
    gradient = tensor.grad if requires else None
    if type(tensor) in PLAIN_CLASSES:
        made = as_subclass(guarding, tensor, requires)
    else:  # a user's class may intercept functions and ops itself
        with without_subclass_functions(), below_python():
            made = as_subclass(guarding, tensor, requires)
    with without_subclass_functions():
        if leaf:
            swap_with_hooks(tensor, made)
        else:
            swap(tensor, made)
        if gradient is not None:
            tensor.grad = gradient


@restoring
def _rebuild(
    slot: Slot,
    ref: TensorRef,
    requires_grad: bool,
    cls: type[Tensor],
    state: dict[str, Any],
) -> Tensor:
    """Unpickle a deferred tensor; the pickles of ``__reduce_ex__`` hold this function by name."""
    tensor = slot.window(ref)
    if issubclass(cls, nn.Parameter):
        tensor = cls(tensor, requires_grad)
    elif cls is not torch.Tensor:
        tensor = as_subclass(cls, tensor, requires_grad)
    else:
        tensor.requires_grad_(requires_grad)
    tensor.__dict__.update(state)
    guard(tensor)
    watch(slot.resolve()[0])
    return tensor


watch_fully_shard = Watched(
    partial(tell_of_fsdp_parameters, partial(shard_by_fsdp, guard)),
    partial(tell_of_fsdp_parameters, None),
).add
watch_cuts = Watched(
    partial(tell_of_cuts, partial(take_part, guard)), partial(tell_of_cuts, None)
).add


def watch_sharding(program: Program) -> None:
    """From now on intercept the sharding of the deferred tensors of a program."""
    watch_new_shards(program)
    watch_fully_shard(program)
    watch_cuts(program)


def _follower_of(program: Program) -> Follower:
    watch_sharding(program)
    return Follower(program, guard)


follow = partial(calls_after_block.follow, _follower_of)
"""Call a torch function on deferred tensors: see ``calls_after_block``."""

# The methods that Parameter.__new__ calls on data that is no plain tensor (torch/nn/parameter.py).
_MAKING = (torch.Tensor.detach, torch.Tensor.requires_grad_)
_ASKED_BY_VMAP = (torch.Tensor.dim, torch.Tensor.size)
