"""TorchScript modules: a C++ object holds the implementations of their tensors, not the objects.

After an exchange of implementations (``swap``) it therefore holds the old ones, until the tensor
objects are assigned to it again.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lateinit._torch.arguments import tensors_in

_ScriptModule: Any = torch.jit.ScriptModule
RecursiveScriptModule: Any = torch.jit._script.RecursiveScriptModule
construct_script_module = RecursiveScriptModule.__init__
"""The function that makes every scripted or traced module (torch/jit/_script.py)."""

_scripted: weakref.WeakSet[nn.Module] = weakref.WeakSet()

# torch/jit/_script.py: torch.jit.save calls one of the first two, and C++ does the rest.
_SAVES = {
    name: vars(RecursiveScriptModule)[name]
    for name in (
        "save",
        "save_to_buffer",
        "_save_for_lite_interpreter",
        "_save_to_buffer_for_lite_interpreter",
    )
}


class Held(NamedTuple):
    """An attribute of a scripted module that is a tensor or contains tensors."""

    module: Any
    name: str
    value: Any

    def tensors(self) -> list[Tensor]:
        """Its tensors."""
        values = tuple(self.value.values()) if isinstance(self.value, dict) else (self.value,)
        return tensors_in(values, {})

    def put_back(self) -> None:
        """Have the C++ module hold the present implementations of the tensor objects."""
        self.module._c.setattr(self.name, self.value)


def held_by_script(modules: Iterable[nn.Module]) -> list[Held]:
    """The tensor attributes of the scripted modules among some: parameters, buffers and others.

    As long as these tensor objects live, C++ returns them when the attributes are read.
    """
    return [
        held
        for module in modules
        if isinstance(module, _ScriptModule)
        for held in _attributes(module)
        if held.tensors()
    ]


def _attributes(module: Any) -> Iterator[Held]:
    # A traced module, and an instance of a subclass of ScriptModule, forwards to the module that it
    # wraps.
    cpp = getattr(module, "_c", None)
    if cpp is None:
        return
    # torch/jit/_recursive.py sets it; a module that is loaded or frozen has none.
    known = getattr(module, "_concrete_type", None)
    names = {} if known is None else known.get_attributes()
    own: Any = torch._C.ParameterDict(cpp), torch._C.BufferDict(cpp)
    for name in dict.fromkeys((*names, *(name for held in own for name, _ in held.items()))):
        yield Held(module, name, cpp.getattr(name))


def constants_of_script(module: nn.Module) -> list[Tensor]:
    """The tensors that the graphs of a scripted module hold as constants; they cannot be replaced.

    ``torch.jit.freeze`` makes constants of parameters, and ``torch.jit.trace`` of other tensors.
    """
    cpp = getattr(module, "_c", None) if isinstance(module, _ScriptModule) else None
    if cpp is None:
        return []
    return [
        node.t("value")
        for name in cpp._method_names()
        for node in cpp._get_method(name).graph.findAllNodes("prim::Constant", recurse=True)
        if node.hasAttribute("value") and node.kindOf("value") == "t"
    ]


def tell_of_script_saves(listener: Callable[..., None] | None) -> None:
    """Call ``listener`` with each scripted module before it is saved; None ends that."""
    for name, save in _SAVES.items():
        told = save if listener is None else _telling(listener, save)
        # The end of torch/jit/_script.py copies the methods, for traced modules and subclasses.
        setattr(RecursiveScriptModule, name, told)
        setattr(_ScriptModule, name, told)


def note_new_scripts(*, on: bool) -> None:
    """Start or stop noting the scripted modules that are made, for ``noted_scripts``."""
    RecursiveScriptModule.__init__ = _construct_noted if on else construct_script_module


def noted_scripts() -> list[nn.Module]:
    """The scripted modules that were noted and still live."""
    return list(_scripted)


def _construct_noted(module: Any, *args: Any, **kwargs: Any) -> None:
    construct_script_module(module, *args, **kwargs)
    _scripted.add(module)


def _telling(listener: Callable[..., None], save: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(save)
    def told(*args: Any, **kwargs: Any) -> Any:
        listener(*args, **kwargs)
        return save(*args, **kwargs)

    return told
