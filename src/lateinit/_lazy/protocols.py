"""The three protocols of lazy modules: lateinit's, torch's, and pytorch-pfn-extras' (PPE's).

lateinit's and torch's modules initialise themselves in ``initialize_parameters``, called by a
forward pre-hook. PPE's create their parameters in ``forward`` itself. ``infer_shapes`` uses all of
them through ``is_lazy_module`` and ``initialise``.
"""

from __future__ import annotations

import contextlib
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin

from lateinit._lazy.mixin import finish, initialising
from lateinit._lazy.placeholders import become
from lateinit._recording import holes
from lateinit._tensors import is_deferred_tensor
from lateinit._torch import FunctionMode, own_parameters, tensors_in


def is_lazy_module(module: nn.Module) -> bool:
    """Whether a module waits for its first input, by any of the protocols."""
    if isinstance(module, LazyModuleMixin):
        return hasattr(module, "_initialize_hook")
    return waits_for_forward(module)


def waits_for_forward(module: nn.Module) -> bool:
    """Whether a module follows PPE's protocol and is not initialised."""
    # Spelt so in pytorch_pfn_extras/nn/modules/lazy.py.
    return getattr(module, "lazy_parmeters_determined", True) is False


def initialise(module: Any, args: Any, kwargs: Any) -> None:
    """Initialise a lazy module as its first forward call would.

    Args:
        module: any module; one that is not lazy is left alone.
        args: the arguments of the call, which may be on ``meta``.
        kwargs: its keyword arguments.
    """
    if not is_lazy_module(module):
        return
    if not issubclass(type(module), LazyModuleMixin):
        _by_forward(module, args, kwargs)
    elif hasattr(module, "_finish"):
        module._infer_parameters(module, args, kwargs)
    else:
        with initialising(module):
            module.initialize_parameters(*args, **kwargs)
        finish(module)


def _by_forward(module: Any, args: Any, kwargs: Any) -> None:
    """Let ``forward`` create the parameters, and stop it before it computes with them."""
    before = dict(own_parameters(module))
    training = module.training
    try:
        module.__dict__["training"] = False  # a batch norm would count this batch
        with initialising(module), contextlib.suppress(_KnownError), _StopBeforeUse(module):
            module.forward(*args, **kwargs)
    finally:
        module.__dict__["training"] = training
    # PPE's modules replace their placeholders by new parameters. The placeholder objects become
    # those, since an optimizer may hold them.
    for name, placeholder in before.items():
        made = own_parameters(module).get(name)
        if made is not None and placeholder is not None and made is not placeholder:
            become(placeholder, made)
            own_parameters(module)[name] = placeholder
    holes.close(module)


class _KnownError(Exception):
    """Ends ``forward``: every parameter has its shape."""


class _StopBeforeUse(FunctionMode):
    """Function mode: ends a forward pass once its parameters are known and it uses its input."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._module = module

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        ready = not _asks_only(func) and not waits_for_forward(self._module)
        if ready and any(_is_activation(tensor) for tensor in tensors_in(args, kwargs)):
            raise _KnownError
        return func(*args, **kwargs)


def _is_activation(tensor: Tensor) -> bool:
    """Whether a tensor comes from the input: on ``meta``, and not recorded."""
    return tensor.is_meta and not is_deferred_tensor(tensor)


def _asks_only(func: Any) -> bool:
    """Whether a function reads the shape or another property, as ``forward`` does to initialise."""
    return type(func).__name__ == "method-wrapper" or func in (Tensor.size, Tensor.dim)
