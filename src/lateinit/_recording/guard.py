"""The class of deferred tensors outside the block that recorded them.

Inside a block a deferred tensor is a plain tensor under the modes of the recorder. When the block
ends, its class becomes ``DeferredTensor``. No op can silently compute a wrong result from it, and
it can be deep-copied and pickled. A guard hears at two levels:
``__torch_function__`` the calls of Python code, and ``__torch_dispatch__`` every op, also those of
TorchScript, of ``vmap``, of collectives and of a ``DTensor`` on its local part.

Come here for the answer to "what happens if I call X on a deferred tensor outside a block".
"""

from __future__ import annotations

import copy
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
from lateinit._recording import composite_ops
from lateinit._recording.after_block import (
    Follower,
    as_meant,
    device_to,
    is_meta_to,
    is_real,
    refusal,
    refuse_lost,
)
from lateinit._recording.answers import (
    ANSWERS,
    PLAIN,
    VIEWS,
    is_table,
    is_whole_load,
    need_values_of,
    realises_itself,
    shows_the_same,
)
from lateinit._recording.argument_checks import EMPTY, check_data
from lateinit._recording.autocast import casts_of_autocast
from lateinit._recording.conversions import AFTER_BLOCK, CONVERSIONS
from lateinit._recording.recorder import in_force
from lateinit._recording.sharding import shard_by_fsdp, take_part
from lateinit._recording.shards import watch_new_shards
from lateinit._recording.unheard import watch
from lateinit._recording.watched import Watched
from lateinit._recording.writer import current
from lateinit._replay import one_thread
from lateinit._tensors import (
    PLAIN_CLASSES,
    Deferred,
    Guarded,
    Slot,
    adopt,
    attributes,
    copied_by_deepcopy,
    described,
    is_deferred_tensor,
    is_of_waiting,
    is_parameter,
    original_class,
    realize_now,
    share_real_storage,
    show,
    slot_of,
    waits,
)
from lateinit._torch import (
    Args,
    Kwargs,
    as_subclass,
    base_of,
    below_python,
    class_of_new_parameter,
    collective_that_compares,
    copy_into,
    enable_functions,
    flat,
    functions_state,
    graph_break,
    has_own_dispatch,
    inference_mode,
    is_batching,
    is_differentiating,
    is_fake,
    is_functorch_running,
    is_making_parameter,
    is_torch_saving,
    meant_by_device,
    mend,
    noted_modes,
    restoring,
    set_eval_frame,
    set_functions_state,
    tell_of_cuts,
    tell_of_fsdp_parameters,
    tensors_in,
    why_is_meta,
    without_subclass_functions,
)
from lateinit._torch.swap import swap, swap_with_hooks
from lateinit.errors import DeferredTensorError


class DeferredTensor(Guarded):
    """A deferred tensor outside the block that recorded it.

    Views, copies, casts and writes of it, and arithmetic among deferred tensors, are recorded.
    Reads, draws, and ops that mix it with real tensors need its values. A parameter, or what shares
    its storage, then raises ``DeferredTensorError``; it reports the device ``meta``. Any other
    deferred tensor realises itself, and reports the device that it will have. ``copy_`` of a whole
    real tensor of the same shape makes either real.
    """

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """``type(p)(data, requires_grad=...)``: code makes a parameter of the class of another."""
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
                        realize_now(args[0])  # what vmap wraps is out of reach
                    with below_python():  # some are ops, such as is_pinned
                        return func(*args, **(kwargs or {}))
                if func in _MAKING and is_making_parameter() and _is_stale(args[0]):
                    # It becomes real when `_is_param` is set, which says of which class it is.
                    with below_python():
                        made = func(*args, **(kwargs or {}))
                    made.__class__ = type(args[0])
                    return made
                answer = _ANSWERS.get(func)
                if answer is not None and isinstance(args[0], Guarded):
                    share_real_storage(args[0])
                    if is_deferred_tensor(args[0]):
                        return answer(func, *args, **(kwargs or {}))
                if getattr(func, "__name__", "") == "__get__" and func not in VIEWS:
                    return _got(func, args, kwargs or {}, collective_that_compares())
                result = follow(func, args, kwargs or {})
                if func == torch.Tensor.detach and is_making_parameter():
                    _same_class(result, args[0])
                return result
        except BaseException:
            enable_functions()  # they were, or this would not have been called
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
            # Made of a table: a deferred parameter would be none of a deferred model.
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
            memo[id(self)] = follow(_deepcopied, (self, memo), {})
        copied: Tensor = memo[id(self)]
        return copied

    @restoring
    def __reduce_ex__(self, proto: Any) -> Any:
        # A file must not need lateinit for a table that no module of a block holds.
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
    """A property of the meta tensor; a collective that compares it is about to need the values."""
    if collective is not None and not is_real(args[0]):
        need_values_of(collective, args[0])
    return func(*args, **kwargs)


def _copy(func: Any, tensor: Tensor, source: Any, *args: Any, **kwargs: Any) -> Any:
    """``tensor.copy_(source)``: a load if the source is real."""
    if is_whole_load(tensor, source):
        owner = base_of(tensor)
        if torch.is_grad_enabled() and owner.requires_grad and owner.is_leaf:
            func(tensor, tensor)  # raises torch's error
        adopt(tensor, source)
        return tensor
    if shows_the_same(tensor, source):
        return tensor
    return follow(func, (tensor, source, *args), kwargs)


def _module_load(func: Any, tensor: Tensor, other: Any, assign: bool = False) -> Any:
    """What ``load_state_dict`` calls under ``set_swap_module_params_on_conversion``."""
    if assign or not is_whole_load(tensor, other):
        return follow(func, (tensor, other, assign), {})
    return _copy(torch.Tensor.copy_, tensor, other).detach()


def _set_data(func: Any, tensor: Tensor, data: Any) -> None:
    """``tensor.data = data``, which torch refuses if exactly one of them is on meta."""
    slot = slot_of(tensor)
    if slot is not None and slot.lazy is not None and isinstance(data, Tensor):
        data = _data_of_placeholder(slot, tensor, data)
    if not isinstance(data, Tensor) or is_deferred_tensor(data):
        func(tensor, data)
        _mark(tensor)
        return
    if data.is_meta or is_fake(data):
        kind = "meta" if data.is_meta else "fake"
        raise DeferredTensorError(
            f"setting .data of {described(tensor)} to a {kind} tensor, which has no values, would "
            "lose its own: do this inside `with lateinit.deferred():`, or after "
            "lateinit.materialize()"
        )
    show(tensor, data.detach())


def _data_of_placeholder(slot: Slot, tensor: Any, data: Tensor) -> Tensor:
    """What a placeholder of pytorch-pfn-extras gets for data: see ``argument_checks.check_data``.

    Its ``materialize`` allocates on the device of its data, which is ``meta`` here.
    """
    check_data(slot, tensor, data)
    converted = slot_of(data)
    if converted is not None and data.size() == EMPTY:
        converted.lazy = slot.lazy
    if converted is None and data.is_meta:
        return torch.empty(data.shape, dtype=data.dtype, device=Deferred.of(tensor).device)
    return data


def _is_stale(tensor: Tensor) -> bool:
    """Whether the storage of a deferred tensor is real by now, through another tensor."""
    slot = slot_of(tensor)
    return slot is not None and slot.real is not None


def _same_class(made: Tensor, data: Tensor) -> None:
    """Give ``data.detach()`` the class of ``data``: ``nn.Parameter(data)`` insists on that."""
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
    """The guarding subclass of a tensor class, or None if its tensors are not to be guarded.

    Not guarded are tensors that are guarded already, lazy placeholders, and wrapper subclasses.
    """
    if cls is torch.Tensor:
        return DeferredTensor
    own_guards = (Guarded, UninitializedTensorMixin)
    if issubclass(cls, own_guards) or hasattr(cls, "__tensor_flatten__"):
        return None
    return type(f"Deferred{cls.__name__}", (DeferredTensor, cls), {"original": cls})


def follow(
    func: Callable[..., Any], args: Args, kwargs: Kwargs, *, at_dispatch: bool = False
) -> Any:
    """Call a torch function on deferred tensors outside the block that recorded them.

    In another block its modes record the call.

    If it cannot be recorded, the deferred tensors realise themselves and it is called again, unless
    one of them waits for ``materialize``.

    Args:
        func: the function.
        args: its positional arguments.
        kwargs: its keyword arguments.
        at_dispatch: whether it is an op at the dispatcher. If it has a graph by now, no tensor may
            realise itself: the graph has its meta tensor, and backward ends in an internal error.
    """
    if current() is not None:
        return func(*args, **kwargs)
    mend()
    before = noted_modes()
    try:
        return _followed(func, args, kwargs, at_dispatch=at_dispatch)
    except BaseException as error:
        before.restore(error.__traceback__)
        raise


def _followed(func: Callable[..., Any], args: Args, kwargs: Kwargs, *, at_dispatch: bool) -> Any:
    run = func if at_dispatch else partial(_heard_by_classes, func)
    failed: Exception | None = None
    # No other thread may realise one of the tensors in between, or record while a call is undone.
    with one_thread:
        tensors = tensors_in(args, kwargs)
        deferred = [t for t in tensors if is_deferred_tensor(t)]
        for tensor in deferred:
            # Its storage may be real by now through another tensor, and changed since.
            share_real_storage(tensor)
        deferred = [t for t in deferred if is_deferred_tensor(t)]
        if deferred and (at_dispatch or not _is_for_values(func, tensors, deferred)):
            program = Deferred.of(deferred[0]).program
            watch_sharding(program)
            follower = Follower(program, guard)
            if len([t for t in tensors if t.is_meta or is_fake(t)]) == len(deferred):
                follower.meant = deferred[0]
            try:
                return _recorded(follower, deferred, func, args, kwargs)
            except Exception as error:
                refused = refusal(error, func, deferred[0], tensors)
                for_good = follower.final or any(map(waits, deferred))
                if for_good or (at_dispatch and _is_late(tensors, deferred)):
                    if refused is None:
                        raise
                    raise refused from error
                failed = refused or error
        for tensor in deferred:
            realize_now(tensor)
    if failed is None or not at_dispatch:
        return run(*args, **kwargs)
    try:
        # The device was taken from one of them, as by torch.sparse_coo_tensor.
        args, kwargs = as_meant(args, kwargs, deferred[0].device)
        return run(*args, **kwargs)
    except RuntimeError as again:
        # The op was chosen for meta; its next call is right.
        raise failed from again


def _recorded(
    follower: Follower, deferred: list[Tensor], func: Callable[..., Any], args: Args, kwargs: Kwargs
) -> Any:
    """Call a function that is recorded, and guard its results; undo all if it fails."""
    programs = {Deferred.of(tensor).program for tensor in deferred}
    program = follower.writer.program
    before = len(program.ops)
    try:
        result = _called(follower, deferred[0], func, args, kwargs)
    except Exception:
        if len(programs) == 1:
            program.forget(before)
        follower.undo_draws()
        raise
    for leaf in flat(result):
        if isinstance(leaf, Tensor) and is_deferred_tensor(leaf):
            guard(leaf)
    return result


def _heard_by_classes(func: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call a function on real tensors, some of which may be of a class that hears of it."""
    before = functions_state()
    enable_functions()  # our caller does so too, if the call raises
    result = func(*args, **kwargs)
    set_functions_state(before)
    return result


def _is_late(tensors: list[Tensor], deferred: list[Tensor]) -> bool:
    """Whether an op at the dispatcher has a graph by now, of autograd or ``torch.func``."""
    followed = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    return followed or any(map(is_of_waiting, deferred)) or is_differentiating()


def _is_for_values(func: Any, tensors: list[Tensor], deferred: list[Tensor]) -> bool:
    """Whether a call among real tensors, or one with a graph, needs values.

    It is not tried without them: a graph or a wrapper of ``torch.func`` would keep tensors on meta,
    and those that the failed call has saved are counted (torch/utils/checkpoint.py). Nor is a call
    of a user's class, which hears of functions itself and says of which class their results are.
    """
    meta = [t for t in tensors if t.is_meta]
    if len(meta) > len(deferred) or any(map(is_of_waiting, deferred)):
        return False
    if not all(original_class(t) in PLAIN_CLASSES for t in deferred):
        return True
    if func in _NO_VALUES:
        return False
    real = [t for t in tensors if not t.is_meta]
    if any(map(is_fake, real)):
        return False
    followed = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    return followed or is_functorch_running() or any(t.dim() > 0 for t in real)


def _called(
    follower: Follower, first: Tensor, func: Callable[..., Any], args: Args, kwargs: Kwargs
) -> Any:
    handler = AFTER_BLOCK.get(func)
    if handler is None and all(t.is_meta for t in tensors_in(args, kwargs)):
        handler = composite_ops.AFTER_BLOCK.get(func)
    with in_force(follower), casts_of_autocast():
        if handler is None:
            result = func(*args, **kwargs)
        else:
            device = follower.writer.device_of(first)
            result = handler(follower.writer, func, *as_meant(args, kwargs, device))
    if follower.meant is not None:
        refuse_lost(func, result, follower.meant)
    return result


def hear(func: Callable[..., Any], args: Args, kwargs: Kwargs) -> Any:
    """Call an op on deferred tensors that has come to the dispatcher."""
    # A recorder has heard it already, and runs it on meta to learn the shape of its result. A guard
    # stays on a tensor that was set to other memory, which no block recorded.
    if current() is not None or not any(map(is_deferred_tensor, tensors_in(args, kwargs))):
        with below_python():
            return func(*args, **kwargs)
    if func is copy_into and is_whole_load(*args[:2]):  # of a shard: its local part
        adopt(args[0], args[1])
        return args[0]
    return follow(func, args, kwargs, at_dispatch=True)


def guard(tensor: Tensor) -> None:
    """Give a deferred tensor object its guarding class, in place."""
    guarding = _guarding(type(tensor))
    if guarding is None:
        return
    if issubclass(guarding, nn.Parameter):
        _mark(tensor)
    # Assigning the class alone would not do: the dispatcher asks __torch_dispatch__ only of tensors
    # that were made as such a class. So make one, and exchange implementations.
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


def _mark(tensor: Tensor) -> None:
    """Note that a storage belongs to a parameter, if ``tensor`` is one."""
    slot = slot_of(tensor)
    if slot is not None and is_parameter(tensor):
        slot.waits = True


def _exchange(tensor: Tensor, guarding: type[Tensor]) -> None:
    leaf = tensor.is_leaf
    requires = leaf and tensor.requires_grad
    gradient = tensor.grad if requires else None
    if type(tensor) in PLAIN_CLASSES:
        made = as_subclass(guarding, tensor, requires)
    else:  # a user's class may hear functions and ops itself
        with without_subclass_functions(), below_python():
            made = as_subclass(guarding, tensor, requires)
    with without_subclass_functions():
        if leaf:
            swap_with_hooks(tensor, made)
        else:
            swap(tensor, made)
        if gradient is not None:
            tensor.grad = gradient


def _deepcopied(tensor: Tensor, memo: dict[int, Any]) -> Tensor:
    # follow() makes a tensor real first if its storage is real already.
    if is_deferred_tensor(tensor):
        return copied_by_deepcopy(tensor, memo)
    copied: Tensor = copy.deepcopy(tensor, memo)
    return copied


@restoring
def _rebuild(
    slot: Slot,
    ref: TensorRef,
    requires_grad: bool,
    cls: type[Tensor],
    state: dict[str, Any],
) -> Tensor:
    """Unpickle a deferred tensor; pickles hold this function by name, as ``__reduce_ex__`` says."""
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
    """Hear from now on of what is made of the deferred tensors of a program in sharding them."""
    watch_new_shards(program)
    watch_fully_shard(program)
    watch_cuts(program)


# What Parameter.__new__ calls of data that is no plain tensor (torch/nn/parameter.py).
_MAKING = (torch.Tensor.detach, torch.Tensor.requires_grad_)
_ANSWERS: dict[Any, Callable[..., Any]] = {
    **ANSWERS,
    torch.Tensor.copy_: _copy,
    torch.Tensor.module_load: _module_load,
    torch.Tensor.data.__set__: _set_data,  # type: ignore[attr-defined]
}

# Functions whose result has no graph and that are recorded among real tensors too.
_NO_VALUES = frozenset(
    {*CONVERSIONS, _deepcopied, torch.Tensor.detach, torch.Tensor.data.__get__}  # type: ignore[attr-defined]
)
_ASKED_BY_VMAP = (torch.Tensor.dim, torch.Tensor.size)
