"""Progress bars on stderr: for calls with ``progress=True``, and for commands that take long."""

from __future__ import annotations

import sys
import threading
from types import TracebackType
from typing import Any

from lateinit._terminal import Console, Text, progress

# Seconds after which a command shows its progress.
_PATIENCE = 2.0
_of_command: progress.Progress | None = None


class Progress:
    """Context manager that shows the progress of an operation, if ``shown`` or in a command.

    Args:
        what: the operation, in a word.
        total: the bytes that it handles; None if not known.
        shown: show the bar outside a command too.
    """

    def __init__(self, what: str, total: int | None, *, shown: bool = False) -> None:
        self._what = what
        self._total = total
        self._own = shown and _of_command is None
        self._bars = _new_bars() if self._own else _of_command
        self._task: progress.TaskID | None = None

    def __enter__(self) -> Progress:
        if self._bars is not None:
            if self._own:
                self._bars.start()
            self._task = self._bars.add_task(self._what, total=self._total)
        return self

    def advance(self, nbytes: int) -> None:
        """Advance the bar by a number of bytes."""
        if self._bars is not None and self._task is not None:
            self._bars.advance(self._task, nbytes)

    def __exit__(self, *error: object) -> None:
        if self._bars is None or self._task is None:
            return
        if self._own:
            self._bars.stop()
        else:
            self._bars.remove_task(self._task)


class Working:
    """Context manager around a command: shows the progress of its calls, if they take long.

    Nothing is shown unless stderr is a terminal. The bars are erased at the end.
    """

    def __init__(self) -> None:
        self._bars: progress.Progress | None = None
        self._start: threading.Timer | None = None

    def __enter__(self) -> Working:
        global _of_command  # noqa: PLW0603 - there is one terminal
        if sys.stderr.isatty():
            self._bars = _of_command = _new_bars(transient=True)
            self._start = threading.Timer(_PATIENCE, self._bars.start)
            self._start.daemon = True
            self._start.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        global _of_command  # noqa: PLW0603
        _of_command = None
        if self._start is not None and self._bars is not None:
            self._start.cancel()
            self._start.join()
            self._bars.stop()


class _Sized(progress.ProgressColumn):
    """A column of bytes, empty for an operation of unknown length."""

    def __init__(self, column: progress.ProgressColumn) -> None:
        self._column = column
        super().__init__()

    def render(self, task: progress.Task) -> Any:
        return Text() if task.total is None else self._column(task)


def _new_bars(*, transient: bool = False) -> progress.Progress:
    return progress.Progress(
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        _Sized(progress.DownloadColumn()),
        _Sized(progress.TransferSpeedColumn()),
        _Sized(progress.TimeRemainingColumn()),
        console=Console(stderr=True),
        transient=transient,
        # Text printed to a file or a pipe must stay there: rich would send it to stderr.
        redirect_stdout=sys.stdout.isatty(),
    )
