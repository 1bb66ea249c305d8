"""Values by patterns on fully qualified names: ``device=``, ``dtype=`` and ``init=`` as maps.

A pattern with a wildcard is a glob, as in ``only=``, unless a tensor or a module has that name. Any
other pattern is the name of a tensor, or of a module and everything below it; ``""`` is everything.
If several patterns match, the most specific wins.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any, Generic, TypeVar

from lateinit._tensors.walk import Found, modules_by_name
from lateinit.errors import PatternError, candidates, listing

V = TypeVar("V")
_WILDCARD = re.compile(r"[*?[]")


def has_wildcard(pattern: str) -> bool:
    """Whether a pattern is a glob, and not a name."""
    return _WILDCARD.search(pattern) is not None


class NameMap(Generic[V]):
    """A mapping from patterns to values.

    Args:
        argument: the name of the argument, for messages.
        given: the mapping.
        optional: patterns that may match nothing.

    Raises:
        TypeError: a pattern is no string.
        PatternError: there is no pattern.
    """

    def __init__(
        self, argument: str, given: Mapping[str, V], optional: Collection[str] = ()
    ) -> None:
        keys: list[Any] = list(given)
        wrong = [key for key in keys if not isinstance(key, str)]
        if wrong:
            raise TypeError(
                f"{argument}={{{wrong[0]!r}: ...}}: a name of a tensor or a module, or a glob, is "
                "meant"
            )
        if not given:
            raise PatternError(f"{argument}={{}}: a map without a pattern says nothing; leave it")
        self.argument = argument
        self.given = dict(given)
        self._optional = optional
        globs = [pattern for pattern in self.given if has_wildcard(pattern)]
        self._globs = {p: re.compile(fnmatch.translate(p)).match for p in globs}
        self._names = self.given.keys() - self._globs.keys()

    def matches(self, pattern: str, name: str) -> bool:
        """Whether a pattern of the map matches a name."""
        glob = self._globs.get(pattern)
        if glob is not None:
            return glob(name) is not None
        return pattern in ("", name) or name.startswith(f"{pattern}.")

    def patterns_of(self, name: str) -> list[str]:
        """The patterns that match a name, without the shorter of two prefixes."""
        prefix = next((p for p in _prefixes(name) if p in self._names), None)
        globs = [p for p, glob in self._globs.items() if glob(name)]
        return globs if prefix is None else [prefix, *globs]

    def entry(self, name: str) -> str | None:
        """The most specific pattern that matches a name; None if none does.

        Raises:
            PatternError: two such patterns are equally specific and have different values.
        """
        matching = self.patterns_of(name)
        if len(matching) < 2:
            return matching[0] if matching else None
        best = [p for p in matching if not any(self._is_more_specific(q, p) for q in matching)]
        for other in best[1:]:
            if self.given[other] != self.given[best[0]]:
                raise PatternError(
                    f"{self.argument}=: {best[0]!r} and {other!r} both match {name!r}, neither is "
                    f"more specific, and they say {_told(self.given[best[0]])} and "
                    f"{_told(self.given[other])}: add {name!r} itself"
                )
        return best[0]

    def _is_more_specific(self, pattern: str, other: str) -> bool:
        return self.matches(other, pattern) and not self.matches(pattern, other)

    def entry_of(self, found: Found) -> str | None:
        """The pattern whose value a tensor gets; None if no pattern matches any of its names.

        Raises:
            PatternError: patterns that match different names of the tensor have different values.
        """
        entries = {name: p for name in found.names if (p := self.entry(name)) is not None}
        told = list(entries.items())
        for name, pattern in told[1:]:
            if self.given[pattern] != self.given[told[0][1]]:
                raise PatternError(
                    f"{self.argument}=: {told[0][0]!r} and {name!r} are one tensor, for which "
                    f"{told[0][1]!r} says {_told(self.given[told[0][1]])} and {pattern!r} says "
                    f"{_told(self.given[pattern])}: give both names the same"
                )
        return told[0][1] if told else None

    def check(self, found: Iterable[Found], target: Any = None) -> None:
        """Raise if a pattern matches nothing; make a glob that is a name into that name.

        Args:
            found: all tensors of the target.
            target: the target, if a pattern may also name a module of it that has no tensors.

        Raises:
            PatternError: a pattern matches nothing; the message lists the existing names.
        """
        names = [name for each in found for name in each.names]
        below = {prefix for name in names for prefix in _prefixes(name)}
        for pattern in below & self._globs.keys():
            del self._globs[pattern]
        self._names = self.given.keys() - self._globs.keys()
        lost = [p for p in self.given if p not in below and not self._matches_any(p, names)]
        if len(lost) < len(self.given):
            lost = [p for p in lost if p not in self._optional]
        if lost and target is not None:
            modules = modules_by_name(target)
            lost = [p for p in lost if p not in modules]
        if lost:
            what = "pattern" if len(lost) == 1 else "patterns"
            raise PatternError(
                f"{self.argument}=: the {what} {listing(map(repr, lost))} match"
                f"{'es' if len(lost) == 1 else ''} no tensor; there are: "
                f"{candidates(lost[0], names)}"
            )

    def _matches_any(self, pattern: str, names: Iterable[str]) -> bool:
        return any(self.matches(pattern, name) for name in names)


def _prefixes(name: str) -> Iterator[str]:
    """A name, the modules above it from the nearest on, and ``""``."""
    while name:
        yield name
        name = name.rpartition(".")[0]
    yield ""


def _told(value: object) -> str:
    return str(value) if type(value).__module__ != "builtins" else repr(value)
