"""The arguments of a module class, even if its ``__init__`` forwards ``*args`` and ``**kwargs``.

A lazy class is constructed without some of the plain class's arguments, given by position or by
name. This module finds the plain class's arguments, binds the given ones to names, and builds the
call of the plain class from names.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

_VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
Parameters = dict[str, inspect.Parameter]


def parameters_of(cls: type[nn.Module]) -> Parameters:
    """The arguments of a constructor by name, including those it forwards to base classes."""
    return _own_and_rest(cls)[0]


def _own_and_rest(cls: type[nn.Module]) -> tuple[Parameters, Parameters]:
    """The arguments of a constructor, and the variadic ones that no base class gives names to."""
    found: Parameters = {}
    rest: Parameters = {}
    for base in cls.__mro__:
        init = base.__dict__.get("__init__")
        if init is None or base is nn.Module:
            continue
        own = list(inspect.signature(init).parameters.values())[1:]
        found |= {p.name: p for p in own if p.kind not in _VARIADIC and p.name not in found}
        rest = {p.name: p for p in own if p.kind in _VARIADIC}
        if not rest:
            break
    # torch/nn/modules/rnn.py: nn.RNN, nn.LSTM and nn.GRU forward everything to RNNBase, and pass
    # `mode` themselves.
    if issubclass(cls, nn.RNNBase) and cls is not nn.RNNBase:
        found = {name: p for name, p in found.items() if name != "mode"}
        if cls is nn.RNN:
            found = _with_nonlinearity(found)
    return found, rest


def _with_nonlinearity(found: dict[str, inspect.Parameter]) -> dict[str, inspect.Parameter]:
    # nn.RNN.__init__ reads `nonlinearity` from its *args, as the fourth (torch/nn/modules/rnn.py).
    items = list(found.items())
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    items.insert(3, ("nonlinearity", inspect.Parameter("nonlinearity", kind, default="tanh")))
    return dict(items)


def accepts_any(cls: type[nn.Module]) -> bool:
    """Whether a constructor takes keyword arguments that no base class names."""
    return any(p.kind is inspect.Parameter.VAR_KEYWORD for p in _own_and_rest(cls)[1].values())


def without(cls: type[nn.Module], names: Iterable[str]) -> inspect.Signature:
    """The signature of a class without some of its arguments."""
    left = set(names)
    found, rest = _own_and_rest(cls)
    kept = [p for name, p in (found | rest).items() if name not in left]
    seen_default = False
    ordered = []
    for p in kept:
        has_default = p.default is not inspect.Parameter.empty
        # A required argument may not follow an optional one: it can be given by name only.
        late = seen_default and not has_default and p.kind not in _VARIADIC
        ordered.append(p.replace(kind=inspect.Parameter.KEYWORD_ONLY) if late else p)
        seen_default = seen_default or has_default
    ordered.sort(key=lambda p: p.kind)
    return inspect.Signature(ordered)


def call_with(cls: type[nn.Module], values: Mapping[str, Any]) -> tuple[list[Any], dict[str, Any]]:
    """The positional and the keyword arguments that pass ``values`` to a constructor."""
    found, rest = _own_and_rest(cls)
    kinds = {name: p.kind for name, p in (found | rest).items()}
    more = [n for n, kind in kinds.items() if kind is inspect.Parameter.VAR_POSITIONAL]
    by_place = values.get(more[0], ()) if more else ()
    # With values for *args, all arguments before them are passed by position; otherwise only those
    # that must be.
    last = (
        inspect.Parameter.POSITIONAL_OR_KEYWORD if by_place else inspect.Parameter.POSITIONAL_ONLY
    )
    placed = [n for n, kind in kinds.items() if kind <= last and n in values]
    named = {n: v for n, v in values.items() if n not in placed and n not in more}
    for name in [n for n in named if kinds.get(n) is inspect.Parameter.VAR_KEYWORD]:
        named |= named.pop(name)
    return [*(values[name] for name in placed), *by_place], named


def bind(cls: type[nn.Module], lazy: Iterable[str], args: Any, kwargs: Any) -> dict[str, Any]:
    """The given arguments by name.

    Args:
        cls: the plain class.
        lazy: the arguments that are inferred; they may still be given by name.
        args: the positional arguments, in which the lazy ones are skipped.
        kwargs: the keyword arguments; the lazy ones are taken out of it.

    Raises:
        TypeError: the arguments do not fit the class.
    """
    lazy = list(lazy)
    given = {name: kwargs.pop(name) for name in lazy if name in kwargs}
    try:
        bound = without(cls, lazy).bind(*args, **kwargs)
    except TypeError as error:
        raise TypeError(f"Lazy{cls.__name__}: {error}") from None
    return given | dict(bound.arguments)
