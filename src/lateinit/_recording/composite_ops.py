"""Functions that are computed in another way on ``meta``, recorded as the one op that they are.

Torch takes them apart before a recording hears of them, and by what the tensors are: attention by a
kernel of the device or by matrix products, a recurrent layer over the whole sequence at once or
step by step, singular values with or without their vectors. The results differ in their last bits.
They are recorded taken apart, as ever, which gives their shapes and graphs; then what the whole op
gives is written over that. It is run as it was called: whether a tensor requires a gradient decides
about kernels too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional

from lateinit._recording.conversions import computed
from lateinit._recording.recorder import Recorder, current
from lateinit._tensors.slots import is_deferred_tensor
from lateinit._torch.arguments import flat, tensors_in
from lateinit._torch.callers import attention_without_fused_kernel
from lateinit._torch.modes import is_function_mode_in_force
from lateinit._torch.operators import by_name, overload_for, register

Handler = Callable[..., Any]
Policy = Literal["same", "leave", "refuse"]


def _run(name: str, graph: bool, requiring: Any, args: Any, /, **kwargs: Any) -> Any:
    """What an op gives for tensors that require gradients as they did when it was recorded."""
    flags = iter(requiring)
    given = [_requiring(value, flags) for value in args]
    named = {key: _requiring(value, flags) for key, value in kwargs.items()}
    with torch.set_grad_enabled(graph):
        results = flat(_callable(name)(*given, **named))
    return [leaf.detach() if isinstance(leaf, Tensor) else leaf for leaf in results]


def _callable(name: str) -> Handler:
    return _IN_PYTHON.get(name) or by_name(name).func


def _requiring(value: Any, flags: Iterator[bool]) -> Any:
    if isinstance(value, Tensor):
        return value.detach().requires_grad_(next(flags))
    return [_requiring(item, flags) for item in value] if isinstance(value, list) else value


# An op that is registered is one that writes its first argument: this one's is no tensor.
_OP = register("lateinit::whole", _run, draws=False)


def _whole(name: str, dropout: Policy = "leave") -> Handler:
    """A handler of a function that is an op of ATen, or one of ``_IN_PYTHON``.

    ``dropout`` says what is done where it draws random numbers: the same; or nothing, since it is
    taken apart eagerly too; or it is refused, since it is computed in a third way.
    """

    def handler(recorder: Recorder, func: Handler, args: Any, kwargs: Any) -> Any:
        drawn = recorder.program.draws()
        result = func(*args, **kwargs)
        given = tensors_in(args, kwargs)
        if not any(map(is_deferred_tensor, given)):
            return result
        if dropout == "same" or recorder.program.draws() == drawn:
            op = name if name in _IN_PYTHON else overload_for(name, args, kwargs).name
            results = [leaf for leaf in flat(result) if isinstance(leaf, Tensor)]
            requiring = tuple(tensor.requires_grad for tensor in given)
            called = (op, torch.is_grad_enabled(), requiring, args)
            recorder.override(_OP, called, kwargs, results)
        elif dropout == "refuse":
            _refuse(recorder, result, f"{name} with dropout")
        return result

    return handler


def _recurrent(name: str) -> Handler:
    """A handler of a recurrent kernel, of sequences of one length or packed ones."""
    whole = _whole(name, dropout="refuse")

    def handler(recorder: Recorder, func: Handler, args: Any, kwargs: Any) -> Any:
        # RNN.cpp reads below the dispatcher how many sequences are left at each step.
        given = tuple(_counts(recorder, value) for value in args)
        named = {key: _counts(recorder, value) for key, value in kwargs.items()}
        return whole(recorder, func, given, named)

    return handler


def _counts(recorder: Recorder, value: Any) -> Any:
    if isinstance(value, Tensor) and value.dtype is torch.int64 and is_deferred_tensor(value):
        return computed(recorder, value)
    return value


def _below(original: Handler, handler: Handler) -> Handler:
    """What stands in for a function that torch's own code calls where no mode hears it."""

    def called(*args: Any, **kwargs: Any) -> Any:
        recorder = current()
        if recorder is None or recorder.busy or is_function_mode_in_force():
            return original(*args, **kwargs)
        return handler(recorder, original, args, kwargs)

    return called


def _multi_head(recorder: Recorder, func: Handler, args: Any, kwargs: Any) -> Any:
    """Attention that eager construction would leave to a fused kernel, which no mode passes."""
    result = func(*args, **kwargs)
    module = attention_without_fused_kernel()
    if module is not None:
        trained = any(parameter.requires_grad for parameter in module.parameters())
        if not (torch.is_grad_enabled() and trained):
            _refuse(recorder, result, "a fused kernel of attention")
    return result


def _refuse(recorder: Recorder, result: Any, what: str) -> None:
    for leaf in flat(result):
        if isinstance(leaf, Tensor) and is_deferred_tensor(leaf):
            recorder.refuse(leaf, what)


_IN_PYTHON: dict[str, Handler] = {
    # Called by a mode, it sees that the tensors are on meta, and accumulates in another dtype.
    name: getattr(functional, name)
    for name in ("linear_cross_entropy",)
    if hasattr(functional, name)  # from torch 2.13 on
}
_UNHEARD = (
    (functional, "scaled_dot_product_attention"),  # by multi_head_attention_forward
    (torch, "max_pool1d"),  # by functional.max_pool1d
    (torch.linalg, "matrix_norm"),  # by torch.norm
)
HANDLERS: dict[Any, Handler] = {
    functional.multi_head_attention_forward: _multi_head,
    functional.scaled_dot_product_attention: _whole("aten::scaled_dot_product_attention"),
    torch.max_pool1d: _whole("aten::max_pool1d"),
    # Its schema does not say that it draws nothing, so that it is taken to draw.
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
PATCHES: tuple[tuple[Any, str, Any, Any], ...] = tuple(
    (owner, name, original, _below(original, HANDLERS[original]))
    for owner, name in _UNHEARD
    for original in (getattr(owner, name),)
)
