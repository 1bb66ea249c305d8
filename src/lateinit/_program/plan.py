"""Plans: which ops must run to compute some storages, and in which independent steps.

A plan is found by walking the program backwards from the last write of each target storage. An op
is needed if it writes a storage whose values are needed; then the storages that it reads are needed
too. An op that overwrites a whole storage makes earlier writes to it dead. Most writes of an eager
constructor are dead: a layer initialises its weights, and the model initialises them again. Dead
writes are not run; the generator only skips their draws. Ops that share storages form a ``Step``,
and steps are independent of each other.
"""

from __future__ import annotations

import heapq
import math
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from lateinit._program.ops import TensorRef
from lateinit._program.program import Program
from lateinit._text import as_html, folded


class Step(NamedTuple):
    """Ops that must run in this order, and the target storages that they compute."""

    ops: tuple[int, ...]
    gives: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Plan:
    """The steps that compute some tensors, in order.

    Attributes:
        program: the program.
        steps: the steps.
        names: the tensors, for printing.
        whole: for printing, returns the steps that compute full tensors of which only shards are
            kept, each with the bytes of its full tensors.
        notes: for printing, the requests that apply to each tensor, such as a dtype.
    """

    program: Program
    steps: tuple[Step, ...]
    names: tuple[tuple[str, TensorRef], ...] = ()
    whole: Callable[[Plan], dict[Step, int]] | None = None
    notes: tuple[str, ...] = ()

    @property
    def nbytes(self) -> int:
        """The total size of the target storages in bytes."""
        storages = self.program.storages
        return sum(storages[number].nbytes for step in self.steps for number in step.gives)

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain data: the ops of each step in words, and what it computes."""
        names = self._names()
        steps = [
            {
                "ops": [str(self.program.ops[number]) for number in step.ops],
                "gives": [name for g in step.gives for name in names.get(g, [f"%{g}"])],
            }
            for step in self.steps
        ]
        return {"steps": steps, "recorded_ops": len(self.program.ops), "bytes": self.nbytes}

    def __repr__(self) -> str:
        return "\n".join(folded(str(self).splitlines()))

    def _repr_html_(self) -> str:
        return as_html(repr(self))

    def _names(self) -> dict[int, list[str]]:
        """The names of the tensors on each storage."""
        names: dict[int, list[str]] = {}
        for name, ref in self.names:
            names.setdefault(ref.storage, []).append(name)
        return names

    def __str__(self) -> str:
        names = self._names()
        needed = sum(len(step.ops) for step in self.steps)
        recorded = f"{needed} of {len(self.program.ops)} recorded ops"
        steps = f"{len(self.steps)} step{'s' * (len(self.steps) != 1)}"
        lines = [f"{steps}, {recorded}, {self.nbytes:,} bytes"]
        whole = {} if self.whole is None else self.whole(self)
        if whole:
            lines.append(self._cost_of(whole))
        for step in self.steps:
            cost = f" (a shard of {whole[step]:,} bytes, computed whole)" if step in whole else ""
            lines += [f"  {number:>5}  {self.program.ops[number]}" for number in step.ops]
            lines += [f"         -> {', '.join(names.get(g, [f'%{g}']))}{cost}" for g in step.gives]
        return "\n".join([*lines, *self.notes])

    def _cost_of(self, whole: dict[Step, int]) -> str:
        """A line on the steps that compute full tensors: their bytes, and the bytes kept."""
        ops, storages = self.program.ops, self.program.storages
        drawn = sum(
            ref.numel
            for step in whole
            for number in step.ops
            if ops[number].draw is not None
            for ref in ops[number].written()
        )
        kept = sum(storages[number].nbytes for step in whole for number in step.gives)
        total, most = sum(whole.values()), max(whole.values())
        return (
            f"{len(whole)} step{'s' * (len(whole) != 1)} for shards computed whole: {total:,} "
            f"bytes, {most:,} at once, and {drawn:,} elements drawn, of which {kept:,} bytes are "
            "kept"
        )


def plan_storages(program: Program, wanted: Iterable[int], before: int | None = None) -> list[Step]:
    """The steps that compute storages as they are before op ``before`` (default: at the end).

    Args:
        program: the program.
        wanted: the numbers of the target storages.
        before: the number of an op.
    """
    targets = dict.fromkeys(wanted)
    fills = _fills(program, targets, before)
    rest = [storage for storage in targets if storage not in fills]
    if rest:
        # A fill is a step of its own, unless other needed ops read or write its storage.
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
    """The last write of each storage that is a fill from numbers: storage to op number.

    Nearly all parameters end this way. For these the plan is one op, found without the walk.
    """
    end = len(program.ops) if before is None else before
    fills: dict[int, int] = {}
    for storage in wanted:
        number = _below(program.writers(storage), end)
        if number is not None:
            filled = program.ops[number].fills()
            if filled is not None and program.covers(filled):
                fills[storage] = number
    return fills


def is_random(program: Program, storages: Iterable[int]) -> bool:
    """Whether the values of any of some storages depend on a draw."""
    return any(program.ops[n].draw is not None for n in needed_ops(program, storages))


def needed_ops(program: Program, wanted: Iterable[int], before: int | None = None) -> set[int]:
    """The numbers of the ops that the values of some storages depend on.

    Args:
        program: the program.
        wanted: the numbers of the storages.
        before: take the values that the storages have before this op, by default at the end.
    """
    # Visits writes in descending order, over all live storages together. So every later op that
    # could need the result of an op, or make it dead, is visited before that op.
    end = len(program.ops) if before is None else before
    heap: list[tuple[int, int]] = []  # (minus the number of the last write, storage)
    live: dict[int, bool] = {}
    needed: set[int] = set()

    def want(storage: int, bound: int) -> None:
        """Queue the last write of a storage before op ``bound``."""
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
        # A later op has overwritten the storage: this write is dead.
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
        # The op wrote only part of the storage, or reads it: earlier writes matter too.
        if live.get(storage):
            want(storage, number)
    return needed


def _ended(program: Program, number: int, read: set[int]) -> Iterator[int]:
    """The storages that an op overwrites wholly, without reading them: earlier writes are dead."""
    for ref in program.ops[number].written():
        if ref.storage not in read and program.covers(ref):
            yield ref.storage


def _below(ascending: list[int], bound: int) -> int | None:
    place = bisect_left(ascending, bound)
    return ascending[place - 1] if place else None


def _steps(program: Program, needed: list[int], targets: dict[int, None]) -> list[Step]:
    """Group needed ops that touch a common storage (union-find over storages).

    Targets that no op writes form steps without ops: their memory is only allocated.
    """
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
