"""A progress bar for long operations, on stderr."""

from __future__ import annotations

from rich import progress
from rich.console import Console


class Progress:
    """Context manager that shows a bar of ``total`` bytes, or nothing if not ``shown``."""

    def __init__(self, what: str, total: int, *, shown: bool) -> None:
        self._what = what
        self._total = total
        self._shown = shown
        self._bar: progress.Progress | None = None

    def __enter__(self) -> Progress:
        if self._shown:
            self._bar = progress.Progress(
                progress.TextColumn("{task.description}"),
                progress.BarColumn(),
                progress.DownloadColumn(),
                progress.TransferSpeedColumn(),
                progress.TimeRemainingColumn(),
                console=Console(stderr=True),
            )
            self._bar.start()
            self._bar.add_task(self._what, total=self._total)
        return self

    def advance(self, nbytes: int) -> None:
        """Advance the bar by a number of bytes."""
        if self._bar is not None:
            self._bar.advance(self._bar.task_ids[0], nbytes)

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.stop()
