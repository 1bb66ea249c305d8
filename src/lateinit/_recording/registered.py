"""The modules on which a block registers tensors or children; guards their tensors at its end."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedTensorMixin  # type: ignore[attr-defined]

from lateinit._identity import IdentityMap
from lateinit._recording.guard import guard
from lateinit._recording.writer import ProgramWriter, current
from lateinit._tensors import (
    ON_META,
    PLAIN_CLASSES,
    Guarded,
    Slot,
    attach,
    is_deferred_tensor,
    own_tensors,
    slot_of,
)
from lateinit._torch import (
    REGISTRATION_HOOKS,
    as_subclass,
    held_by_script,
    name_of_class,
    own_buffers,
    swap_with_hooks,
    without_modes,
)

_DEEPEST = 64  # levels of a module's path: bounds the recursion if a module contains itself


class Registered:
    """The modules on which a block registers parameters, buffers or children.

    Args:
        declared: called with a module, a name and the placeholder that is registered there.
    """

    def __init__(self, declared: Callable[[nn.Module, str, Tensor], None]) -> None:
        self._declared: Callable[[nn.Module, str, Tensor], None] | None = declared
        self._found: IdentityMap[nn.Module, None] = IdentityMap()
        self._last: nn.Module | None = None
        self._parents: IdentityMap[nn.Module, tuple[nn.Module, str]] = IdentityMap()
        self._paths: IdentityMap[nn.Module, str] = IdentityMap()

    def enter(self) -> None:
        # torch/nn/modules/module.py: register_module_parameter_registration_hook and its siblings
        # do this and return a handle. The key is an id of this object, so no handle is needed.
        for registered in REGISTRATION_HOOKS:
            registered[id(self)] = self._note

    def _note(self, module: nn.Module, name: str, value: Any) -> None:
        # Most calls are for the same module as the call before.
        if module is not self._last:
            self._found[module], self._last = None, module
        if type(value) in PLAIN_CLASSES:
            return
        # The placeholders of pytorch-pfn-extras do not derive from torch's mixin.
        ppe = type(value).__name__ == "UninitializedParameter"
        lazy = ppe or isinstance(value, UninitializedTensorMixin)
        # Global hooks run in all threads, so `current()` is checked.
        if lazy and self._declared is not None and current() is not None:
            self._declared(module, name, value)
        if isinstance(value, nn.Module):
            self._found[value] = None
            self._parents[value] = (module, name)

    def leave(self) -> None:
        for registered in REGISTRATION_HOOKS:
            registered.pop(id(self), None)
        # It may be a method of the owner of this object: a cycle would keep the program alive.
        self._declared = None

    def all(self) -> list[nn.Module]:
        return list(self._found)

    def lazy_buffer_of(self, slot: Slot) -> str | None:
        """The name of the lazy buffer on a storage; None if there is none.

        Under pytorch-pfn-extras' protocol a module names its lazy buffers, when it has registered
        them, and ``Module._apply`` replaces them without any hook: they are known by their owner.
        """
        for module in self._found:
            if hasattr(module, "lazy_buffer_names"):
                for name in module.lazy_buffer_names:  # type: ignore[union-attr]
                    buffer = own_buffers(module).get(name)
                    if buffer is not None and slot_of(buffer) is slot:
                        return f"{name_of_class(module)}.{name}"
        return None

    def path(self, module: nn.Module, depth: int = 0) -> str:
        """The fqn of a module in the outermost module that contains it, with a final dot."""
        known = self._paths.get(module)
        if known is None:
            parent = self._parents.get(module)
            inner = parent is not None and depth < _DEEPEST
            known = f"{self.path(parent[0], depth + 1)}{parent[1]}." if parent and inner else ""
            self._paths[module] = known
        return known


def _leave_meta(placeholder: Tensor, device: torch.device) -> None:
    """Put the empty data of torch's own placeholder on the device that was requested for it.

    Copies and casts of a placeholder are made on the device of its data (torch/nn/parameter.py),
    and ``meta`` would then look like a request of the user.
    """
    if device.type == "cpu" or torch.get_device_module(device.type).is_available():
        with without_modes():
            data = torch.empty(0, dtype=placeholder.dtype, device=device)
            made = as_subclass(type(placeholder), data, placeholder.requires_grad)
            swap_with_hooks(placeholder, made)


def guard_all(writer: ProgramWriter, modules: Registered) -> None:
    """Guard all deferred tensors on the block's modules, and all others that are still alive.

    ``writer.born`` holds the tensor objects that were seen when they were made. The walk over
    the modules finds all others, and gives slots the names that error messages show.
    """
    seen: set[int] = set()
    # First, since the guards must exchange the same tensor objects that a C++ module returns.
    scripts = [module for found in writer.scripts if (module := found()) is not None]
    held = held_by_script(scripts)
    for module in modules.all():
        path = None
        for name, tensor in own_tensors(module, seen):
            slot = slot_of(tensor)
            if slot is None and tensor.dtype is torch.uint8 and not tensor.is_meta:
                writer.kept.append((name, tensor))
            elif slot is None and tensor.is_meta:
                # The caller made it on meta and passed it in, where eager construction leaves it.
                attach(tensor.untyped_storage(), ON_META)
            elif slot is not None and slot is not ON_META:
                if isinstance(tensor, UninitializedTensorMixin):
                    _leave_meta(tensor, writer.device_of(tensor))
                guard(tensor)
                if slot.name is None:
                    path = modules.path(module) if path is None else path
                    slot.name = path + name
    for reference in writer.born:
        made = reference()
        if made is not None and not isinstance(made, Guarded) and is_deferred_tensor(made):
            guard(made)
    for script in held:
        for tensor in filter(is_deferred_tensor, script.tensors()):
            guard(tensor)
            named = slot_of(tensor)
            if named is not None and named.name is None:
                named.name = script.name
        script.put_back()
    writer.born.clear()
    writer.scripts.clear()
