"""The graph of Python objects that a module can reach; restored after a trial run.

A forward pass may write to everything that it can reach: attributes of modules, modules in plain
lists, objects of any class, the cells of closures, arrays and generators. ``infer_shapes`` and
loading run forwards and hooks that must leave no trace. They remember the graph, exchange tensors
in it, run, and restore it.
"""

from __future__ import annotations

import gc
from collections import deque
from collections.abc import Callable, Iterable
from functools import partial
from types import (
    BuiltinFunctionType,
    CellType,
    FunctionType,
    MappingProxyType,
    MethodType,
    ModuleType,
)
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lateinit._identity import IdentityMap
from lateinit._tensors.undo import (
    inside,
    is_machinery,
    is_users_class,
    own_dictionary,
    put,
    put_inside,
    put_items,
    same,
    set_item,
    slots_of,
    undo_of,
)
from lateinit._torch import OWN_ATTRIBUTES, is_wrapper, own_buffers, own_parameters

_ATOMS = frozenset({bool, int, float, complex, str, bytes, type(None), torch.Size, torch.dtype})
_ITEMS = (list, tuple, set, frozenset, deque)
# Classes of values without attributes of their own.
_BARE = frozenset({dict, *_ITEMS})
# Immutable values: to change one, it is replaced in the object that holds it.
_REPLACED = (Tensor, tuple, frozenset, BuiltinFunctionType)
# Objects whose parts are read-only attributes of C types, in no __dict__ or __slots__.
_BY_NAME: dict[type, tuple[str, ...]] = {
    MethodType: ("__self__", "__func__"),
    partial: ("func", "args", "keywords"),
    np.random.Generator: ("bit_generator",),
}
_CLOSED = (type, ModuleType, property, staticmethod, classmethod)


class Reach:
    """The objects that a module reaches by attributes, items and closures, each once."""

    def __init__(self, root: Any) -> None:
        self._undo: list[Callable[[], None]] = []
        self._seen: IdentityMap[Any, None] = IdentityMap()
        waiting: list[Any] = [root]
        while waiting:
            value = waiting.pop()
            if type(value) in _ATOMS or value in self._seen:
                continue
            self._seen[value] = None
            waiting += parts_of(value)

    def tensors(self) -> list[Tensor]:
        """All tensors of the graph."""
        return [value for value in self._seen if isinstance(value, Tensor)]

    def keep(self) -> None:
        """Remember the current state of every object, for ``restore``."""
        self._undo = [undo for value in self._seen for undo in undo_of(value)]

    def exchange(self, of: Callable[[Tensor], Tensor]) -> None:
        """Replace each tensor by ``of(tensor)`` wherever the graph holds it."""
        for place in self._seen:
            _exchange_in(place, of)

    def restore(self) -> None:
        """Put every object back into the state that ``keep`` remembered.

        If one object cannot be restored, the others still are; its error is raised at the end.
        """
        failures: list[Exception] = []
        for undo in self._undo:
            try:
                undo()
            except Exception as error:  # noqa: BLE001 - an object of a user's may fail in any way
                failures.append(error)
        if failures:
            raise failures[0]


def exchange_held(module: nn.Module, of: Callable[[Tensor], Tensor]) -> None:
    """Replace the tensors that a module and its children hold, except in hooks.

    Initialising a module can have made only these, and they are far fewer than all it reaches.
    """
    for part in module.modules():
        for held in (own_parameters(part), own_buffers(part), part.__dict__):
            _exchange_items(held, of)
        for name, value in part.__dict__.items():
            if name not in OWN_ATTRIBUTES and type(value) not in _ATOMS:
                Reach(value).exchange(of)


def exchanged(value: Any, of: Callable[[Tensor], Tensor]) -> Any:
    """``of(value)`` for a tensor, a tuple with its tensors replaced, or any other value itself."""
    if isinstance(value, Tensor):
        return of(value)
    if isinstance(value, (tuple, frozenset)):
        new = [exchanged(item, of) for item in value]
        return value if same(value, new) else _rebuilt(value, new)
    if isinstance(value, BuiltinFunctionType) and isinstance(value.__self__, Tensor):
        return getattr(of(value.__self__), value.__name__)
    return value


def _rebuilt(value: Any, items: list[Any]) -> Any:
    """A tuple or frozenset of the class of another one, with other items."""
    try:
        made = getattr(type(value), "_make", type(value))(items)
        vars(made).update(vars(value))
    except TypeError:  # an object without attributes, or a constructor with other arguments
        return made if "made" in locals() else value
    return made


def _exchange_in(place: Any, of: Callable[[Tensor], Tensor]) -> None:
    """Replace the tensors that an object holds directly."""
    for kind, exchange in _EXCHANGES:
        if isinstance(place, kind):
            exchange(place, of)
            break
    for name, value in slots_of(place).items():
        object.__setattr__(place, name, exchanged(value, of))


def _exchange_in_list(place: Any, of: Callable[[Tensor], Tensor]) -> None:
    for at, value in enumerate(place):
        if isinstance(value, _REPLACED):
            place[at] = exchanged(value, of)


def _exchange_in_set(place: Any, of: Callable[[Tensor], Tensor]) -> None:
    if any(isinstance(value, _REPLACED) for value in place):
        put(place, [exchanged(value, of) for value in place])


def _exchange_in_cell(place: Any, of: Callable[[Tensor], Tensor]) -> None:
    put_inside(place, exchanged(inside(place), of))


def _exchange_in_partial(place: Any, of: Callable[[Tensor], Tensor]) -> None:
    func, args, keywords, own = place.__reduce__()[2]
    place.__setstate__((exchanged(func, of), exchanged(args, of), keywords, own))


def _exchange_in_function(place: Any, of: Callable[[Tensor], Tensor]) -> None:
    if place.__defaults__:
        place.__defaults__ = exchanged(place.__defaults__, of)


def _exchange_in_array(place: Any, of: Callable[[Tensor], Tensor]) -> None:
    if place.dtype == object and place.flags.writeable:
        for at, value in enumerate(place.flat):
            if isinstance(value, _REPLACED):
                place.flat[at] = exchanged(value, of)


def _exchange_in_class(place: Any, of: Callable[[Tensor], Tensor]) -> None:
    for name, value in list(vars(place).items()) if is_users_class(place) else ():
        if isinstance(value, Tensor):
            setattr(place, name, of(value))


def _exchange_items(place: dict[Any, Any], of: Callable[[Tensor], Tensor]) -> None:
    if any(isinstance(key, Tensor) for key in place):  # such as the ``state`` of an optimizer
        put_items(place, {exchanged(k, of): exchanged(v, of) for k, v in place.items()})
        return
    for key, value in list(place.items()):
        if isinstance(value, _REPLACED):
            new = exchanged(value, of)
            if new is not value:
                set_item(place, key, new)


_EXCHANGES: tuple[tuple[Any, Callable[..., None]], ...] = (
    (dict, _exchange_items),
    ((list, deque), _exchange_in_list),
    (set, _exchange_in_set),
    (CellType, _exchange_in_cell),
    (partial, _exchange_in_partial),
    (FunctionType, _exchange_in_function),
    (np.ndarray, _exchange_in_array),
    (type, _exchange_in_class),
)


def parts_of(value: Any) -> Iterable[Any]:
    """The objects that a value holds directly."""
    kind = type(value)
    if isinstance(value, (dict, *_ITEMS)):
        items = _items(value)
        return items if kind in _BARE else [*items, *_attributes(value)]
    if kind in _BY_NAME:
        return [getattr(value, name) for name in _BY_NAME[kind]]
    if kind in _PARTS:
        return _PARTS[kind](value)
    if isinstance(value, np.ndarray):
        return list(value.flat) if value.dtype == object else ()
    if is_users_class(value):
        return [held for held in vars(value).values() if _is_held_by_class(held)]
    closed = isinstance(value, _CLOSED) or is_wrapper(value)
    if closed or (not isinstance(value, (nn.Module, Tensor)) and is_machinery(value)):
        return ()
    return _attributes(value)


def _items(value: Any) -> Iterable[Any]:
    if isinstance(value, dict):
        return [*value.values(), *[key for key in value if type(key) not in _ATOMS]]
    return value  # type: ignore[no-any-return]


def _parts_of_function(value: Any) -> Iterable[Any]:
    own = (*(value.__defaults__ or ()), value.__kwdefaults__, *(value.__closure__ or ()))
    return own if is_machinery(value) else (*own, *_attributes(value))


_PARTS: dict[type, Callable[[Any], Iterable[Any]]] = {
    CellType: lambda cell: (inside(cell),),
    BuiltinFunctionType: lambda f: (f.__self__,) if isinstance(f.__self__, Tensor) else (),
    MappingProxyType: gc.get_referents,  # the dictionary behind it
    FunctionType: _parts_of_function,
}


def _attributes(value: Any) -> list[Any]:
    """The ``__dict__`` of an object, the values of its slots, and its classes."""
    kind = type(value)
    classes = kind.__mro__ if isinstance(value, nn.Module) else (kind,)
    found = [*filter(is_users_class, classes), *slots_of(value).values()]
    own = own_dictionary(value)
    return found if own is None else [own, *found]


def _is_held_by_class(value: Any) -> bool:
    """Whether an attribute of a class is data, or a function that holds data."""
    if isinstance(value, FunctionType):
        return bool(value.__closure__ or value.__defaults__ or value.__kwdefaults__)
    return type(value) not in _ATOMS and not isinstance(value, _CLOSED)
