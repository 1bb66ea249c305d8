"""Keep hooks in torch in force while any program lives, and only then."""

from __future__ import annotations

import weakref
from collections.abc import Callable

from lateinit._program import Program


class Watched:
    """The programs for whose tensors certain calls of torch are intercepted.

    Args:
        begin: installs the hooks. Called for each program, and may be called again. It returns
            False if torch's module is not imported yet; then it is called later for the program.
        end: removes the hooks, when the last program has died.
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
        # The garbage collector calls this at any line, so it must not wait for a lock: the holder
        # of that lock may wait for a lock of this thread.
        self._programs.discard(key)
        if not self._programs:
            self._end()
            if self._programs:
                self._begin()
