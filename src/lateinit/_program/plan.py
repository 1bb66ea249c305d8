"""From the storages that are wanted to the ops that must run.

A backward walk over the program from the last write of each wanted storage: an op is needed if it
writes a storage whose value is needed, and then so is all that it reads. An op that overwrites
a storage wholly ends the need for what was written there before (a *dead store*: most of what an
eager constructor computes). Ops that share storages form a ``Step``; steps are independent.
"""

from __future__ import annotations

import heapq
import math
from bisect import bisect_left
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from lateinit._program.program import Program, TensorRef


class Step(NamedTuple):
    """Ops that must run in this order, and the wanted storages that they give."""

    ops: tuple[int, ...]
    gives: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Plan:
    """What would run, in which order, to give some tensors their values."""

    program: Program
    steps: tuple[Step, ...]
    names: tuple[tuple[str, TensorRef], ...] = ()

    @property
    def nbytes(self) -> int:
        """The bytes of all wanted storages."""
        storages = self.program.storages
        return sum(storages[number].nbytes for step in self.steps for number in step.gives)

    def __str__(self) -> str:
        names: dict[int, list[str]] = {}
        for name, ref in self.names:
            names.setdefault(ref.storage, []).append(name)
        needed = sum(len(step.ops) for step in self.steps)
        recorded = f"{needed} of {len(self.program.ops)} recorded ops"
        steps = f"{len(self.steps)} step{'s' * (len(self.steps) != 1)}"
        lines = [f"{steps}, {recorded}, {self.nbytes:,} bytes"]
        for step in self.steps:
            lines += [f"  {number:>5}  {self.program.ops[number]}" for number in step.ops]
            lines += [f"         -> {', '.join(names.get(g, [f'%{g}']))}" for g in step.gives]
        return "\n".join(lines)


def plan_storages(program: Program, wanted: Iterable[int], before: int | None = None) -> list[Step]:
    """The steps that give ``wanted`` storages the values they have before op ``before``."""
    targets = dict.fromkeys(wanted)
    fills = _fills(program, targets, before)
    rest = [storage for storage in targets if storage not in fills]
    if rest:
        # A fill is a step of its own, unless what else is needed has to do with its storage.
        needed = needed_ops(program, rest, before)
        touched = {storage for number in needed for storage in _touched(program, number)}
        shared = [storage for storage in fills if storage in touched]
        needed.update([fills.pop(storage) for storage in shared])
        steps = _steps(program, sorted(needed), dict.fromkeys([*rest, *shared]))
    else:
        steps = []
    steps += [Step((number,), (storage,)) for storage, number in fills.items()]
    return sorted(steps, key=_first_op)


def _first_op(step: Step) -> float:
    return step.ops[0] if step.ops else math.inf


def _fills(program: Program, wanted: Iterable[int], before: int | None) -> dict[int, int]:
    """The number of the op that writes a storage last, where it fills it and reads nothing."""
    end = len(program.ops) if before is None else before
    fills: dict[int, int] = {}
    for storage in wanted:
        number = _below(program.writers(storage), end)
        if number is not None:
            filled = program.ops[number].fills()
            if filled is not None and program.covers(filled):
                fills[storage] = number
    return fills


def needed_ops(program: Program, wanted: Iterable[int], before: int | None = None) -> set[int]:
    """The numbers of the ops that the values of some storages depend on."""
    end = len(program.ops) if before is None else before
    heap: list[tuple[int, int]] = []  # (minus the number of the last write, storage)
    live: dict[int, bool] = {}
    needed: set[int] = set()

    def want(storage: int, bound: int) -> None:
        """Ask for the last write of a storage before op ``bound``."""
        writers = program.writers(storage)
        last = _below(writers, bound)
        if last is not None:
            heapq.heappush(heap, (-last, storage))

    for storage in wanted:
        live[storage] = True
        want(storage, end)
    while heap:
        number, storage = heapq.heappop(heap)
        number = -number
        if not live.get(storage):
            continue
        op = program.ops[number]
        if number not in needed:
            needed.add(number)
            read = {ref.storage for ref in op.read()}
            for gone in _ended(program, number, read):
                live[gone] = False
            for source in read:
                if not live.get(source):
                    live[source] = True
                    want(source, number)
        if live.get(storage):
            want(storage, number)
    return needed


def _ended(program: Program, number: int, read: set[int]) -> Iterator[int]:
    """The storages whose earlier values an op makes irrelevant."""
    for ref in program.ops[number].written():
        if ref.storage not in read and program.covers(ref):
            yield ref.storage


def _below(ascending: list[int], bound: int) -> int | None:
    place = bisect_left(ascending, bound)
    return ascending[place - 1] if place else None


def _steps(program: Program, needed: list[int], targets: dict[int, None]) -> list[Step]:
    """Group ops that touch a common storage; groups in the order of their first ops."""
    parent: dict[int, int] = {}

    def find(storage: int) -> int:
        parent.setdefault(storage, storage)
        while parent[storage] != storage:
            parent[storage] = parent[parent[storage]]
            storage = parent[storage]
        return storage

    first: list[int] = []
    for number in needed:
        touched = _touched(program, number)
        for other in touched[1:]:
            parent[find(other)] = find(touched[0])
        first.append(touched[0])
    ops: dict[int, list[int]] = {}
    for number, storage in zip(needed, first, strict=True):
        ops.setdefault(find(storage), []).append(number)
    gives: dict[int, list[int]] = {}
    for storage in targets:
        gives.setdefault(find(storage), []).append(storage)
    bare = [Step((), tuple(gives[root])) for root in gives if root not in ops]
    return [Step(tuple(n), tuple(gives.get(root, ()))) for root, n in ops.items()] + bare


def _touched(program: Program, number: int) -> list[int]:
    op = program.ops[number]
    return [ref.storage for ref in (*op.written(), *op.read())]
