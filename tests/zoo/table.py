"""The results as a page."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import torch

from tests.zoo.check import EQUAL, UNBUILT

if TYPE_CHECKING:
    from collections.abc import Iterable

    from tests.zoo.check import Outcome


def totals(results: list[Outcome]) -> str:
    """One line: how many of what."""
    return str(Counter(r.status for r in results))


def page(results: list[Outcome]) -> str:
    return totals(results)
