"""Functions that are computed in another way on ``meta``, recorded as the one op that they are.

Torch takes them apart before a recording hears of them, and by what the tensors are: attention by a
kernel of the device or by matrix products, an LSTM by oneDNN or cell by cell, singular values with
or without their vectors. The results differ in their last bits. They are recorded taken apart, as
ever, which gives their shapes and graphs; then what the whole op gives is copied over that.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional

from lateinit._recording.recorder import Recorder, current
from lateinit._tensors.deferred import is_deferred_tensor
from lateinit._torch.arguments import flat, tensors_in
from lateinit._torch.callers import attention_without_fused_kernel
from lateinit._torch.operators import overload_for

Handler = Callable[..., Any]
Policy = Literal["same", "leave", "refuse"]
original_attention = functional.scaled_dot_product_attention


def _whole(name: str, graph: Policy, dropout: Policy) -> Handler:
    """A handler of a function that is an op of ATen.

    ``graph`` and ``dropout`` say what is done where gradients are asked for, or random numbers
    drawn: the same; or nothing, since it is taken apart eagerly too; or it is refused, since it is
    computed in a third way.
    """

    def handler(recorder: Recorder, func: Handler, args: Any, kwargs: Any) -> Any:
        drawn = recorder.program.draws()
        result = func(*args, **kwargs)
        given = tensors_in(args, kwargs)
        if not any(map(is_deferred_tensor, given)):
            return result
        with_graph = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in given)
        policies = {graph if with_graph else "same"}
        policies.add(dropout if recorder.program.draws() > drawn else "same")
        if "refuse" in policies:
            _refuse(recorder, result, f"{name} with gradients or dropout")
        elif "leave" not in policies:
            info = replace(overload_for(name, args, kwargs), random=False)
            results = [leaf for leaf in flat(result) if isinstance(leaf, Tensor)]
            recorder.override(info, args, kwargs, results)
        return result

    return handler


def attention(*args: Any, **kwargs: Any) -> Tensor:
    """In place of ``functional.scaled_dot_product_attention``, which torch's own code calls."""
    recorder = current()
    if recorder is None or recorder.busy:
        return original_attention(*args, **kwargs)
    found: Tensor = _attention(recorder, original_attention, args, kwargs)
    return found


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


_attention = _whole("aten::scaled_dot_product_attention", graph="same", dropout="leave")
HANDLERS: dict[Any, Handler] = {
    functional.scaled_dot_product_attention: _attention,
    functional.multi_head_attention_forward: _multi_head,
    torch.lstm: _whole("aten::lstm", graph="refuse", dropout="refuse"),
    **{
        getattr(torch.linalg, name): _whole(f"aten::linalg_{name}", graph="leave", dropout="leave")
        for name in ("svdvals", "eigvalsh", "cond", "norm", "matrix_norm", "matrix_rank")
    },
}
