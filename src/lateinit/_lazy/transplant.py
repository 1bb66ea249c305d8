"""Move the contents of a plain module into a lazy one, whose objects stay the same objects."""

from __future__ import annotations

import types
import weakref
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lateinit._identity import IdentityMap
from lateinit._lazy.becoming import become, converted
from lateinit._lazy.declare import reset_part
from lateinit._lazy.placeholders import show
from lateinit._lazy.settle import cast_as, cast_later, has_postponed
from lateinit._lazy.trials import Name
from lateinit._torch import OWN_ATTRIBUTES, not_persistent, own_buffers, own_modules, own_parameters
from lateinit.errors import ShapeError

# Attributes that belong to the lazy module itself: torch's dictionaries and hooks, and the hooks
# that make it lazy.
_PLUMBING = OWN_ATTRIBUTES | {"_initialize_hook", "_load_hook"}


class Transplant:
    """Moves tensors, submodules and attributes from a plain module into a lazy one.

    A placeholder becomes its tensor. If the user has replaced a placeholder by another tensor, that
    tensor stays.

    Attributes:
        varying: the attributes that depend on sizes, which are replaced.
        owned: the tensors that the class declared; those that the plain module lacks are retired.
        moved: the target's tensor for each tensor of the plain module.
    """

    def __init__(self, varying: Collection[Name], owned: Collection[Name]) -> None:
        self.varying = varying
        self.owned = owned
        self.moved: IdentityMap[Tensor, Tensor] = IdentityMap()
        self._later = False  # whether casts come after postponed calls
        self._modules: IdentityMap[nn.Module, nn.Module] = IdentityMap()
        self._targets: IdentityMap[nn.Module, nn.Module] = IdentityMap()

    def run(self, target: nn.Module, plain: nn.Module) -> None:
        """Move everything from ``plain`` into ``target``."""
        self._later = has_postponed(target)
        self._module("", target, plain)
        for path, part in target.named_modules(remove_duplicate=False):
            self._attributes(path, part, self._modules.get(part))

    def _module(self, path: str, target: nn.Module, plain: nn.Module) -> None:
        self._modules[target], self._targets[plain] = plain, target
        if getattr(target.__dict__.get("reset_parameters"), "func", None) is reset_part:
            del target.__dict__["reset_parameters"]
        self._tensors(path, own_parameters(target), own_parameters(plain))
        self._tensors(path, own_buffers(target), own_buffers(plain))
        not_persistent(target).update(not_persistent(plain))
        for name, child in own_modules(plain).items():
            known = own_modules(target).get(name)
            if child is None or known is None or type(known) is not type(child):
                own_modules(target)[name] = child
            elif known is not child:
                self._module(_join(path, name), known, child)

    def _tensors(self, path: str, target: dict[str, Any], plain: dict[str, Any]) -> None:
        for name, tensor in plain.items():
            if (path, name) in self.owned and target.get(name) is None:
                continue  # the user has removed a declared tensor
            target[name] = self._moved(_join(path, name), target.get(name), tensor)
        for name in list(target):
            if (path, name) in self.owned and is_lazy(target[name]) and plain.get(name) is None:
                _retire(target[name])
                if name in plain:
                    target[name] = None
                else:
                    del target[name]

    def _moved(self, fqn: str, old: Any, new: Any) -> Any:
        """The tensor that the target holds from now on, for a tensor of the plain module."""
        if new is None:
            if is_lazy(old):
                _retire(old)
            return None
        # Tied in the plain module: tied in the target.
        if new in self.moved:
            return self.moved[new]
        if is_lazy(new):
            if is_lazy(old):
                old.__dict__["_known"] = new.__dict__.get("_known")
            return old if is_lazy(old) else new
        if old is None:
            return new
        if is_lazy(old):
            device, casts = converted(old)
            if self._later:
                become(old, new)
                cast_later(old, device, casts)
            else:
                become(old, _cast(new, device, casts))
        elif tuple(old.shape) != tuple(new.shape):
            raise ShapeError(
                f"{fqn}: a tensor of shape {show(tuple(old.shape))} was put in place of a "
                f"placeholder, but the input needs {show(tuple(new.shape))}"
            )
        self.moved[new] = old
        return old

    def _attributes(self, path: str, target: nn.Module, plain: nn.Module | None) -> None:
        if plain is None:
            return
        for name in [n for n in plain.__dict__ if n not in _PLUMBING]:
            if (path, name) in self.varying or name not in target.__dict__:
                target.__dict__[name] = self.mapped(plain.__dict__[name])

    def mapped(self, value: Any) -> Any:
        """An attribute's value, with the target's tensors and modules in place of the originals."""
        if isinstance(value, Tensor):
            return self.moved.get(value, value)
        if isinstance(value, nn.Module):
            return self._targets.get(value, value)
        if isinstance(value, types.MethodType):
            return types.MethodType(value.__func__, self.mapped(value.__self__))
        if isinstance(value, weakref.ref):
            held: Any = value()
            return weakref.ref(self.moved[held]) if held in self.moved else value
        if type(value) in (list, tuple, set):
            return type(value)(self.mapped(item) for item in value)
        if type(value) is dict:
            return {key: self.mapped(item) for key, item in value.items()}
        return value


def _cast(new: Tensor, device: torch.device | None, casts: tuple[torch.dtype, ...]) -> Tensor:
    """Move and cast a new tensor as its placeholder was moved and cast since it was declared."""
    if device is None and not casts:
        return new
    moved = cast_as(new, device, casts)
    return nn.Parameter(moved, new.requires_grad) if isinstance(new, nn.Parameter) else moved


def _retire(placeholder: Any) -> None:
    """Turn a placeholder that is not needed into an empty tensor, since it may still be held."""
    kind: Callable[..., Tensor] = placeholder.cls_to_become
    become(placeholder, kind(torch.empty(0, dtype=placeholder.data.dtype)))


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
