"""Drop the ops, constants and storages of a program that no living tensor needs.

Otherwise a single table in a cache would keep alive the whole recording of a model that is gone,
with all the real data that entered it.
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

    Included are the draws that must be made to find the generator's state after them, and the ops
    that these draws depend on.
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
    """The cost of each draw of each stream, None if the draw must be made; holes stay numbers."""
    known: dict[int, Any] = {}
    for stream in program.streams:
        for number in stream.ops:
            if number not in known:
                on_cpu = stream.device.type == "cpu"
                found = cost(program.ops[number]) if number >= 0 and on_cpu else None
                known[number] = number if number < 0 else found
    return [[known[number] for number in stream.ops] for stream in program.streams]


def drop_unneeded(program: Program) -> None:
    """Drop the ops that no living tensor needs. The program must not be recorded or realised."""
    shown = [n for n, storage in enumerate(program.storages) if not storage.gone]
    needed = needed_for(program, {*shown, *map(program.origin, shown)})
    for read in program.reads:  # under another seed these values are computed and compared
        needed |= needed_ops(program, [read.ref.storage], read.before)
    program.keep(needed, cost)
    forget_executions(program)
    program.rest()


def drop_later(program: Program) -> None:
    """Have ``drop_unneeded`` run at the next garbage collection.

    The tensors of a model die one after the other. By the next collection all of them are gone, and
    usually the program with them.
    """
    program.drop_at = NEVER
    _Garbage(program)


class _Garbage:
    """Refers to itself, so that only the garbage collector calls ``__del__``."""

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
        except BaseException as error:  # Python prints it and goes on, so give the turn back here
            before.restore(error.__traceback__)
            raise

    def _drop(self, program: Program) -> None:
        # The collector can run at any line, also while this thread records or realises.
        if is_turn_taken() or not one_thread.acquire(blocking=False):
            _Garbage(program)
            return
        if program.recording:
            _Garbage(program)
        else:
            drop_unneeded(program)
        one_thread.release()
