"""A dictionary whose keys are compared by identity."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, MutableMapping
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

    __slots__ = ("_held",)

    def __init__(self, pairs: Iterable[tuple[K, V]] = ()) -> None:
        self._held: dict[int, tuple[K, V]] = {id(key): (key, value) for key, value in pairs}

    def __getitem__(self, key: K) -> V:
        return self._held[id(key)][1]

    def __setitem__(self, key: K, value: V) -> None:
        self._held[id(key)] = key, value

    def __delitem__(self, key: K) -> None:
        del self._held[id(key)]

    def __contains__(self, key: object) -> bool:
        return id(key) in self._held

    def __iter__(self) -> Iterator[K]:
        return (key for key, _ in self._held.values())

    def __len__(self) -> int:
        return len(self._held)


def distinct(items: Iterable[K]) -> list[K]:
    """The objects among some items, each once, in their order."""
    return list(IdentityMap((item, None) for item in items))
