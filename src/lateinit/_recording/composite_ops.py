"""Composite functions that torch decomposes differently on ``meta``: recorded as one op each.

Torch decomposes these above the dispatcher, in a way that depends on the device of the tensors:
attention into a fused kernel or into matrix products, a recurrent layer into one kernel for the
sequence or one for each step, singular values with or without their vectors. The results differ in
their layout and their last bits, and so do gradients. So the decomposition runs on ``meta`` only to
find the shapes, and then an op ``lateinit::whole`` is recorded, which has an op for its gradients.
Replay calls the function itself, with the ``requires_grad`` flags of the original call, since these
select kernels too.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from lateinit._recording.autocast import is_cast_already
from lateinit._recording.conversions import computed
from lateinit._recording.value_checks import check_values
from lateinit._recording.writer import ProgramWriter, current
from lateinit._tensors import is_deferred_tensor, take_place
from lateinit._torch import (
    META,
    Args,
    Kwargs,
    OpTraits,
    attention_without_fused_kernel,
    autocast_in_force,
    by_name,
    flat,
    is_any_autocast_enabled,
    is_function_mode_in_force,
    map_tensors,
    overload_for,
    register,
    tensors_in,
    with_autograd,
    without_modes,
)
from lateinit.errors import RecordingError

Handler = Callable[..., Any]
Policy = Literal["same", "leave", "refuse"]
Autocast = tuple[str, torch.dtype] | None


def _run(
    name: str, graph: bool, autocast: Autocast, requiring: Any, args: Any, /, **kwargs: Any
) -> Any:
    """Replay a composite function.

    Args:
        name: the op, or a function of ``_IN_PYTHON``.
        graph: whether gradients were enabled when it was recorded.
        autocast: the device type and dtype of the autocast that was in force for it.
        requiring: the ``requires_grad`` flag of each tensor among the arguments, in order.
        args: its positional arguments.
        **kwargs: its keyword arguments.
    """
    given, named = _requiring((args, kwargs), iter(requiring))
    return [leaf.detach() for leaf in _called(name, graph, autocast, given, named)]


def _run_backward(grads: Any, name: str, *call: Any, **kwargs: Any) -> Any:
    """Replay the gradients of a composite function.

    Args:
        grads: the gradients of its results, None for a result without one.
        name: as in ``_run``, like all other arguments.
        *call: the other positional arguments.
        **kwargs: the keyword arguments.
    """
    graph, autocast, requiring, args = call
    given, named = _requiring((args, kwargs), iter(requiring))
    found = _called(name, graph, autocast, given, named)
    wanted = [tensor for tensor in tensors_in(given, named) if tensor.requires_grad]
    used = [grad is not None for grad in grads]
    found, grads = (list(itertools.compress(leaves, used)) for leaves in (found, grads))
    return list(torch.autograd.grad(found, wanted, grads, allow_unused=True))


def _called(name: str, graph: bool, autocast: Autocast, args: Any, kwargs: Any) -> list[Tensor]:
    with with_autograd(), torch.set_grad_enabled(graph), autocast_in_force(autocast):
        return tensors_in(flat(_callable(name)(*args, **kwargs)), {})


def _callable(name: str) -> Handler:
    return _IN_PYTHON.get(name) or by_name(name).func


def _requiring(arguments: Any, flags: Iterator[bool]) -> Any:
    return map_tensors(arguments, lambda tensor: tensor.detach().requires_grad_(next(flags)))


_OP = register("lateinit::whole", _run, OpTraits(layout="asked if permuted"))
_CASTING = dataclasses.replace(_OP, layout="asked")  # autocast does not cast meta tensors
_BACKWARD = register("lateinit::whole_backward", _run_backward, OpTraits(layout="asked"))


class _Call(NamedTuple):
    """A call of a composite function; ``options`` are the first four arguments of ``_run``."""

    writer: ProgramWriter
    options: tuple[Any, ...]
    args: Args
    kwargs: Kwargs
    shapes: list[Tensor]

    def forward(self) -> list[Any]:
        """Record the function; its results have the shapes found by the decomposition."""
        autocast, called = self.options[2], (*self.options, self.args)
        info = _CASTING if autocast else _OP
        made = self.writer.record_laid_out(info, called, self.kwargs, self.shapes)
        for tensor, decomposed in zip(made, self.shapes, strict=True):
            take_place(tensor, decomposed)
        return made

    def backward(self, tensors: Iterable[Tensor], grads: tuple[Tensor | None, ...]) -> list[Any]:
        """Record the gradients of the arguments that require a gradient."""
        saved = iter(tensors)
        args, kwargs = map_tensors((self.args, self.kwargs), lambda _: next(saved))
        wanted = itertools.compress(tensors_in(args, kwargs), self.options[-1])
        shapes = [torch.empty(t.shape, dtype=t.dtype, device=META) for t in wanted]
        called = (grads, *self.options, args)
        return self.writer.record_laid_out(_BACKWARD, called, kwargs, shapes)


class _Whole(torch.autograd.Function):
    """A composite function in a graph: replay computes its gradients."""

    @staticmethod
    def forward(ctx: Any, call: _Call, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.call = call
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)
        with without_modes():
            return tuple(call.forward())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        if torch.is_grad_enabled():
            raise RecordingError(
                f"a constructor asks for a graph of the gradients of {ctx.call.options[0]} "
                "(create_graph), which a recording does not have: compute it after materialising"
            )
        with without_modes():
            found = iter(ctx.call.backward(ctx.saved_tensors, grads))
        return None, *(next(found) if required else None for required in ctx.call.options[-1])


def _whole(name: str, dropout: Policy = "leave") -> Handler:
    """The handler of a composite function.

    Args:
        name: an op of ATen, or a function of ``_IN_PYTHON``.
        dropout: the policy if the call recorded a draw. "same": record it as usual.
            "leave": keep the decomposition, which eager construction uses too under dropout.
            "refuse": materialising raises, since eager construction uses a third decomposition.
    """

    def handler(writer: ProgramWriter, func: Handler, args: Any, kwargs: Any) -> Any:
        given = tensors_in(args, kwargs)
        if not any(map(is_deferred_tensor, given)):
            result = on_real_data(writer, func, args, kwargs)
            if result is not NotImplemented:
                return result
            args, kwargs = all_deferred(writer, args, kwargs)
            given = tensors_in(args, kwargs)
            if not any(map(is_deferred_tensor, given)):  # on meta by request
                return func(*args, **kwargs)
        drawn, autocast = writer.program.draws(), _autocast_of(writer, given)
        if autocast and any(is_cast_already(tensor, autocast[0]) for tensor in given):
            raise RecordingError(
                f"{name} takes a weight that autocast has cast before and would not cast again, "
                "which cannot be recorded: enter autocast anew for each call, or compute it after "
                "materialising"
            )
        result = func(*args, **kwargs)
        if not all(map(is_deferred_tensor, flat(result))):
            return result  # after the block, with plain meta tensors
        if dropout == "same" or writer.program.draws() == drawn:
            written = kwargs.get("out") is not None
            kwargs = {key: value for key, value in kwargs.items() if key != "out"}
            given = tensors_in(args, kwargs)
            op = name if name in _IN_PYTHON else overload_for(name, args, kwargs).name
            requiring = tuple(tensor.requires_grad for tensor in given)
            info = None if name in _IN_PYTHON else by_name(op)
            if info is not None and info.checks_values and not autocast:
                check_values(writer, info, args, kwargs)
            options = op, torch.is_grad_enabled(), autocast, requiring
            shapes = [leaf.detach() for leaf in flat(result)]
            call = _Call(writer, options, args, kwargs, shapes)
            if written:
                with without_modes():
                    for out, value in zip(flat(result), call.forward(), strict=True):
                        writer.assign(out, value)
                return result
            made = _Whole.apply(call, *given)  # type: ignore[no-untyped-call]
            return made[0] if isinstance(result, Tensor) else type(result)(made)
        if dropout == "refuse":
            _refuse(writer, result, f"{name} with dropout")
        return result

    return handler


def on_real_data(writer: ProgramWriter, func: Handler, args: Any, kwargs: Any) -> Any:
    """Call a function of real tensors alone as if outside a block; NotImplemented if it draws.

    Inside a block its intermediate tensors would be deferred.
    """
    given, state = tensors_in(args, kwargs), torch.default_generator.get_state()
    if not given or any(tensor.is_meta for tensor in given):
        return NotImplemented
    for tensor in given:
        writer.data.before_write(tensor)
    graph = torch.is_grad_enabled()
    with without_modes(), torch.set_grad_enabled(graph):
        result = func(*args, **kwargs)
    if torch.default_generator.get_state().equal(state):
        return result
    torch.default_generator.set_state(state)
    return NotImplemented


def _autocast_of(writer: ProgramWriter, given: list[Tensor]) -> Autocast:
    """The autocast under which a composite function must be replayed."""
    kind = next(writer.device_of(t).type for t in given if is_deferred_tensor(t))
    on = is_any_autocast_enabled() and torch.is_autocast_enabled(kind)
    return (kind, torch.get_autocast_dtype(kind)) if on else None


def _recurrent(name: str) -> Handler:
    """The handler of a recurrent kernel, for sequences of one length or packed ones."""
    whole = _whole(name, dropout="refuse")

    def handler(writer: ProgramWriter, func: Handler, args: Any, kwargs: Any) -> Any:
        if any(map(is_deferred_tensor, tensors_in(args, kwargs))):
            args = tuple(_as_recurrent_kernel_takes(writer, value) for value in args)
            kwargs = {k: _as_recurrent_kernel_takes(writer, v) for k, v in kwargs.items()}
        return whole(writer, func, args, kwargs)

    return handler


def _as_recurrent_kernel_takes(writer: ProgramWriter, value: Any) -> Any:
    """An argument of a recurrent kernel in the form that passes its checks.

    aten/src/ATen/native/RNN.cpp reads the batch sizes of packed sequences, which must be real, and
    compares the devices of all other tensors, which must be deferred.
    """
    if isinstance(value, (list, tuple)):
        return [_as_recurrent_kernel_takes(writer, item) for item in value]
    if not isinstance(value, Tensor):
        return value
    deferred = is_deferred_tensor(value)
    if value.dtype is torch.int64:
        return computed(writer, value) if deferred else value
    return value if deferred or value.is_meta else _deferred_copy(writer, value)


def all_deferred(writer: ProgramWriter, args: Any, kwargs: Any) -> tuple[Any, Any]:
    """The arguments of a call, with deferred copies in place of the real tensors."""

    def copied(tensor: Tensor) -> Tensor:
        return tensor if tensor.is_meta else _deferred_copy(writer, tensor)

    writer.call = map_tensors(args, copied), map_tensors(kwargs, copied)
    return writer.call


def _deferred_copy(writer: ProgramWriter, real: Tensor) -> Tensor:
    """A deferred tensor with the values of a real one."""
    with without_modes():
        copy = writer.lift(real)
    return copy.requires_grad_(real.requires_grad)


def _below(original: Handler, handler: Handler) -> Handler:
    """A patch for a function that torch's own Python code calls with function modes off.

    With a function mode in force the mode calls the handler itself.
    """

    def called(*args: Any, **kwargs: Any) -> Any:
        writer = current()
        if writer is None or writer.busy or is_function_mode_in_force():
            return original(*args, **kwargs)
        return handler(writer, original, args, kwargs)

    return called


def _multi_head(writer: ProgramWriter, func: Handler, args: Any, kwargs: Any) -> Any:
    """Refuse attention that eager construction would compute by its fused kernel.

    torch/nn/modules/activation.py: MultiheadAttention.forward avoids that kernel under any function
    mode, so a block never sees it.
    """
    result = func(*args, **kwargs)
    module = attention_without_fused_kernel()
    if module is not None:
        trained = any(parameter.requires_grad for parameter in module.parameters())
        if not (torch.is_grad_enabled() and trained):
            _refuse(writer, result, "a fused kernel of attention")
    return result


def _in_graph(whole: Handler) -> Handler:
    """The handler of a function that differs on ``meta`` only in its gradient."""

    def handler(writer: ProgramWriter, func: Handler, args: Any, kwargs: Any) -> Any:
        graph = torch.is_grad_enabled() and any(t.requires_grad for t in tensors_in(args, kwargs))
        return whole(writer, func, args, kwargs) if graph else func(*args, **kwargs)

    return handler


def _mish(writer: ProgramWriter, func: Handler, args: Any, kwargs: Any) -> Any:
    tensor, inplace = _of_mish(*args, **kwargs)
    given = tensor.clone() if inplace else tensor
    made = _whole("aten::mish")(writer, functional.mish, (given,), {})
    return tensor.copy_(made) if inplace else made


def _of_mish(input: Tensor, inplace: bool = False) -> tuple[Tensor, bool]:  # noqa: A002
    return input, inplace


def _refuse(writer: ProgramWriter, result: Any, what: str) -> None:
    for leaf in flat(result):
        if isinstance(leaf, Tensor) and is_deferred_tensor(leaf):
            writer.refuse(leaf, what)


# Functions that branch where no mode of a block intercepts: interpolate of torch/nn/functional.py
# reads ``is_cpu``, and has another decomposition for determinism elsewhere; norm of
# torch/functional.py calls ``linalg.matrix_norm``.
_UNANSWERED: dict[str, Handler] = {
    "interpolate": functional.interpolate,
    "norm": torch.norm,
    "Tensor.norm": torch.Tensor.norm,
}
# On meta tensors these accumulate in another dtype.
_ACCUMULATING: dict[str, Handler] = {
    name: getattr(functional, name)
    for name in ("linear_cross_entropy",)
    if hasattr(functional, name)  # from torch 2.13 on
}
# torch/csrc/autograd/FunctionsManual.cpp has another formula for the gradients of these on meta, or
# under a dispatch mode.
_DERIVED: dict[str, Handler] = {
    f"{owner.__name__}.{name}": getattr(owner, name)
    for owner in (torch, torch.Tensor)
    for name in [
        "masked_fill",
        "masked_select",
        "max",
        "median",
        "min",
        "nanmedian",
        "ormqr",
        "prod",
    ]
} | {"linalg.householder_product": torch.linalg.householder_product}
_IN_PYTHON = {**_ACCUMULATING, **_UNANSWERED, **_DERIVED}
# Functions that torch calls with function modes off, each with its caller.
_UNHEARD = (
    (functional, "scaled_dot_product_attention"),  # multi_head_attention_forward
    (torch, "group_norm"),  # functional.group_norm
    (torch, "max_pool1d"),  # functional.max_pool1d
    (torch.linalg, "matrix_norm"),  # torch.norm
)
HANDLERS: dict[Any, Handler] = {
    functional.multi_head_attention_forward: _multi_head,
    functional.scaled_dot_product_attention: _whole("aten::scaled_dot_product_attention"),
    functional.mish: _in_graph(_mish),
    torch.group_norm: _whole("aten::group_norm"),
    torch.max_pool1d: _whole("aten::max_pool1d"),
    torch.native_channel_shuffle: _whole("aten::native_channel_shuffle"),
    # Their schemas do not state that they draw nothing, so they count as drawing.
    **{function: _whole(name, dropout="same") for name, function in _ACCUMULATING.items()},
    **{function: _in_graph(_whole(name)) for name, function in _DERIVED.items()},
    **{
        getattr(torch, name): _recurrent(f"aten::{name}")
        for name in ("lstm", "gru", "rnn_tanh", "rnn_relu")
    },
    **{
        getattr(torch.linalg, name): _whole(f"aten::linalg_{name}")
        for name in ("svdvals", "eigvals", "eigvalsh", "cond", "norm", "matrix_norm", "matrix_rank")
    },
}
AFTER_BLOCK = {**HANDLERS, **{func: _whole(name) for name, func in _UNANSWERED.items()}}
PATCHES: tuple[tuple[Any, str, Any], ...] = tuple(
    (owner, name, _below(original, HANDLERS[original]))
    for owner, name in _UNHEARD
    for original in (getattr(owner, name),)
)
