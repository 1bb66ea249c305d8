"""Lazy modules of every kind: ours, torch's, and those of pytorch-pfn-extras."""

from __future__ import annotations

import contextlib
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.overrides import TorchFunctionMode

from lateinit._lazy.mixin import finish, initialising
from lateinit._lazy.placeholders import become
from lateinit._recording import holes
from lateinit._tensors.slots import is_deferred_tensor
from lateinit._torch.arguments import tensors_in
from lateinit._torch.modules import own_parameters


def is_lazy_module(module: nn.Module) -> bool:
    """Whether a module waits for its first input."""
    if isinstance(module, LazyModuleMixin):
        return hasattr(module, "_initialize_hook")
    return waits_for_forward(module)


def waits_for_forward(module: nn.Module) -> bool:
    """Whether a module follows the protocol of pytorch-pfn-extras and is not initialised."""
    return getattr(module, "lazy_parmeters_determined", True) is False


def initialise(module: Any, args: Any, kwargs: Any) -> None:
    """Initialise a lazy module as its first forward would; its inputs may be on meta."""
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
    """Let ``forward`` initialise its parameters, and stop it before it computes with them."""
    before = dict(own_parameters(module))
    training = module.training
    try:
        module.__dict__["training"] = False  # batch norms would count this batch
        with initialising(module), contextlib.suppress(_KnownError), _StopBeforeUse(module):
            module.forward(*args, **kwargs)
    finally:
        module.__dict__["training"] = training
    for name, placeholder in before.items():
        made = own_parameters(module).get(name)
        if made is not None and placeholder is not None and made is not placeholder:
            become(placeholder, made)
            own_parameters(module)[name] = placeholder
    holes.close(module)


class _KnownError(Exception):
    """Everything is initialised."""


class _StopBeforeUse(TorchFunctionMode):
    """Ends a forward pass when its parameters are known and it comes to its input."""

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
    return tensor.is_meta and not is_deferred_tensor(tensor)


def _asks_only(func: Any) -> bool:
    return type(func).__name__ == "method-wrapper" or func in (Tensor.size, Tensor.dim)
