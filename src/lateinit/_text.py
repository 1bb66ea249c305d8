"""Long texts at a prompt and in a notebook."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")
# Lines that a prompt shows of a table or a plan: about a screen.
_MOST = 60


def folded(lines: Sequence[T]) -> list[T | str]:
    """The lines; of very many, the first, the number of lines left out, and the last."""
    if len(lines) <= _MOST:
        return [*lines]
    head = _MOST * 2 // 3
    tail = _MOST - head - 1
    left = len(lines) - head - tail
    return [*lines[:head], f"... {left:,} more lines: print() shows all ...", *lines[-tail:]]


def as_html(text: str) -> str:
    """A text in a fixed-width font, for a notebook."""
    return f"<pre>{html.escape(text)}</pre>"
