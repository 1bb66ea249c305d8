"""The graph of Python objects that a module can reach; restored after a trial run.

A forward pass may write to everything that it can reach: attributes of modules, modules in plain
lists, objects of any class, the cells of closures, arrays and generators. ``infer_shapes`` and
loading run forwards and hooks that must leave no trace. They remember the graph, exchange tensors
in it, run, and restore it.
"""

from __future__ import annotations

import copyreg
import random
from collections import deque
from collections.abc import Callable, Iterable
from functools import partial
from types import CellType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lateinit._identity import IdentityMap
from lateinit._torch import OWN_ATTRIBUTES, is_wrapper, own_buffers, own_parameters

_ATOMS = frozenset({bool, int, float, complex, str, bytes, type(None), torch.Size, torch.dtype})
_DATA = (dict, list, set, deque, np.ndarray, Tensor)
_UNSET = object()
# Objects whose parts are read-only attributes of C types, in no __dict__ or __slots__.
_BY_NAME: dict[type, tuple[str, ...]] = {
    MethodType: ("__self__", "__func__"),
    partial: ("func", "args", "keywords"),
    np.random.Generator: ("bit_generator",),
}
_GENERATORS = (torch.Generator, np.random.RandomState)
_CLOSED = (type, ModuleType, property)
# Objects of these packages are not entered, since no hook writes to them: except modules and
# optimizers, which users' hooks do write to.
_MACHINERY = frozenset({"torch", "lateinit"})
_ENTERED = ("torch.nn.modules.", "torch.optim.")


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
            waiting += _parts(value)

    def tensors(self) -> list[Tensor]:
        """All tensors of the graph."""
        return [value for value in self._seen if isinstance(value, Tensor)]

    def keep(self) -> None:
        """Remember the current state of every object, for ``restore``."""
        found = map(_undo, self._seen)
        self._undo = [undo for undo in found if undo is not None]

    def exchange(self, of: Callable[[Tensor], Tensor]) -> None:
        """Replace each tensor by ``of(tensor)`` wherever the graph holds it."""
        for place in self._seen:
            if isinstance(place, dict):
                _exchange_items(place, of)
            elif isinstance(place, (list, deque)):
                for at, value in enumerate(place):
                    if isinstance(value, (Tensor, tuple)):
                        place[at] = exchanged(value, of)
            elif isinstance(place, set) and any(isinstance(value, Tensor) for value in place):
                _put(place, [exchanged(value, of) for value in place], place.update)
            elif isinstance(place, CellType):
                _put_inside(place, exchanged(_inside(place), of))
            elif _is_class(place):
                for name, value in list(vars(place).items()):
                    if isinstance(value, Tensor):
                        setattr(place, name, of(value))
            else:
                for name, value in _slots(place):
                    object.__setattr__(place, name, exchanged(value, of))

    def restore(self) -> None:
        """Put every object back into the state that ``keep`` remembered."""
        for undo in self._undo:
            undo()


def exchange_held(module: nn.Module, of: Callable[[Tensor], Tensor]) -> None:
    """Replace the tensors that a module and those below it hold, but for what only hooks hold.

    It is what initialising a module may have made, and far less than all that it reaches.
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
    if isinstance(value, tuple) and (type(value) is tuple or hasattr(value, "_make")):
        new = [exchanged(item, of) for item in value]
        return value if _same(value, new) else getattr(type(value), "_make", tuple)(new)
    return value


def _exchange_items(place: dict[Any, Any], of: Callable[[Tensor], Tensor]) -> None:
    if any(isinstance(key, Tensor) for key in place):  # such as the ``state`` of an optimizer
        _put_items(place, {exchanged(k, of): exchanged(v, of) for k, v in place.items()})
        return
    for key, value in list(place.items()):
        if isinstance(value, (Tensor, tuple)):
            new = exchanged(value, of)
            if new is not value:
                place[key] = new


def _parts(value: Any) -> Iterable[Any]:
    """The objects that a value holds directly."""
    if isinstance(value, dict):
        return [*value.values(), *[key for key in value if type(key) not in _ATOMS]]
    if isinstance(value, (list, tuple, set, frozenset, deque)):
        return value
    if isinstance(value, CellType):
        return (_inside(value),)
    if type(value) in _BY_NAME:
        return [getattr(value, name) for name in _BY_NAME[type(value)]]
    if _is_class(value):
        return [held for held in vars(value).values() if isinstance(held, _DATA)]
    if isinstance(value, _CLOSED) or is_wrapper(value):
        return ()
    if not isinstance(value, (nn.Module, Tensor)) and _is_machinery(value):
        return ()
    closed_over = (value.__closure__ or ()) if isinstance(value, FunctionType) else ()
    classes = type(value).__mro__ if isinstance(value, nn.Module) else ()
    slots = (*classes, *(held for _, held in _slots(value)))
    try:
        own = value.__dict__
    except Exception:  # noqa: BLE001 - no __dict__, or a property that raises anything
        return (*slots, *closed_over)
    return (own, *slots, *closed_over) if type(own) is dict else ()


def _is_class(value: Any) -> bool:
    """Whether a value is a user's class of modules, whose attributes a forward may write to."""
    return isinstance(value, type) and issubclass(value, nn.Module) and not _is_machinery(value)


def _slots(value: Any) -> list[tuple[str, Any]]:
    """The names and values of an object's ``__slots__``."""
    kind = type(value)
    if not hasattr(kind, "__slots__") or issubclass(kind, (Tensor, tuple)) or _is_machinery(value):
        return []
    names = copyreg._slotnames(kind)  # type: ignore[attr-defined]
    held = ((name, getattr(value, name, _UNSET)) for name in names)
    return [(name, part) for name, part in held if part is not _UNSET]


def _is_machinery(value: Any) -> bool:
    named = value if isinstance(value, (FunctionType, type)) else type(value)
    where = getattr(named, "__module__", None) or ""
    return where.partition(".")[0] in _MACHINERY and not where.startswith(_ENTERED)


def _inside(cell: CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # the cell of a variable that is not assigned yet
        return None


def _undo(value: Any) -> Callable[[], None] | None:
    """A function that restores the current state of a value, or None for an immutable one."""
    if isinstance(value, dict):
        return partial(_put_items, value, dict(value))
    if isinstance(value, (list, deque, bytearray)):
        return partial(_put, value, list(value), value.extend)
    if isinstance(value, set):
        return partial(_put, value, list(value), value.update)
    if isinstance(value, CellType):
        return partial(_put_inside, value, _inside(value))
    if isinstance(value, nn.Module):
        # Its __dict__ is an object of the graph itself. torch's lazy modules change their class.
        return partial(object.__setattr__, value, "__class__", type(value))
    if isinstance(value, np.ndarray) and value.flags.writeable and not _is_mapped(value):
        return partial(np.copyto, value, value.copy())
    if _is_class(value):
        return partial(_put_attributes, value, dict(vars(value)))
    slots = _slots(value)
    return partial(_put_slots, value, slots) if slots else _undo_draws(value)


def _undo_draws(value: Any) -> Callable[[], None] | None:
    """A function that restores the state of a random generator, or None."""
    if isinstance(value, np.random.BitGenerator):
        return partial(setattr, value, "state", value.state)
    if isinstance(value, random.Random):
        return partial(value.setstate, value.getstate())
    if isinstance(value, _GENERATORS):
        put: Callable[..., Any] = value.set_state
        return partial(put, value.get_state())
    return None


def _is_mapped(array: Any) -> bool:
    # A copy of a memory-mapped file would read all of it.
    return isinstance(array, np.memmap) or isinstance(array.base, np.memmap)


def _same(ours: Iterable[Any], theirs: Iterable[Any]) -> bool:
    return all(a is b for a, b in zip(ours, theirs, strict=True))


def _put_items(place: dict[Any, Any], held: dict[Any, Any]) -> None:
    # An unchanged object is not written to: comparing is by identity, since == of tensors computes.
    same = len(place) == len(held) and _same(place, held)
    if not same or not _same(place.values(), held.values()):
        place.clear()
        place.update(held)


def _put(place: Any, held: list[Any], fill: Callable[[list[Any]], Any]) -> None:
    if len(place) != len(held) or not _same(place, held):
        place.clear()
        fill(held)


def _put_attributes(cls: type, held: dict[str, Any]) -> None:
    for name in vars(cls).keys() - held.keys():
        delattr(cls, name)
    for name, value in held.items():
        if vars(cls).get(name, _UNSET) is not value:
            setattr(cls, name, value)


def _put_slots(place: Any, held: list[tuple[str, Any]]) -> None:
    for name, value in held:
        object.__setattr__(place, name, value)


def _put_inside(cell: CellType, held: Any) -> None:
    if _inside(cell) is not held:
        cell.cell_contents = held
