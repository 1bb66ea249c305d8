"""The arguments of a module class, whatever its ``__init__`` forwards."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any

from torch import nn

_VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def parameters_of(cls: type[nn.Module]) -> dict[str, inspect.Parameter]:
    """The arguments of a constructor by name; where it forwards all, those of the class above."""
    found: dict[str, inspect.Parameter] = {}
    forwards = False
    for base in cls.__mro__:
        init = base.__dict__.get("__init__")
        if init is None or base is nn.Module:
            continue
        own = list(inspect.signature(init).parameters.values())[1:]
        named = [p for p in own if p.kind not in _VARIADIC]
        found |= {p.name: p for p in named if p.name not in found}
        forwards = any(p.kind in _VARIADIC for p in own)
        if not forwards:
            break
    if issubclass(cls, nn.RNNBase) and cls is not nn.RNNBase:
        found = {name: p for name, p in found.items() if name != "mode"}
        if cls is nn.RNN:
            found = _with_nonlinearity(found)
    return found


def _with_nonlinearity(found: dict[str, inspect.Parameter]) -> dict[str, inspect.Parameter]:
    # nn.RNN takes it out of its *args itself, in fourth place.
    items = list(found.items())
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    items.insert(3, ("nonlinearity", inspect.Parameter("nonlinearity", kind, default="tanh")))
    return dict(items)


def accepts_any(cls: type[nn.Module]) -> bool:
    """Whether a constructor takes arguments that its signature does not name."""
    signature = inspect.signature(cls.__init__)
    return any(p.kind in _VARIADIC for p in signature.parameters.values())


def without(cls: type[nn.Module], names: Iterable[str]) -> inspect.Signature:
    """The signature of a class without some of its arguments."""
    left = set(names)
    kept = [p for name, p in parameters_of(cls).items() if name not in left]
    seen_default = False
    ordered = []
    for p in kept:
        has_default = p.default is not inspect.Parameter.empty
        late = seen_default and not has_default
        ordered.append(p.replace(kind=inspect.Parameter.KEYWORD_ONLY) if late else p)
        seen_default = seen_default or has_default
    ordered.sort(key=lambda p: p.kind)
    return inspect.Signature(ordered)


def bind(cls: type[nn.Module], lazy: Iterable[str], args: Any, kwargs: Any) -> dict[str, Any]:
    """Arguments by name, given without the lazy ones; those may be given by name too."""
    lazy = list(lazy)
    given = {name: kwargs.pop(name) for name in lazy if name in kwargs}
    try:
        bound = without(cls, lazy).bind(*args, **kwargs)
    except TypeError as error:
        raise TypeError(f"Lazy{cls.__name__}: {error}") from None
    return given | dict(bound.arguments)
