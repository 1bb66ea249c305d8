"""Histograms of excerpts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lateinit._report.excerpts import Excerpt

_BINS = 41  # odd, so that values around zero get a bin of their own


@dataclass(frozen=True, slots=True)
class Histogram:
    """A histogram of values.

    Attributes:
        low: the least finite value.
        high: the greatest finite value.
        counts: the number of values in each of the bins of equal width between these two.
        mean: the mean of the distribution, or else of the values; None without finite values.
        std: the standard deviation of the same.
        exact: whether mean and std are of the distribution or of all values, not of a sample.
        values: the number of values.
        not_finite: the number of infinite values and NaNs among them.
        why: the reason why there are no values.
    """

    low: float = 0.0
    high: float = 0.0
    counts: tuple[int, ...] = ()
    mean: float | None = None
    std: float | None = None
    exact: bool = False
    values: int = 0
    not_finite: int = 0
    why: str = ""


def histogram_of(excerpts: Sequence[Excerpt], *, of_all: bool = True) -> Histogram:
    """The histogram of tensors of one kind; ``of_all`` if these are all tensors of the kind."""
    values = torch.cat([excerpt.values for excerpt in excerpts])
    if not values.numel():
        return Histogram(why=next((e.why for e in excerpts if e.why), "it has no elements"))
    finite = values[values.isfinite()]
    found = len(values), len(values) - len(finite)
    if not len(finite):
        return Histogram(why="no value is finite", values=found[0], not_finite=found[1])
    laws = {(excerpt.mean, excerpt.std) for excerpt in excerpts}
    mean, std = laws.pop() if len(laws) == 1 else (None, None)
    known = mean is not None and std is not None
    if not known:
        mean, std = float(finite.mean()), float(finite.std(correction=0))
    counts = tuple(_counts(finite))
    low, high = float(finite.min()), float(finite.max())
    whole = of_all and all(excerpt.whole for excerpt in excerpts)
    return Histogram(low, high, counts, mean, std, known or whole, *found)


def _counts(finite: Tensor) -> list[int]:
    # Computed on halved values, since the distance of the least and greatest float overflows.
    halves = finite / 2
    low, high = float(halves.min()), float(halves.max())
    if low == high:
        return [len(finite)]
    places = ((halves - low) / (high - low) * _BINS).long().clamp_(0, _BINS - 1)
    return torch.bincount(places, minlength=_BINS).tolist()
