"""The table of a model, and the memory for training it on one device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lateinit._distributed.mesh_cost import Share
from lateinit._report.summary import Summary
from lateinit._terminal import Console, ConsoleOptions, RenderResult, Text


@dataclass(frozen=True, slots=True)
class Trained:
    """The table and the training memory, as text and as data."""

    table: Summary
    share: Share

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain data."""
        return {**self.table.to_dict(), "training": self.share.to_dict()["training"]}

    def __str__(self) -> str:
        return f"{self.table}\n{self.share.training_line}"

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield self.table
        yield Text(self.share.training_line)
