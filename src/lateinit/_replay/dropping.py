"""Drop from a program what no living tensor needs.

One table in a cache would otherwise keep the recording of a model that is gone, and all real data
that was brought into it.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

from lateinit._program import NEVER, Program, needed_ops
from lateinit._replay.execution import forget_executions, one_thread
from lateinit._replay.streams import cost
from lateinit._torch import is_turn_taken, noted


def needed_for(program: Program, storages: Iterable[int]) -> set[int]:
    """The numbers of the ops that some storages depend on, under any seed.

    Also those of the draws that must be made to know the generator's state after them, and of what
    these read.
    """
    needed = needed_ops(program, storages)
    for stream, costs in zip(program.streams, costs_of(program), strict=True):
        for number, known in zip(stream.ops, costs, strict=True):
            if known is None and number not in needed:
                needed.add(number)
                read = {ref.storage for ref in program.ops[number].read()}
                needed |= needed_ops(program, read, number)
    return needed


def costs_of(program: Program) -> list[list[Any]]:
    """What each draw of each stream costs: None if only making it can tell. Holes as they are."""
    known: dict[int, Any] = {}
    for stream in program.streams:
        for number in stream.ops:
            if number not in known:
                on_cpu = stream.device.type == "cpu"
                found = cost(program.ops[number]) if number >= 0 and on_cpu else None
                known[number] = number if number < 0 else found
    return [[known[number] for number in stream.ops] for stream in program.streams]


def drop_unneeded(program: Program) -> None:
    """Drop from a program what no living tensor needs. Nothing must record or realise it."""
    shown = [n for n, storage in enumerate(program.storages) if not storage.gone]
    needed = needed_for(program, {*shown, *map(program.origin, shown)})
    for read in program.reads:  # another seed is compared with what they gave
        needed |= needed_ops(program, [read.ref.storage], read.before)
    program.keep(needed, cost)
    forget_executions(program)
    program.rest()


def drop_later(program: Program) -> None:
    """Drop what no living tensor needs at the next garbage collection.

    By then a model whose tensors die one after the other is gone, mostly with its program.
    """
    program.drop_at = NEVER
    _Garbage(program)


class _Garbage:
    """Refers to itself, so that only the garbage collector ends it."""

    def __init__(self, program: Program) -> None:
        self._program = weakref.ref(program)
        self._self = self

    def __del__(self) -> None:
        program = self._program()
        if program is None or program.merged_into is not None:
            return
        before = noted()
        try:
            self._drop(program)
        except BaseException as error:  # Python says it and goes on: the turn must not stay taken
            before.restore(error.__traceback__)
            raise

    def _drop(self, program: Program) -> None:
        # The collector runs anywhere, in the middle of what this thread does too.
        if is_turn_taken() or not one_thread.acquire(blocking=False):
            _Garbage(program)
            return
        if program.recording:
            _Garbage(program)
        else:
            drop_unneeded(program)
        one_thread.release()
