"""Draw ``nn.init.trunc_normal_`` part by part, with the bits of the whole call.

From torch 2.13 on, torch/nn/init.py: _no_grad_trunc_normal_ fills a tensor with normals. While any
element lies outside the bounds, it draws a whole tensor again and replaces the outliers: a round.
The rounds of an element do not depend on other elements, and the place of each round in the random
stream is known. So a part of the tensor can be filled alone, by moving a generator from round to
round. Later rounds concern few elements; most of their draws are skipped.

The number of rounds is often needed before the values, to find the next generator state. Finding it
draws the few elements that need many rounds. Their values are kept (``Late``), so that filling the
tensor later takes the first rounds only.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lateinit import _native
from lateinit._rng import consumption, fills, mt19937
from lateinit._rng.alignment import UNIT, cut
from lateinit._torch import NORMAL, TRUNCATED, by_name
from lateinit._workers import Workers

_PART = 1 << 15  # elements drawn at a time: in cache, and too few for torch to use other threads
# For native kernels: larger, so that the calls from Python take little of the time.
_NATIVE_PART = 1 << 17
_FEW = 8  # up to so many outliers in a part, only the group of 16 around each is drawn again
_APART = 1 << 21  # from so many elements on, several threads count rounds
_AT_ONCE = 1 << 23  # elements per survey: bounds the memory for their outliers
_MOST_ROUNDS = 64  # rounds of a trial: bounds whose rejection takes more are not drawn in parts
_LATE = 1 / 256  # the share of elements that may need late rounds: bounds the memory for them
FARTHEST = 8.6
"""Standard deviations within which every normal draw of ``BOUNDED_DTYPES`` lies.

A Box-Muller normal of a 53-bit uniform stays within sqrt(-2 ln 2**-53) = 8.58 standard deviations,
and a normal of a 24-bit uniform within 5.77.
"""
BOUNDED_DTYPES = (torch.float32, torch.float64)
_MOST_KEPT = 1 << 20  # late elements kept for all draws of a program: 12 MiB in float32


class Normal(NamedTuple):
    """The numbers of ``trunc_normal_``, in the order of its arguments."""

    mean: float
    std: float
    low: float
    high: float


def words_a_round(dtype: torch.dtype, numel: int) -> int:
    """The number of words that one round takes for ``numel`` elements: 0, or at least 16."""
    return consumption.words_drawn(NORMAL, dtype, numel)


class Late(NamedTuple):
    """The final values of the elements that the first ``rounds`` rounds leave outside the bounds.

    ``places`` are their indices in the flat tensor, ascending.
    """

    rounds: int
    places: Tensor
    values: Tensor

    def within(self, start: int, end: int) -> Late:
        """The late elements of a flat range, with places relative to its start."""
        first, last = np.searchsorted(self.places.numpy(), (start, end)).tolist()
        return Late(self.rounds, self.places[first:last] - start, self.values[first:last])


def draw(
    target: Tensor,
    normal: Normal,
    generator: torch.Generator,
    period: int,
    late: Late | None = None,
) -> None:
    """Draw a part of a tensor: 16 or more contiguous elements, from a multiple of 16 on.

    Args:
        target: the part.
        normal: the numbers of ``trunc_normal_``.
        generator: a generator in the state before the first round's draw of this part; it ends in
            the state after that draw.
        period: the number of words that one round of the whole tensor takes.
        late: the late elements of this part, if known.
    """
    part = _Part(target.dtype, len(target), normal, period)
    most = math.inf if late is None else late.rounds
    part.first(generator, target, look=most > 1)
    while part.outliers and part.rounds < most:
        for start, places, drawn in part.again(look=part.rounds + 1 < most):
            target[start:][places] = drawn
    if late is not None:
        target[late.places] = late.values


class _Part:
    """A part of a tensor, drawn round by round."""

    def __init__(self, dtype: torch.dtype, numel: int, normal: Normal, period: int) -> None:
        self.rounds = 0
        self.outliers: _Outliers = []  # start and end of a range, places in it
        self._dtype, self._numel, self._normal, self._period = dtype, numel, normal, period
        # torch too rounds the bounds to the dtype before it compares.
        bounds = (torch.tensor(bound, dtype=dtype, device="cpu").item() for bound in normal[2:])
        self._low, self._high = bounds
        self._unit = words_a_round(dtype, UNIT)
        exact = fills.is_native(NORMAL, dtype) and _native.in_range(NORMAL, dtype, *normal[:2])
        self._native = exact and numel >= UNIT
        self._length = _NATIVE_PART if self._native else _PART
        self._scratch = torch.empty(self._length + UNIT, dtype=dtype, device="cpu")

    def first(self, generator: torch.Generator, target: Tensor | None, look: bool) -> None:
        """Draw the first round.

        Args:
            generator: a generator in the state before the draw of this part; it ends in the state
                after it.
            target: receives the values; None discards them.
            look: whether to find the outliers.
        """
        self._later = mt19937.generator_at(mt19937.state_of(generator))
        self._at = 0
        look = look and not surely_within(self._dtype, *self._normal)
        for start, end in cut(self._numel, self._length):
            part = self._scratch[: end - start] if target is None else target[start:end]
            _draw(part, self._normal, generator)
            if look:
                self._note(start, end, part, None)
        self.rounds = 1

    def again(self, look: bool = True) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Draw a round for the outliers: the start of a range, places in it, their new values."""
        outliers, self.outliers = self.outliers, []
        if outliers and self._native:
            outliers = [(0, self._numel, _places(outliers))]
        for start, end, places in outliers:
            drawn = self._drawn(start, end, places)
            yield start, places, drawn
            if look:
                self._note(start, end, drawn, places)
        self.rounds += 1

    def places(self) -> Tensor:
        """The places of all outliers in the part, in order."""
        return _places(self.outliers)

    def _note(self, start: int, end: int, drawn: Tensor, places: Tensor | None) -> None:
        found = _outside(drawn, self._low, self._high)
        if len(found):
            self.outliers.append((start, end, found if places is None else places[found]))

    def _drawn(self, start: int, end: int, places: Tensor) -> Tensor:
        """New values for some places of a range."""
        if not self._native:
            self._draw(start, end, places)
            return self._scratch[places]
        self._reach(start)
        values = torch.empty(len(places), dtype=self._dtype, device="cpu")
        _native.normal_at(places, values, end - start, *self._normal[:2], self._later)
        self._at += words_a_round(self._dtype, end - start)
        return values

    def _draw(self, start: int, end: int, places: Tensor) -> None:
        """Draw a range again; for few places only the groups of 16 that contain them."""
        if len(places) > _FEW:
            self._normals(start, start, end)
            return
        # The last group includes the remainder: normal_ draws the last 16 elements again for it.
        last = (self._numel - UNIT) // UNIT * UNIT
        for unit in dict.fromkeys(min(start + p // UNIT * UNIT, last) for p in places.tolist()):
            self._normals(start, unit, unit + UNIT if unit < last else self._numel)

    def _normals(self, start: int, first: int, end: int) -> None:
        self._reach(first)
        part = self._scratch[first - start : end - start]
        _draw(part, self._normal, self._later)
        self._at += words_a_round(self._dtype, end - first)

    def _reach(self, first: int) -> None:
        """Move the generator on to an element of this round."""
        begin = self.rounds * self._period + first // UNIT * self._unit
        mt19937.move(self._later, begin - self._at)
        self._at = begin


_Outliers = list[tuple[int, int, Tensor]]


def _places(outliers: _Outliers) -> Tensor:
    return torch.cat([start + places for start, _, places in outliers])


def _draw(part: Tensor, normal: Normal, generator: torch.Generator) -> None:
    if not fills.fill(NORMAL, part, normal[:2], generator):
        part.normal_(*normal[:2], generator=generator)


def _outside(values: Tensor, low: float, high: float) -> Tensor:
    """The places of the values outside the bounds."""
    # numpy has no bfloat16.
    array = (values if values.dtype.itemsize > 2 else values.float()).numpy()
    return torch.from_numpy(np.flatnonzero((array < low) | (array > high)))


def surely_within(dtype: torch.dtype, mean: float, std: float, low: float, high: float) -> bool:
    """Whether every normal draw of this dtype lies within the bounds."""
    reach = FARTHEST * std
    return dtype in BOUNDED_DTYPES and low < mean - reach and mean + reach < high


def draws_once(dtype: torch.dtype, normal: Normal) -> bool:
    """Whether a ``trunc_normal_`` with these numbers always takes one round."""
    return surely_within(dtype, *normal) and is_exact_in_parts(dtype, normal)


def after(
    state: bytes,
    dtype: torch.dtype,
    numel: int,
    normal: Normal,
    threads: int | None = None,
    most: int = 0,
) -> tuple[bytes, Late | None]:
    """The generator state after a whole ``trunc_normal_``, and its late elements.

    Args:
        state: the state before it.
        dtype: the dtype of the tensor.
        numel: its number of elements.
        normal: the numbers of ``trunc_normal_``.
        threads: how many threads to use for large tensors, by default as many as torch uses.
        most: return None in place of more late elements than these.
    """
    count = (threads or torch.get_num_threads()) if numel >= _APART else 1
    period = words_a_round(dtype, numel)

    def surveyed(part: tuple[int, int]) -> tuple[int, Late]:
        start, end = part
        generator = mt19937.generator_at(mt19937.jump(state, words_a_round(dtype, start)))
        with torch.no_grad():
            rounds, late = _survey(dtype, end - start, normal, generator, period)
        return rounds, late._replace(places=late.places + start)

    parts = cut(numel, min(-(-numel // count), _AT_ONCE))
    if count == 1:
        return _together(map(surveyed, parts), state, period, most)
    with Workers(count) as pool:
        return _together(pool.map(surveyed, parts), state, period, most)


def _together(
    surveys: Iterable[tuple[int, Late]], state: bytes, period: int, most: int
) -> tuple[bytes, Late | None]:
    rounds, total, lates = 0, 0, []
    for needed, late in surveys:
        rounds, total = max(rounds, needed), total + len(late.places)
        lates.append(late)
        # Too many late elements to keep: release those of earlier parts, and only count rounds.
        if total > most:
            lates.clear()
    end = mt19937.jump(state, rounds * period)
    if total > most:
        return end, None
    places, values = (torch.cat(list(those)) for those in list(zip(*lates, strict=True))[1:])
    return end, Late(lates[0].rounds, places, values)


def _survey(
    dtype: torch.dtype,
    numel: int,
    normal: Normal,
    generator: torch.Generator,
    period: int,
) -> tuple[int, Late]:
    """The number of rounds that a part takes, and its late elements."""
    part, early = _Part(dtype, numel, normal, period), _early(normal)
    part.first(generator, None, look=True)
    late = Late(early, torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=dtype))
    while part.outliers:
        # The outliers that the early rounds leave are the late elements; from here on each of their
        # new values is noted, and the last one is final.
        if part.rounds == early:
            places = part.places()
            late = Late(early, places, torch.empty(len(places), dtype=dtype))
        for start, places, drawn in part.again():
            if len(late.places):
                at = np.searchsorted(late.places.numpy(), places.numpy() + start)
                late.values[torch.from_numpy(at)] = drawn
    return part.rounds, late


@functools.lru_cache(maxsize=1024)
def _early(normal: Normal) -> int:
    """The number of rounds after which at most a share of ``_LATE`` is expected out of bounds."""
    mean, std, low, high = normal
    if not std > 0:
        return 1
    below, above = ((bound - mean) / std / math.sqrt(2) for bound in (low, high))
    outside = (math.erfc(-below) + math.erfc(above)) / 2
    rounds, share = 1, outside
    while share > _LATE and rounds < _MOST_ROUNDS:
        rounds, share = rounds + 1, share * outside
    return rounds


class Kept:
    """A cache of the late elements of the truncated normals of a program.

    The key has everything that a draw depends on, so an entry stays valid after any other draw.
    """

    def __init__(self) -> None:
        self._found: dict[tuple[object, ...], Late] = {}

    def after(self, state: bytes, dtype: torch.dtype, numel: int, normal: Normal) -> bytes:
        """The generator state after a whole ``trunc_normal_``; keeps its late elements."""
        left = _MOST_KEPT - sum(len(late.places) for late in list(self._found.values()))
        end, late = after(state, dtype, numel, normal, most=left)
        if late is not None:
            self._found[_key(state, dtype, numel, normal)] = late
        return end

    def late(self, state: bytes, dtype: torch.dtype, numel: int, normal: Normal) -> Late | None:
        """The late elements of a whole ``trunc_normal_``, if they are kept."""
        return self._found.get(_key(state, dtype, numel, normal)) if self._found else None


def _key(state: bytes, dtype: torch.dtype, numel: int, normal: Normal) -> tuple[object, ...]:
    return hashlib.sha256(state).digest(), dtype, numel, normal


@functools.lru_cache(maxsize=1024)
def is_exact_in_parts(dtype: torch.dtype, normal: Normal) -> bool:
    """Whether parts have the bits of the whole call with the installed torch and these numbers.

    The second trial's bounds reject 18 % of the draws, so that several rounds are compared.
    """
    try:
        return _agrees(dtype, normal) and _agrees(dtype, Normal(0.5, 1.0, -1.0, 1.7))
    except (RuntimeError, NotImplementedError, AssertionError, ArithmeticError):
        return False


def _agrees(dtype: torch.dtype, normal: Normal) -> bool:
    numel, middle = 40 * UNIT + 5, 24 * UNIT
    whole = torch.zeros(numel, dtype=dtype, device="cpu")
    state = mt19937.state_of(torch.Generator().manual_seed(1))
    generator = mt19937.generator_at(state)
    by_name(TRUNCATED).func(whole, *normal, generator=generator)
    period, ended = words_a_round(dtype, numel), mt19937.state_of(generator)
    # If the bounds have probability 0.3 or less, torch draws uniforms and accepts by density. The
    # state after that is not the state after any number of rounds of normals.
    if all(mt19937.jump(state, n * period) != ended for n in range(1, _MOST_ROUNDS + 1)):
        return False
    end, late = after(state, dtype, numel, normal, threads=1, most=numel)
    for known in (None, late):
        parts = torch.zeros(numel, dtype=dtype, device="cpu")
        for start, stop in ((middle, numel), (0, middle)):
            place = mt19937.generator_at(mt19937.jump(state, words_a_round(dtype, start)))
            part_late = known and known.within(start, stop)
            draw(parts[start:stop], normal, place, period, part_late)
        if not torch.equal(whole, parts):
            return False
    return ended == end
