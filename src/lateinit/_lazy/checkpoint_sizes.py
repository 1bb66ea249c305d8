"""The sizes that lazy modules take from a checkpoint when it is loaded.

``load_sizes`` serves the load hook of one lazy module. ``sizes_in`` predicts the effect on a whole
model, for ``load_checkpoint``.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lateinit._identity import IdentityMap
from lateinit._lazy.declare import layout_of
from lateinit._lazy.mixin import check_known, named_tensors
from lateinit._lazy.placeholders import show
from lateinit._lazy.trials import ModuleLayout, Name, solve
from lateinit._torch import has_load_hook, own_buffers, own_parameters
from lateinit.errors import listing

NOT_ADOPTED = (
    "has no shape yet, and its module does not take that of a checkpoint: call "
    "lateinit.infer_shapes(model, ...) first"
)


def load_sizes(
    module: nn.Module,
    layout: ModuleLayout,
    state_dict: dict[str, Any],
    prefix: str,
    error_msgs: list[str],
) -> dict[str, Any] | None:
    """The sizes of a lazy module that follow from a checkpoint, or None if none do.

    Args:
        module: the lazy module.
        layout: the module's layout.
        state_dict: the checkpoint. The entry of a tensor that does not fit is replaced by the
            placeholder, so that torch does not try to load it.
        prefix: the prefix of the module's names.
        error_msgs: receives a message for each problem.
    """
    present = _present(module, state_dict, prefix)
    if not present:
        return None
    wrong = check_known(module, state_dict, prefix)
    error_msgs += wrong.values()
    sizes = None if wrong else solve(layout, lambda name: _shape(state_dict, prefix, name))
    if sizes is None:
        if not wrong:
            shapes = [f"{key} {show(tuple(state_dict[key].shape))}" for key in present]
            error_msgs.append(
                f"{prefix.rstrip('.') or 'the module'}: the sizes of a {type(module).__name__} do "
                f"not follow from what the checkpoint has of it: {listing(shapes)}"
            )
        state_dict.update(present)
    return sizes


def _present(module: nn.Module, state_dict: dict[str, Any], prefix: str) -> dict[str, Tensor]:
    """The placeholders of a module for which the checkpoint has a value, by key."""
    return {
        prefix + name: tensor
        for name, tensor in named_tensors(module)
        if is_lazy(tensor) and _is_value(state_dict.get(prefix + name))
    }


def _is_value(value: Any) -> bool:
    return isinstance(value, Tensor) and not is_lazy(value)


def _shape(state_dict: dict[str, Any], prefix: str, name: Name) -> tuple[int, ...] | None:
    path, tensor = name
    value = state_dict.get(prefix + (f"{path}.{tensor}" if path else tensor))
    return tuple(value.shape) if _is_value(value) and isinstance(value, Tensor) else None


def _without_hook(module: nn.Module, state_dict: dict[str, Any]) -> dict[str, str]:
    """A message for each placeholder with a value in a checkpoint that its module cannot adopt.

    A lazy module adopts the shapes of a checkpoint in a hook. Modules that hold torch's
    placeholders and initialise themselves in their own way may lack such a hook.
    """
    adopting = [part for part in module.modules() if has_load_hook(part)]
    able = IdentityMap((part, None) for whole in adopting for part in whole.modules())
    found = {}
    for path, part in module.named_modules():
        prefix = f"{path}." if path else ""
        held = {**own_parameters(part), **own_buffers(part)}
        for key in (prefix + name for name, tensor in held.items() if is_lazy(tensor)):
            if part not in able and _is_value(state_dict.get(key)):
                found[key] = f"{key} {NOT_ADOPTED}"
    return found


def sizes_in(
    module: nn.Module, state_dict: dict[str, Any]
) -> tuple[list[str], dict[str, nn.Module]]:
    """Predict the effect of loading on the lazy modules of a model; changes nothing.

    Returns:
        A message for each problem with sizes, and the modules that get all of their sizes, by path.
    """
    wrong: dict[str, str] = dict(check_known(module, state_dict, ""))
    messages: list[str] = []
    sized: dict[str, nn.Module] = {}
    for path, part in module.named_modules():
        spec = part.__dict__.get("_spec")
        prefix = f"{path}." if path else ""
        if spec is not None and not check_known(part, state_dict, prefix):
            sizes = load_sizes(part, layout_of(spec), dict(state_dict), prefix, messages)
            if sizes is not None:
                sized[path] = part
    wrong |= _without_hook(module, state_dict)
    return [*wrong.values(), *messages], sized
