"""Have something in force for as long as programs live, and in no program's absence."""

from __future__ import annotations

import weakref
from collections.abc import Callable

from lateinit._program import Program


class Watched:
    """The programs for whose tensors torch has to tell us of something.

    Args:
        begin: has torch tell us. Called for each program, and may be called again; returns whether
            there is anything to hear yet, and is called later for the program if not.
        end: the contrary, when the last program has died.
    """

    def __init__(self, begin: Callable[[], bool], end: Callable[[], object]) -> None:
        self._begin, self._end = begin, end
        self._programs: set[int] = set()

    def add(self, program: Program) -> None:
        """Watch a program until it dies."""
        key = id(program)
        if key not in self._programs and self._begin():
            self._programs.add(key)
            self._begin()  # another thread may have ended it before it saw this program
            weakref.finalize(program, self._remove, key).atexit = False

    def _remove(self, key: int) -> None:
        # The garbage collector calls it in the middle of anything, so it must wait for no lock:
        # whoever has that may wait for one that this thread has.
        self._programs.discard(key)
        if not self._programs:
            self._end()
            if self._programs:
                self._begin()
