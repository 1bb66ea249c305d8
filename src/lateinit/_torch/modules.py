"""The private dictionaries of ``nn.Module``: parameters, buffers, children and hooks.

torch's public iterators, such as ``named_parameters``, leave out entries that are None, and of
tied entries all but the first.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn
from torch.nn.modules import module as torch_module
from torch.nn.parameter import UninitializedTensorMixin  # type: ignore[attr-defined]

OWN_ATTRIBUTES = frozenset(nn.Module().__dict__)
"""The attributes that ``nn.Module.__init__`` sets: torch's bookkeeping, and ``training``."""

REGISTRATION_HOOKS: tuple[dict[int, Any], ...] = (
    torch_module._global_parameter_registration_hooks,
    torch_module._global_buffer_registration_hooks,
    torch_module._global_module_registration_hooks,
)
"""Global hooks ``(module, name, value)`` by key: for parameters, for buffers, for children.

``register_module_parameter_registration_hook`` and the functions for buffers and children add to
them and return a handle.
"""

ALLOWED_OF_PLACEHOLDERS: tuple[Any, ...] = tuple(UninitializedTensorMixin._allowed_methods)
"""The functions that accept a parameter or buffer whose shape is not known."""

copy_into_state_dict = nn.Module._save_to_state_dict
load_with_counter = nn.modules.batchnorm._NormBase._load_from_state_dict
"""The ``_load_from_state_dict`` of batch norms, which adds ``num_batches_tracked`` to old dicts.

All torch's layers but batch and instance norms inherit the method of ``nn.Module``.
"""


def own_parameters(module: nn.Module) -> dict[str, Any]:
    """The parameters of a module itself by name; values may be None."""
    held: dict[str, Any] = module._parameters
    return held


def own_buffers(module: nn.Module) -> dict[str, Any]:
    """The buffers of a module itself by name; values may be None."""
    held: dict[str, Any] = module._buffers
    return held


def own_modules(module: nn.Module) -> dict[str, Any]:
    """The children of a module by name; values may be None."""
    held: dict[str, Any] = module._modules
    return held


def not_persistent(module: nn.Module) -> set[str]:
    """The names of a module's non-persistent buffers, which its state dict leaves out."""
    return module._non_persistent_buffers_set


def name_of_class(module: nn.Module) -> str:
    """The name of a module in torch's messages."""
    name: str = module._get_name()
    return name


def has_load_hook(module: nn.Module) -> bool:
    """Whether a module has hooks of its own that run before it loads a state dict."""
    return bool(module._load_state_dict_pre_hooks)


def load_state_dict_first(module: nn.Module, hook: Callable[..., None]) -> Any:
    """Register a hook that runs before all others of ``load_state_dict``; returns its handle."""
    handle = module._register_load_state_dict_pre_hook(hook)
    # torch/nn/modules/module.py: _load_from_state_dict iterates over the dictionary itself. If a
    # hook removes itself and another hook follows it, that raises. So this hook comes first.
    hooks: Any = module._load_state_dict_pre_hooks
    hooks.move_to_end(handle.id, last=False)
    return handle


def replace_forward_pre_hook(module: nn.Module, key: int, hook: Callable[..., Any]) -> None:
    """Replace a hook that runs before ``forward`` by one that also receives keyword arguments."""
    module._forward_pre_hooks[key] = hook
    module._forward_pre_hooks_with_kwargs[key] = True


def before_call(module: nn.Module, do: Callable[[nn.Module, Any, Any], None]) -> None:
    """Call ``do(module, args, kwargs)`` at each call of a module, before any of its hooks."""
    call: Callable[..., Any] = module._call_impl

    def called(*args: Any, **kwargs: Any) -> Any:
        do(module, args, kwargs)
        return call(*args, **kwargs)

    module.__dict__["_call_impl"] = called


def remove_hook(module: nn.Module, key: int) -> None:
    """Remove a hook of ``forward`` or ``load_state_dict``, even while torch runs the hooks."""
    for name in ("_forward_pre_hooks", "_load_state_dict_pre_hooks"):
        hooks = module.__dict__[name]
        if key in hooks:
            # A new dictionary, since torch may be iterating over the old one.
            left = type(hooks)((k, hook) for k, hook in hooks.items() if k != key)
            module.__dict__[name] = left
            if name == "_forward_pre_hooks":
                module._forward_pre_hooks_with_kwargs.pop(key, None)
