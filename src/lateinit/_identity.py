"""A dictionary whose keys are compared by identity."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, MutableMapping, ValuesView
from typing import Generic, TypeVar

K = TypeVar("K")
V = TypeVar("V")


class IdentityMap(MutableMapping[K, V], Generic[K, V]):
    """A mapping by the identity of its keys, which need be neither hashable nor comparable.

    Tensors compare element by element, and a user's module may compare in any way. A dictionary
    with ``id(key)`` as its keys goes wrong once a key is freed and another object gets its id; the
    map therefore keeps its keys alive.

    Example:
        >>> a, b = [1], [1]
        >>> names = IdentityMap([(a, "a")])
        >>> names[a], b in names
        ('a', False)
    """

    # Separate dictionaries of keys and values make reading a plain look-up: every load reads often.
    __slots__ = ("_keys", "_values")

    def __init__(self, pairs: Iterable[tuple[K, V]] = ()) -> None:
        self._keys: dict[int, K] = {}
        self._values: dict[int, V] = {}
        for key, value in pairs:
            self[key] = value

    def __getitem__(self, key: K) -> V:
        return self._values[id(key)]

    def __setitem__(self, key: K, value: V) -> None:
        self._keys[id(key)] = key
        self._values[id(key)] = value

    def __delitem__(self, key: K) -> None:
        del self._keys[id(key)], self._values[id(key)]

    def __contains__(self, key: object) -> bool:
        return id(key) in self._values

    def __iter__(self) -> Iterator[K]:
        return iter(self._keys.values())

    def __len__(self) -> int:
        return len(self._keys)

    def values(self) -> ValuesView[V]:
        """The values, in the order in which their keys were first set."""
        return self._values.values()


def distinct(items: Iterable[K]) -> list[K]:
    """The distinct objects among some items, in order of first appearance."""
    return list(IdentityMap((item, None) for item in items))
