"""Functions of C++ that take a tensor for what it is, whatever its class would have to say.

They turn modes off, or wrap the tensor in a plain one, before any ``__torch_function__`` is asked.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.utils.dlpack
from torch import Tensor
from torch._functorch import eager_transforms
from torch.compiler import is_dynamo_compiling

from lateinit._torch.modes import graph_break, set_eval_frame

WRAPS = ("_wrap_for_grad", "_wrap_functional_tensor")
"""What ``torch.func.grad`` and ``vjp``, and ``functionalize``, call of each tensor."""

_CALLS: tuple[tuple[Any, str], ...] = (
    *((eager_transforms, name) for name in WRAPS),
    (Tensor, "_make_subclass"),  # inherited: torch/csrc/autograd/python_variable.cpp
    (torch, "to_dlpack"),
    (torch.utils.dlpack, "to_dlpack"),
)
_ORIGINALS = [getattr(owner, name) for owner, name in _CALLS]


def tell_of_unheard_calls(
    classes: tuple[type, ...], listener: Callable[[str, Any], object] | None
) -> None:
    """Call ``listener`` before such a function takes a tensor of some classes; None ends that.

    It is given the name of the function and the tensor.
    """
    for (owner, name), call in zip(_CALLS, _ORIGINALS, strict=True):
        if listener is not None:
            told = _telling(classes, functools.partial(listener, name), call)
            setattr(owner, name, staticmethod(told) if owner is Tensor else told)
        elif owner is not Tensor:
            setattr(owner, name, call)
        elif name in vars(Tensor):
            delattr(Tensor, name)


def _telling(
    classes: tuple[type, ...], listener: Callable[[Any], object], call: Callable[..., Any]
) -> Callable[..., Any]:
    def told(*args: Any, **kwargs: Any) -> Any:
        # torch.compile traces this, as it does torch's transforms themselves; not the listener.
        for given in (*args, *kwargs.values()):
            if isinstance(given, classes):
                if is_dynamo_compiling():
                    graph_break()
                compiling = set_eval_frame(None)
                try:
                    listener(given)
                finally:
                    set_eval_frame(compiling)
        return call(*args, **kwargs)

    return told
