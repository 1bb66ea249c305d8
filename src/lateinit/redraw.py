"""Drawing normals within bounds as ``nn.init.trunc_normal_`` does, part by part.

It fills a tensor with normals and, while some lie outside the bounds, draws as many anew as the
whole tensor has elements, of which only those that take the place of an outlier are kept: a round.
Which rounds an element takes does not depend on the others, and where a round stands in the random
stream is known. So a part of the tensor can be filled alone, by moving a generator from round to
round; and in the later rounds, which few elements need, most is passed over instead of drawn.
"""

from __future__ import annotations

import functools
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lateinit import mt19937, rng
from lateinit.bounds import surely_within
from lateinit.cuts import UNIT, cut
from lateinit.ops import TRUNCATED, by_name

_PART = 1 << 15  # elements drawn at a time: in cache, and too few for torch to use other threads
_APART = 1 << 21  # elements from which on several threads look for the number of rounds
_MOST_ROUNDS = 64  # in a trial; few bounds take so many, those far out would take for ever


class Normal(NamedTuple):
    """The numbers of ``trunc_normal_``, in the order in which it takes them."""

    mean: float
    std: float
    low: float
    high: float


def words(dtype: torch.dtype, numel: int) -> int:
    """How many words it takes to draw so many elements once: none, or 16 or more."""
    return rng.words("aten::normal_", dtype, numel)


def draw(
    target: Tensor, numel: int, normal: Normal, generator: torch.Generator, period: int
) -> int:
    """Draw a part of a tensor: ``numel`` contiguous elements, 16 or more, from a multiple of 16 on.

    Args:
        target: what is filled; if it is shorter, values are not kept, only rounds counted.
        numel: how many elements the part has.
        normal: the numbers.
        generator: stands where the first round draws this part, and is left where that ends.
        period: how many words one round of the whole tensor takes.

    Returns:
        How many rounds it takes until none of these elements lies outside the bounds.
    """
    dtype, kept = target.dtype, len(target) == numel
    low, high = (torch.tensor(bound, dtype=dtype, device="cpu").item() for bound in normal[2:])
    scratch = torch.empty(_PART + UNIT, dtype=dtype, device="cpu")
    certain, outliers = surely_within(dtype, *normal), []
    for start, end in cut(numel, _PART):
        part = target[start:end] if kept else scratch[: end - start]
        if certain:
            part.normal_(*normal[:2], generator=generator)
            continue
        places = _outside(part.normal_(*normal[:2], generator=generator), low, high)
        if len(places):
            outliers.append((start, end, places))
    later, at = mt19937.generator_at(mt19937.state_of(generator)), words(dtype, numel)
    rounds = 1
    while outliers:
        still = []
        for start, end, places in outliers:
            begin = rounds * period + words(dtype, start)
            mt19937.move(later, begin - at)
            drawn = scratch[: end - start].normal_(*normal[:2], generator=later)[places]
            at = begin + words(dtype, end - start)
            if kept:
                target[start:end][places] = drawn
            again = _outside(drawn, low, high)
            if len(again):
                still.append((start, end, places[again]))
        outliers = still
        rounds += 1
    return rounds


def _outside(values: Tensor, low: float, high: float) -> Tensor:
    """The places of the values that lie outside the bounds."""
    array = (values if values.dtype.itemsize > 2 else values.float()).numpy()
    return torch.from_numpy(np.flatnonzero((array < low) | (array > high)))


def draws_once(dtype: torch.dtype, normal: Normal) -> bool:
    """Whether a ``trunc_normal_`` with these numbers is one ``normal_``, whatever it draws."""
    return surely_within(dtype, *normal) and is_exact(dtype, normal)


def after(
    state: bytes, dtype: torch.dtype, numel: int, normal: Normal, threads: int | None = None
) -> bytes:
    """Where a generator stands after a whole ``trunc_normal_``, found by up to some threads."""
    count = (threads or torch.get_num_threads()) if numel >= _APART else 1
    period = words(dtype, numel)

    def rounds(part: tuple[int, int]) -> int:
        start, end = part
        generator = mt19937.generator_at(mt19937.jump(state, words(dtype, start)))
        nothing = torch.empty(0, dtype=dtype, device="cpu")
        with torch.no_grad():
            return draw(nothing, end - start, normal, generator, period)

    parts = cut(numel, -(-numel // count))
    if len(parts) == 1:
        most = rounds(parts[0])
    else:
        with ThreadPoolExecutor(len(parts)) as pool:
            most = max(pool.map(rounds, parts))
    return mt19937.jump(state, most * period)


@functools.lru_cache(maxsize=1024)
def is_exact(dtype: torch.dtype, normal: Normal) -> bool:
    """Whether parts are drawn as the torch that runs draws the whole, with these numbers."""
    try:
        return _agrees(dtype, normal) and _agrees(dtype, Normal(0.5, 1.0, -1.0, 1.7))
    except (RuntimeError, NotImplementedError, AssertionError, ArithmeticError):
        return False


def _agrees(dtype: torch.dtype, normal: Normal) -> bool:
    numel, middle = 40 * UNIT + 5, 24 * UNIT
    whole, parts = (torch.zeros(numel, dtype=dtype, device="cpu") for _ in range(2))
    state = mt19937.state_of(torch.Generator().manual_seed(1))
    generator = mt19937.generator_at(state)
    by_name(TRUNCATED).func(whole, *normal, generator=generator)
    period, ended = words(dtype, numel), mt19937.state_of(generator)
    # What lies mostly outside is drawn in another way, by rounds of normals never.
    if all(mt19937.jump(state, n * period) != ended for n in range(1, _MOST_ROUNDS + 1)):
        return False
    for start, end in ((middle, numel), (0, middle)):
        place = mt19937.generator_at(mt19937.jump(state, words(dtype, start)))
        draw(parts[start:end], end - start, normal, place, period)
    return torch.equal(whole, parts) and ended == after(state, dtype, numel, normal, threads=1)
