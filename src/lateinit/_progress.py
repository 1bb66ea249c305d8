"""A progress bar for long work, on stderr."""

from __future__ import annotations

from rich import progress
from rich.console import Console


class Progress:
    """Counts bytes; draws a bar if ``shown``."""

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
        """Count work done."""
        if self._bar is not None:
            self._bar.advance(self._bar.task_ids[0], nbytes)

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.stop()
