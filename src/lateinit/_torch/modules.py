"""What an ``nn.Module`` holds, and the hooks that hang on modules.

torch's public iterators (``named_parameters`` and the like) go down into children, leave out
ties and know no names of what is None; the dictionaries that they read are private.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn
from torch.nn.modules import module as torch_module
from torch.nn.parameter import UninitializedTensorMixin  # type: ignore[attr-defined]

OWN_ATTRIBUTES = frozenset(nn.Module().__dict__)
"""The attributes that every module has: torch's plumbing, and ``training``."""

REGISTRATION_HOOKS: tuple[dict[int, Any], ...] = (
    torch_module._global_parameter_registration_hooks,
    torch_module._global_buffer_registration_hooks,
    torch_module._global_module_registration_hooks,
)
"""Global hooks ``(module, name, value)``, by key: of parameters, of buffers and of modules.

``register_module_parameter_registration_hook`` and its like put them there and make a handle.
"""

ALLOWED_OF_PLACEHOLDERS: tuple[Any, ...] = tuple(UninitializedTensorMixin._allowed_methods)
"""The functions that can be called with a parameter or buffer whose shape is not known."""

copy_into_state_dict = nn.Module._save_to_state_dict
load_with_counter = nn.modules.batchnorm._NormBase._load_from_state_dict
"""The ``_load_from_state_dict`` of batch norms, which adds a counter that old versions left out.

Of torch's other layers only instance norms have one that is not ``nn.Module``'s.
"""


def own_parameters(module: nn.Module) -> dict[str, Any]:
    """The parameters of this very module by name; values may be None."""
    held: dict[str, Any] = module._parameters
    return held


def own_buffers(module: nn.Module) -> dict[str, Any]:
    """The buffers of this very module by name; values may be None."""
    held: dict[str, Any] = module._buffers
    return held


def own_modules(module: nn.Module) -> dict[str, Any]:
    """The children of a module by name; values may be None."""
    held: dict[str, Any] = module._modules
    return held


def not_persistent(module: nn.Module) -> set[str]:
    """The names of the buffers that a state dict leaves out."""
    return module._non_persistent_buffers_set


def name_of_class(module: nn.Module) -> str:
    """The name that torch's messages call a module by."""
    name: str = module._get_name()
    return name


def load_state_dict_first(module: nn.Module, hook: Callable[..., None]) -> Any:
    """Register a hook that runs before all others of ``load_state_dict``; gives its handle."""
    handle = module._register_load_state_dict_pre_hook(hook)
    # First, not last: a hook of somebody's that removes itself is an error where another follows.
    hooks: Any = module._load_state_dict_pre_hooks
    hooks.move_to_end(handle.id, last=False)
    return handle


def replace_forward_pre_hook(module: nn.Module, key: int, hook: Callable[..., Any]) -> None:
    """Put another hook in the place of one that runs before ``forward``; it is given kwargs."""
    module._forward_pre_hooks[key] = hook
    module._forward_pre_hooks_with_kwargs[key] = True


def remove_hook(module: nn.Module, key: int) -> None:
    """Remove a hook of ``forward`` or of ``load_state_dict`` while torch may go through them."""
    for name in ("_forward_pre_hooks", "_load_state_dict_pre_hooks"):
        hooks = module.__dict__[name]
        if key in hooks:
            # Another dictionary, since torch may be iterating over this one.
            left = type(hooks)((k, hook) for k, hook in hooks.items() if k != key)
            module.__dict__[name] = left
            if name == "_forward_pre_hooks":
                module._forward_pre_hooks_with_kwargs.pop(key, None)
