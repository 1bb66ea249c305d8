"""Fold the names of repeated layers: ``layers.{0..31}.mlp.up_proj.weight``."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import TypeVar

from lateinit._identity import IdentityMap

T = TypeVar("T")
# The most runs of numbers in a folded name, such as `{0..3,5,7,...,31}`. Bounds its length.
_MOST_RUNS = 4


def fold(
    rows: Iterable[T], name: Callable[[T], str], kind: Callable[[T], Hashable]
) -> list[tuple[str, list[T]]]:
    """Group rows of one kind whose names differ only in their layer numbers.

    A folded name stands for exactly the names of its rows: numbers are folded only if every
    combination of them occurs.

    Args:
        rows: the rows, in order; groups are in the order of their first rows.
        name: returns the name of a row.
        kind: returns a key; rows are grouped only if their keys are equal.
    """
    groups: dict[Hashable, list[T]] = {}
    places: IdentityMap[T, int] = IdentityMap()
    for row in rows:
        places[row] = len(places)
        groups.setdefault((_pattern(name(row)), kind(row)), []).append(row)
    folded = [part for group in groups.values() for part in _fold_group(group, name)]
    return sorted(folded, key=lambda part: places[part[1][0]])


def _fold_group(rows: list[T], name: Callable[[T], str]) -> list[tuple[str, list[T]]]:
    numbers = [_numbers(name(row)) for row in rows]
    sets = [sorted(set(column)) for column in zip(*numbers, strict=True)]
    if math.prod(map(len, sets)) == len(rows):
        return [(_pattern(name(rows[0])).format(*map(_braces, sets)), rows)]
    by_rest: dict[Hashable, list[T]] = {}
    for row, found in zip(rows, numbers, strict=True):
        by_rest.setdefault(found[1:], []).append(row)
    if len(by_rest) == 1:  # rows with the same numbers cannot be distinguished by them
        return [(name(row), [row]) for row in rows]
    return [part for group in by_rest.values() for part in _fold_group(group, name)]


def _pattern(name: str) -> str:
    escaped = name.replace("{", "{{").replace("}", "}}")
    return ".".join("{}" if part.isdecimal() else part for part in escaped.split("."))


def _numbers(name: str) -> tuple[int, ...]:
    return tuple(int(part) for part in name.split(".") if part.isdecimal())


def _braces(numbers: Sequence[int]) -> str:
    """``7`` or ``{0..31}`` or ``{0,2..4,9}``."""
    if len(numbers) == 1:
        return str(numbers[0])
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1] = [runs[-1][0], number]
        else:
            runs.append([number])
    shown = ["..".join(map(str, run)) for run in runs]
    if len(shown) > _MOST_RUNS:
        shown = [*shown[: _MOST_RUNS - 1], "...", shown[-1]]
    return "{" + ",".join(shown) + "}"
