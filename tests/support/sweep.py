"""How much of a long sweep a run tries: all of it with ``LATEINIT_SWEEP=all`` (``make sweep``).

``make test`` tries a part, the same in every run. Tests that try the same things in several ways
take other parts of them, so that together they leave out little.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Sequence

T = TypeVar("T")

EVERYTHING = os.environ.get("LATEINIT_SWEEP") == "all"


def part_of(items: Sequence[T], which: int, parts: int) -> list[T]:
    """Every item whose number is ``which`` modulo ``parts``; all of them in a sweep."""
    return list(items) if EVERYTHING else list(items)[which % parts :: parts]
