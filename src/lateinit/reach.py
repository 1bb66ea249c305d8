"""All that a module leads to, kept so that it can be put back as it was.

What runs on a module may write to whatever it can reach: to attributes of modules, but also to
modules in plain lists, to objects of any class, to what a closure holds, to arrays and generators.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterable
from functools import partial
from types import CellType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

_ATOMS = frozenset({bool, int, float, complex, str, bytes, type(None), torch.Size, torch.dtype})
_PLACES = (dict, list, CellType)  # where a tensor can be exchanged for another one
_GENERATORS = (torch.Generator, np.random.RandomState)
_CLOSED = (type, ModuleType, property)
_MACHINERY = frozenset({"torch", "lateinit"})  # whose objects no hook writes to


class Reach:
    """What can be reached from a module by attributes, items and closures, each once."""

    def __init__(self, root: nn.Module) -> None:
        self._places: list[Any] = []
        self._undo: list[Callable[[], None]] = []
        self._seen: dict[int, Any] = {}
        waiting: list[Any] = [root]
        while waiting:
            value = waiting.pop()
            if type(value) in _ATOMS or id(value) in self._seen:
                continue
            self._seen[id(value)] = value  # kept, so that nothing else gets its id
            if isinstance(value, _PLACES):
                self._places.append(value)
            waiting += _parts(value)

    def tensors(self) -> list[Tensor]:
        """Those that were found."""
        return [value for value in self._seen.values() if isinstance(value, Tensor)]

    def keep(self) -> None:
        """Remember how everything is now."""
        found = map(_undo, self._seen.values())
        self._undo = [undo for undo in found if undo is not None]

    def exchange(self, of: Callable[[Tensor], Tensor]) -> None:
        """Put another tensor in the place of each."""
        for place in self._places:
            if isinstance(place, CellType):
                place.cell_contents = exchanged(_inside(place), of)
                continue
            for key, value in list(place.items() if isinstance(place, dict) else enumerate(place)):
                if isinstance(value, (Tensor, tuple)):
                    new = exchanged(value, of)
                    if new is not value:
                        place[key] = new

    def restore(self) -> None:
        """Put everything back as it was then."""
        for undo in self._undo:
            undo()


def exchanged(value: Any, of: Callable[[Tensor], Tensor]) -> Any:
    """A value with other tensors in it, where it is a tensor or a tuple."""
    if isinstance(value, Tensor):
        return of(value)
    if type(value) is tuple:
        new = tuple(exchanged(item, of) for item in value)
        return new if any(a is not b for a, b in zip(value, new, strict=True)) else value
    return value


def _parts(value: Any) -> Iterable[Any]:
    """What a value leads to."""
    if isinstance(value, dict):
        return value.values()
    if isinstance(value, (list, tuple, set, frozenset, deque)):
        return value
    if isinstance(value, CellType):
        return (_inside(value),)
    if isinstance(value, MethodType):
        return (value.__self__, value.__func__)
    if isinstance(value, partial):
        return (value.func, value.args, value.keywords)
    if isinstance(value, np.random.Generator):
        return (value.bit_generator,)
    if isinstance(value, _CLOSED) or is_wrapper(value):
        return ()
    if not isinstance(value, (nn.Module, Tensor)) and _is_machinery(value):
        return ()
    closed_over = (value.__closure__ or ()) if isinstance(value, FunctionType) else ()
    own = getattr(value, "__dict__", None)
    return (own, *closed_over) if type(own) is dict else closed_over


def is_wrapper(value: Any) -> bool:
    """Whether this is a tensor that consists of others."""
    return hasattr(type(value), "__tensor_flatten__")


def _is_machinery(value: Any) -> bool:
    named = value if isinstance(value, FunctionType) else type(value)
    where = getattr(named, "__module__", None) or ""
    return where.partition(".")[0] in _MACHINERY and not where.startswith("torch.nn.modules.")


def _inside(cell: CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # nothing yet
        return None


def _undo(value: Any) -> Callable[[], None] | None:
    """What puts a value back as it is now, if it can be written to."""
    if isinstance(value, dict):
        return partial(_put_items, value, dict(value))
    if isinstance(value, (list, deque, bytearray)):
        return partial(_put, value, list(value), value.extend)
    if isinstance(value, set):
        return partial(_put, value, list(value), value.update)
    if isinstance(value, CellType):
        return partial(_put_inside, value, _inside(value))
    if isinstance(value, nn.Module):
        return partial(object.__setattr__, value, "__class__", type(value))
    if isinstance(value, np.ndarray) and value.flags.writeable and not _is_mapped(value):
        return partial(np.copyto, value, value.copy())
    if isinstance(value, np.random.BitGenerator):
        return partial(setattr, value, "state", value.state)
    if isinstance(value, random.Random):
        return partial(value.setstate, value.getstate())
    if isinstance(value, _GENERATORS):
        put: Callable[..., Any] = value.set_state
        return partial(put, value.get_state())
    return None


def _is_mapped(array: Any) -> bool:
    return isinstance(array, np.memmap) or isinstance(array.base, np.memmap)


def _same(ours: Iterable[Any], theirs: Iterable[Any]) -> bool:
    return all(a is b for a, b in zip(ours, theirs, strict=True))


def _put_items(place: dict[Any, Any], held: dict[Any, Any]) -> None:
    same = len(place) == len(held) and _same(place, held)
    if not same or not _same(place.values(), held.values()):
        place.clear()
        place.update(held)


def _put(place: Any, held: list[Any], fill: Callable[[list[Any]], Any]) -> None:
    if len(place) != len(held) or not _same(place, held):
        place.clear()
        fill(held)


def _put_inside(cell: CellType, held: Any) -> None:
    if _inside(cell) is not held:
        cell.cell_contents = held
