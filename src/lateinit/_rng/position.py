"""``Seeker``: the state of a CPU generator before each of a sequence of draws."""

import threading
from bisect import bisect_right
from collections import deque
from collections.abc import Callable
from operator import itemgetter
from typing import NamedTuple

import torch

from lateinit._rng.mt19937 import generator_at, has_normal, jump, state_of, without_normal

Run = Callable[[int, torch.Generator], None]
_PAIR = 4  # words of a pair of normals: Box-Muller on two 53-bit uniforms of two words each
_position = itemgetter(0)


class Cost(NamedTuple):
    """The cost of a draw: a number of 32-bit words, and a number of normals drawn in pairs.

    A pair takes four words. Its second sample stays cached in the generator until any op asks for
    another sample (aten/src/ATen/core/DistributionsHelper.h).
    """

    words: int
    normals: int = 0

    def after(self, cached: bool) -> tuple[int, bool]:
        """The words drawn and whether a sample is cached afterwards, given whether one is now."""
        if not self.normals:
            return self.words, cached
        new = self.normals - cached
        return self.words + _PAIR * ((new + 1) // 2), new % 2 == 1


class _Place(NamedTuple):
    """A position: the words drawn up to it, and the position since which a normal is cached.

    Unknown draws count as zero words, so differences are valid only between two barriers.
    """

    words: int
    source: int | None


class Seeker:
    """The state of a CPU generator before each of a sequence of draws.

    A draw whose cost is known is jumped over. Any other draw is made, once, when a later position
    is requested, and the state after it is kept as a *barrier*. Threads may share a seeker: `state`
    holds a lock.

    Args:
        start: the state before the first draw, `torch.Generator.get_state()` as bytes.

    Example:
        >>> generator = torch.Generator().manual_seed(0)
        >>> seeker = Seeker(state_of(generator))
        >>> seeker.append(Cost(words=10**12))
        >>> end = seeker.state(1, run=lambda index, generator: None)  # nothing is drawn
        >>> len(seeker), len(end)
        (1, 5056)
    """

    def __init__(self, start: bytes) -> None:
        self._costs: list[Cost | None] = []
        # A barrier is appended before its place: an interrupt in between costs a repeated draw, and
        # never leaves a place without its state.
        self._places = [_Place(0, 0 if has_normal(start) else None)]
        self._barriers = [(0, start)]  # positions, and the states there
        self._recent: deque[tuple[int, bytes]] = deque(maxlen=16)
        self._running: int | None = None
        self._lock = threading.RLock()

    def append(self, cost: Cost | None) -> None:
        """Add a draw. The cost is None if the draw must be made to find it."""
        self._costs.append(cost)

    def __len__(self) -> int:
        return len(self._costs)

    def state(self, index: int, run: Run) -> bytes:
        """The state before draw number `index`; for `len(self)`, the state after all draws.

        Takes one jump from the nearest earlier position among the start, the barriers and the last
        16 requested positions, and a second jump if a cached normal must be made again.

        Args:
            index: the number of the draw.
            run: `run(i, generator)` makes draw number `i`, whose cost is unknown, with a generator
                in the state before it. It may request states up to number `i` in the same thread.

        Returns:
            The 5056 bytes that `get_state()` would give had every draw before been made.

        Raises:
            IndexError: if there is no such position.
            RuntimeError: if `run` requests a state after the draw that it makes.
        """
        if not 0 <= index <= len(self):
            raise IndexError(f"no position {index}: there are {len(self)} draws")
        with self._lock:
            self._reach(index, run)
            return self._at(index)

    def words(self, first: int, last: int, run: Run) -> int | None:
        """The number of words drawn from one position to a later one, if known.

        Args:
            first: the number of a draw.
            last: the number of a later draw.
            run: as for `state`.

        Returns:
            The number of words; None if an unknown draw lies in between.
        """
        with self._lock:
            self._reach(last, run)
            barrier, _ = self._barrier(last)
            known = barrier <= first
            return self._places[last].words - self._places[first].words if known else None

    def _reach(self, index: int, run: Run) -> None:
        while len(self._places) <= index:
            self._pass(len(self._places) - 1, run)

    def _pass(self, index: int, run: Run) -> None:
        """Extend the known positions over one draw."""
        cost = self._costs[index]
        if cost is None:
            self._make(index, run)
            return
        before, source = self._places[index]
        words, cached = cost.after(source is not None)
        source = (index + 1 if cost.normals else source) if cached else None
        self._places.append(_Place(before + words, source))

    def _make(self, index: int, run: Run) -> None:
        """Make an unknown draw and keep the state after it as a barrier."""
        if self._running is not None:
            raise RuntimeError(
                f"draw {self._running} asks for a state after itself: a function that makes a "
                "draw may only ask for states up to it"
            )
        generator = generator_at(self._at(index))
        try:
            self._running = index
            run(index, generator)
        finally:
            self._running = None
        after = state_of(generator)
        self._barriers.append((index + 1, after))
        source = index + 1 if has_normal(after) else None
        self._places.append(_Place(self._places[index].words, source))

    def _at(self, index: int) -> bytes:
        base, state = self._nearest(index)
        if base != index:
            state = self._moved(state, base, index)
            self._recent.append((index, state))
        return state

    def _nearest(self, index: int) -> tuple[int, bytes]:
        """The last position up to `index` whose state is kept, and that state."""
        nearest = self._barrier(index)
        for recent in self._recent:
            if nearest[0] < recent[0] <= index:
                nearest = recent
        return nearest

    def _barrier(self, index: int) -> tuple[int, bytes]:
        return self._barriers[bisect_right(self._barriers, index, key=_position) - 1]

    def _moved(self, state: bytes, base: int, index: int) -> bytes:
        words, source = self._places[index]
        begin = self._places[base].words
        # The cached normal is part of the state. If it was cached after `base`, its pair must be
        # drawn again: jump to just before the pair, draw it, and jump on from there.
        if source is None:
            state = without_normal(state)
        elif source > base:
            paired_at = self._places[source].words
            state = paired(jump(without_normal(state), paired_at - _PAIR - begin))
            begin = paired_at
        return jump(state, words - begin)


def paired(state: bytes) -> bytes:
    """The state after one pair of normals, the second of which is cached."""
    # Below 16 elements normal_ draws sample by sample and caches.
    generator = generator_at(state)
    torch.empty(1, dtype=torch.float64, device="cpu").normal_(generator=generator)
    return state_of(generator)
