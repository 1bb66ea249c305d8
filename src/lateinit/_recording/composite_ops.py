"""Composite functions that torch decomposes differently on ``meta``: recorded as one op each.

Torch decomposes these above the dispatcher, in a way that depends on the device of the tensors:
attention into a fused kernel or into matrix products, a recurrent layer into one kernel for the
sequence or one for each step, singular values with or without their vectors. The results differ in
their last bits. So the decomposition on ``meta`` is recorded as usual, for its shapes and graph,
and then an op ``lateinit::whole`` overwrites its results. Replaying that op calls the function
itself, with the ``requires_grad`` flags of the original call, since these select kernels too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional

from lateinit._recording.conversions import computed
from lateinit._recording.writer import ProgramWriter, current
from lateinit._tensors import is_deferred_tensor
from lateinit._torch import (
    OpTraits,
    attention_without_fused_kernel,
    by_name,
    flat,
    is_any_autocast_enabled,
    is_function_mode_in_force,
    overload_for,
    register,
    tensors_in,
    without_modes,
)

Handler = Callable[..., Any]
Policy = Literal["same", "leave", "refuse"]


def _run(name: str, graph: bool, requiring: Any, args: Any, /, **kwargs: Any) -> Any:
    """Replay a composite function.

    Args:
        name: the op, or a function of ``_IN_PYTHON`` or ``_UNANSWERED``.
        graph: whether gradients were enabled when it was recorded.
        requiring: the ``requires_grad`` flag of each tensor among the arguments, in order.
        args: its positional arguments.
        **kwargs: its keyword arguments.
    """
    flags = iter(requiring)
    given = [_requiring(value, flags) for value in args]
    named = {key: _requiring(value, flags) for key, value in kwargs.items()}
    with torch.set_grad_enabled(graph):
        results = flat(_callable(name)(*given, **named))
    return [leaf.detach() if isinstance(leaf, Tensor) else leaf for leaf in results]


def _callable(name: str) -> Handler:
    return _IN_PYTHON.get(name) or _UNANSWERED.get(name) or by_name(name).func


def _requiring(value: Any, flags: Iterator[bool]) -> Any:
    if isinstance(value, Tensor):
        return value.detach().requires_grad_(next(flags))
    return [_requiring(item, flags) for item in value] if isinstance(value, list) else value


_OP = register("lateinit::whole", _run, OpTraits())


def _whole(name: str, dropout: Policy = "leave") -> Handler:
    """The handler of a composite function.

    Args:
        name: an op of ATen, or a function of ``_IN_PYTHON`` or ``_UNANSWERED``.
        dropout: the policy if the call recorded a draw. "same": override the results as usual.
            "leave": keep the decomposition, which eager construction uses too when it drops out.
            "refuse": materialising raises, since eager construction uses a third way.
    """

    def handler(writer: ProgramWriter, func: Handler, args: Any, kwargs: Any) -> Any:
        drawn = writer.program.draws()
        result = func(*args, **kwargs)
        given = tensors_in(args, kwargs)
        if not any(map(is_deferred_tensor, given)):
            return result
        if dropout == "same" or writer.program.draws() == drawn:
            python = name in _IN_PYTHON or name in _UNANSWERED
            op = name if python else overload_for(name, args, kwargs).name
            results = [leaf for leaf in flat(result) if isinstance(leaf, Tensor)]
            requiring = tuple(tensor.requires_grad for tensor in given)
            called = (op, torch.is_grad_enabled(), requiring, args)
            writer.autocast = _autocast_of(writer, given)
            try:
                writer.override(_OP, called, kwargs, results)
            finally:
                writer.autocast = None
        elif dropout == "refuse":
            _refuse(writer, result, f"{name} with dropout")
        return result

    return handler


def _autocast_of(writer: ProgramWriter, given: list[Tensor]) -> tuple[str, torch.dtype] | None:
    """The autocast under which a composite function has to be replayed."""
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
    """An argument of a recurrent kernel, as it is checked before any op is called.

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


def _deferred_copy(writer: ProgramWriter, real: Tensor) -> Tensor:
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


def _refuse(writer: ProgramWriter, result: Any, what: str) -> None:
    for leaf in flat(result):
        if isinstance(leaf, Tensor) and is_deferred_tensor(leaf):
            writer.refuse(leaf, what)


_IN_PYTHON: dict[str, Handler] = {
    # On meta tensors it accumulates in another dtype.
    name: getattr(functional, name)
    for name in ("linear_cross_entropy",)
    if hasattr(functional, name)  # from torch 2.13 on
}
# Where no mode of a block answers: interpolate of torch/nn/functional.py asks ``is_cpu``, and has
# another way for determinism elsewhere; norm of torch/functional.py calls ``linalg.matrix_norm``.
_UNANSWERED: dict[str, Handler] = {
    "interpolate": functional.interpolate,
    "norm": torch.norm,
    "Tensor.norm": torch.Tensor.norm,
}
# Called with function modes off, by:
_UNHEARD = (
    (functional, "scaled_dot_product_attention"),  # multi_head_attention_forward
    (torch, "max_pool1d"),  # functional.max_pool1d
    (torch.linalg, "matrix_norm"),  # torch.norm
)
HANDLERS: dict[Any, Handler] = {
    functional.multi_head_attention_forward: _multi_head,
    functional.scaled_dot_product_attention: _whole("aten::scaled_dot_product_attention"),
    torch.max_pool1d: _whole("aten::max_pool1d"),
    # Its schema does not say that it draws nothing, so it counts as drawing.
    **{function: _whole(name, dropout="same") for name, function in _IN_PYTHON.items()},
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
