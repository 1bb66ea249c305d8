"""Declare a lazy module: the structure of the plain class, with placeholders for its tensors."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lateinit._lazy.placeholders import UninitializedBuffer
from lateinit._lazy.scratch_recording import aside
from lateinit._lazy.trials import LazySpec, ModuleLayout, Name, measure
from lateinit._recording import current, holes
from lateinit._recording.postponed import postpone, reset
from lateinit._torch import own_buffers, own_parameters, restoring


@restoring
def declare(module: nn.Module, spec: LazySpec) -> None:
    """Give ``module`` the structure of the plain class, with placeholders for its tensors.

    The constructor runs on the module itself, with trial sizes, in a recording that is discarded.
    """
    layout = layout_of(spec)
    first = layout.families[-1].base.sizes
    with aside():
        spec.construct_on(module, first)
        asked = {name: _facts(tensor) for name, tensor in _tensors(module)}
    for part in module.modules():
        holes.close(part)
    holes.reserve(module)
    _place(module, layout, asked)
    for part in module.modules():
        if part is not module and _holds_lazy(part) and hasattr(part, "reset_parameters"):
            part.__dict__["reset_parameters"] = functools.partial(reset_part, part)
    _forget_sizes(module, layout)
    module.__dict__["_spec"] = spec


def reset_part(part: nn.Module) -> None:
    """Stands in for ``reset_parameters`` of a part whose sizes are not known, as in lazy layers.

    In a block the reset is run once the sizes are known, with the draws at this place in the random
    stream, where the eager twin draws.
    """
    held = (*own_parameters(part).values(), *own_buffers(part).values())
    if current() is not None and any(is_lazy(t) and t.__dict__.get("_in_block") for t in held):
        postpone(part, reset)


def _holds_lazy(part: nn.Module) -> bool:
    held = (*own_parameters(part).values(), *own_buffers(part).values())
    return not hasattr(part, "_initialize_hook") and any(is_lazy(tensor) for tensor in held)


AskedFor = tuple[int, torch.dtype, torch.device, bool]


def _facts(tensor: Tensor) -> AskedFor:
    """The properties that a placeholder copies from a tensor of the trial; the id keeps ties."""
    if is_lazy(tensor):
        return id(tensor), tensor.data.dtype, tensor.data.device, tensor.requires_grad
    return id(tensor), tensor.dtype, tensor.device, tensor.requires_grad


def _tensors(module: nn.Module) -> list[tuple[Name, Tensor]]:
    return [
        ((path, name), tensor)
        for path, part in module.named_modules(remove_duplicate=False)
        for held in (own_parameters(part), own_buffers(part))
        for name, tensor in held.items()
        if tensor is not None
    ]


def _place(module: nn.Module, layout: ModuleLayout, asked: dict[Name, AskedFor]) -> None:
    """Put a placeholder where any trial has a tensor; tied tensors share one placeholder."""
    parts = dict(module.named_modules(remove_duplicate=False))
    made: dict[int, Any] = {}
    default = next(iter(asked.values()), (0, torch.get_default_dtype(), torch.device("cpu"), True))
    for (path, name), known in layout.known.items():
        part = parts.get(path)
        is_buffer = (path, name) in layout.buffers
        if part is None:
            continue
        held = own_buffers(part) if is_buffer else own_parameters(part)
        if is_lazy(held.get(name)):  # type: ignore[arg-type]
            continue
        key, dtype, device, grad = asked.get((path, name), (-len(made) - 1, *default[1:]))
        if key not in made:
            kind: Any = UninitializedBuffer if is_buffer else module._parameter_kind
            made[key] = kind(grad, device, dtype, known_shape=known)
            owner = f"{type(module).__name__}.{path}" if path else type(module).__name__
            made[key].__dict__["_label"] = f"{owner}.{name}"
        held[name] = made[key]


def _forget_sizes(module: nn.Module, layout: ModuleLayout) -> None:
    """Set the attributes that follow from sizes to 0, as in torch's lazy layers."""
    parts = dict(module.named_modules(remove_duplicate=False))
    for path, name in layout.varying:
        part = parts.get(path)
        if part is not None and name in part.__dict__ and not name.endswith("_hook"):
            part.__dict__[name] = _blanked(part.__dict__[name])


def _blanked(value: Any) -> Any:
    """A value without sizes: 0 for a number, None for a tensor, the same for anything else."""
    if isinstance(value, bool):
        return value
    if isinstance(value, int):
        return 0
    if type(value) in (tuple, list):
        return type(value)(_blanked(item) for item in value)
    return None if isinstance(value, Tensor) else value


def layout_of(spec: LazySpec) -> ModuleLayout:
    """The layout of the module that a lazy one will become; measured once for equal specs."""
    parts = (spec.cls, _frozen(spec.rules), _frozen(spec.arguments), spec.settings)
    try:
        key = _Key(parts, spec)
    except TypeError:  # an argument that cannot be hashed
        return measure(spec)
    return _layout(key)


class _Key:
    """A spec that is hashed and compared by the values that determine its layout.

    Raises:
        TypeError: an argument cannot be hashed, or is a module or tensor that a cache would keep
            alive.
    """

    def __init__(self, key: Any, spec: LazySpec) -> None:
        self.key = key
        self.spec = spec
        hash(key)
        if any(isinstance(value, (nn.Module, Tensor)) for value in spec.arguments.values()):
            raise TypeError("a cache would keep it alive")

    def __hash__(self) -> int:
        return hash(self.key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Key) and self.key == other.key


# The limit bounds the memory: a layout holds the shapes of several trial constructions.
@functools.lru_cache(maxsize=512)
def _layout(key: _Key) -> ModuleLayout:
    return measure(key.spec)


def _frozen(values: Mapping[str, Any]) -> tuple[Any, ...]:
    """Arguments in a hashable form, with their types, since ``1 == True``."""
    items = sorted(values.items(), key=lambda item: item[0])
    return tuple((k, type(v), tuple(v) if isinstance(v, list) else v) for k, v in items)
