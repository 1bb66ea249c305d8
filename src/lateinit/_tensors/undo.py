"""Remember the state of an object, to restore it after code that may have changed it.

``object_graph`` finds the objects that a forward pass or a hook may write to. This module knows the
state of each kind: containers, attributes, slots, cells, arrays, classes and random generators.
"""

from __future__ import annotations

import copyreg
import random
import sys
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from types import CellType, FunctionType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

_UNSET = object()
_GENERATORS = (torch.Generator, np.random.RandomState)
# Users' code does not write to objects of these packages, except to those of the modules below:
# layers, optimizers, distributions, and classes that `parametrize` makes for one module each.
_MACHINERY = frozenset({"torch", "lateinit"})
_ENTERED = (
    "torch.nn.modules.",
    "torch.nn.utils.parametrize",
    "torch.optim.",
    "torch.distributions.",
)
_STANDARD = frozenset({*sys.stdlib_module_names, "numpy"})

Undo = Callable[[], None]


def is_machinery(value: Any) -> bool:
    """Whether an object, a class or a function belongs to torch or lateinit, and stays as it is."""
    named = value if isinstance(value, (FunctionType, type)) else type(value)
    where = getattr(named, "__module__", None) or ""
    return where.partition(".")[0] in _MACHINERY and not where.startswith(_ENTERED)


def is_users_class(value: Any) -> bool:
    """Whether a value is a class whose attributes a forward pass may write to."""
    if not isinstance(value, type) or is_machinery(value):
        return False
    return (getattr(value, "__module__", None) or "").partition(".")[0] not in _STANDARD


def slots_of(value: Any) -> dict[str, Any]:
    """The values in an object's ``__slots__``, by name."""
    names = _slot_names(value)
    held = ((name, getattr(value, name, _UNSET)) for name in names)
    return {name: part for name, part in held if part is not _UNSET}


def _slot_names(value: Any) -> list[str]:
    kind = type(value)
    if not hasattr(kind, "__slots__") or issubclass(kind, (Tensor, tuple)) or is_machinery(value):
        return []
    names: list[str] = copyreg._slotnames(kind)  # type: ignore[attr-defined]
    return names


def own_dictionary(value: Any) -> dict[str, Any] | None:
    """The ``__dict__`` of an object, if it has a plain one."""
    try:
        own = value.__dict__
    except Exception:  # noqa: BLE001 - no __dict__, or a property that raises anything
        return None
    return own if type(own) is dict else None


def inside(cell: CellType) -> Any:
    """The value in a cell of a closure; None if its variable is not assigned yet."""
    try:
        return cell.cell_contents
    except ValueError:
        return None


def same(ours: Iterable[Any], theirs: Iterable[Any]) -> bool:
    """Whether two iterables hold the same objects: by identity, as ``==`` compares elements."""
    return all(a is b for a, b in zip(ours, theirs, strict=True))


def undo_of(value: Any) -> Iterator[Undo]:
    """Functions that restore the current state of an object; none if it is immutable."""
    if isinstance(value, (dict, list, deque, bytearray, set)):
        yield from _undo_container(value)
    elif isinstance(value, CellType):
        yield partial(put_inside, value, inside(value))
    elif isinstance(value, np.ndarray):
        yield from _undo_array(value)
    elif isinstance(value, partial):
        yield partial(value.__setstate__, value.__reduce__()[2])  # type: ignore[attr-defined]
    elif is_users_class(value):
        yield partial(_put_attributes, value, dict(vars(value)))
    elif isinstance(value, FunctionType):
        yield partial(setattr, value, "__defaults__", value.__defaults__)
    elif not isinstance(value, (type, Tensor)):
        yield from _undo_object(value)


def _undo_container(value: Any) -> Iterator[Undo]:
    if isinstance(value, dict):
        yield partial(put_items, value, dict(value))
    else:
        yield partial(put, value, list(value))
    if isinstance(value, defaultdict):
        yield partial(setattr, value, "default_factory", value.default_factory)
    own = own_dictionary(value)
    if own is not None:
        yield partial(_put_dictionary, value, type(value), own)


def _undo_object(value: Any) -> Iterator[Undo]:
    """Restore an object's class, its slots and its dictionary; the items are restored elsewhere."""
    if isinstance(value, nn.Module) or not is_machinery(value):
        own = own_dictionary(value)
        if own is not None:
            yield partial(_put_dictionary, value, type(value), own)
    names = _slot_names(value)
    if names:
        yield partial(_put_slots, value, names, slots_of(value))
    if isinstance(value, np.random.BitGenerator):
        yield partial(setattr, value, "state", value.state)
    elif isinstance(value, random.Random) and not isinstance(value, random.SystemRandom):
        yield partial(value.setstate, value.getstate())
    elif isinstance(value, _GENERATORS):
        set_state: Callable[..., Any] = value.set_state
        yield partial(set_state, value.get_state())


def _undo_array(value: Any) -> Iterator[Undo]:
    # A copy of a memory-mapped file would read the whole file.
    mapped = isinstance(value, np.memmap) or isinstance(value.base, np.memmap)
    if value.flags.writeable and not mapped:
        yield partial(_put_array, value, value.shape, value.copy())


def put_items(place: dict[Any, Any], held: dict[Any, Any]) -> None:
    """Set the items of a dictionary; it is not written to if it has them already."""
    if len(place) == len(held) and same(place, held) and same(place.values(), held.values()):
        return
    # By the methods of the base class, since a user's class may refuse, or do more.
    _base(place).clear(place)
    for key, value in held.items():
        set_item(place, key, value)


def set_item(place: dict[Any, Any], key: Any, value: Any) -> None:
    """``place[key] = value``, without calling the ``__setitem__`` of a user's class."""
    _base(place).__setitem__(place, key, value)


def _base(place: dict[Any, Any]) -> Any:
    return OrderedDict if isinstance(place, OrderedDict) else dict


def put(place: Any, held: list[Any]) -> None:
    """Set the items of a list, deque, bytearray or set, in place."""
    if len(place) != len(held) or not same(place, held):
        place.clear()
        (place.update if isinstance(place, set) else place.extend)(held)


def put_inside(cell: CellType, held: Any) -> None:
    """Set the value in a cell of a closure."""
    if inside(cell) is not held:
        cell.cell_contents = held


def _put_array(place: Any, shape: tuple[int, ...], held: Any) -> None:
    if not place.flags.writeable:
        place.flags.writeable = True
    if place.size != held.size:
        place.resize(shape, refcheck=False)
    elif place.shape != shape:
        place.shape = shape
    np.copyto(place, held)


def _put_attributes(cls: type, held: dict[str, Any]) -> None:
    for name in vars(cls).keys() - held.keys():
        delattr(cls, name)
    for name, value in held.items():
        if vars(cls).get(name, _UNSET) is not value:
            setattr(cls, name, value)


def _put_dictionary(place: Any, cls: type, own: dict[str, Any]) -> None:
    if type(place) is not cls:
        object.__setattr__(place, "__class__", cls)
    if own_dictionary(place) is not own:
        object.__setattr__(place, "__dict__", own)


def _put_slots(place: Any, names: list[str], held: dict[str, Any]) -> None:
    for name in names:
        if name in held:
            object.__setattr__(place, name, held[name])
        elif hasattr(place, name):
            object.__delattr__(place, name)
