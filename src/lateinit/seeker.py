"""Where a CPU generator stands before each of a sequence of draws."""

import threading
from bisect import bisect_right
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

import torch

from lateinit.mt19937 import generator_at, has_normal, jump, state_of, without_normal

Run = Callable[[int, torch.Generator], None]
_PAIR = 4


class Cost(NamedTuple):
    """What a draw takes: 32-bit words outright, and normal samples that come in pairs.

    A pair takes four words; the second sample of a pair stays cached in the generator until the
    next sample is asked for, by whichever op.
    """

    words: int
    normals: int = 0

    def after(self, cached: bool) -> tuple[int, bool]:
        """The words that are drawn, and whether a sample is cached then, if one is or not now."""
        if not self.normals:
            return self.words, cached
        new = self.normals - cached
        return self.words + _PAIR * ((new + 1) // 2), new % 2 == 1


class Seeker:
    """Where a CPU generator stands before each of a sequence of draws.

    A draw whose cost is known is jumped over. Any other is made, once, when a later position is
    asked for, and the state that it leaves is kept (a barrier). Threads may share a seeker; only
    one of them is in `state` at a time.

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
        # Per position: the words drawn up to it, unknown draws counted as none (no difference
        # is taken across a barrier), and the position since which the cached normal is cached.
        self._words = [0]
        self._source: list[int | None] = [0 if has_normal(start) else None]
        self._barriers = [0]
        self._kept = [start]
        self._recent: deque[tuple[int, bytes]] = deque(maxlen=16)
        self._running: int | None = None
        self._lock = threading.RLock()

    def append(self, cost: Cost | None) -> None:
        """Add a draw; None for one whose cost cannot be known without making it."""
        self._costs.append(cost)

    def __len__(self) -> int:
        return len(self._costs)

    def state(self, index: int, run: Run) -> bytes:
        """The generator's state before draw number `index`; after them all at `len(self)`.

        Costs one jump from the nearest earlier position among the start, the barriers and those
        asked for of late, and a second one where a cached normal has to be made again.

        Args:
            index: the number of the draw.
            run: `run(i, generator)` makes draw number `i`, unknown, with a generator that stands
                before it. It may ask, in the same thread, for states up to number `i`.

        Returns:
            The 5056 bytes that `get_state()` would give had every draw before been made.

        Raises:
            IndexError: if there is no such position.
            RuntimeError: if `run` asks for a state that comes after the draw that it makes.
        """
        if not 0 <= index <= len(self):
            raise IndexError(f"no position {index}: there are {len(self)} draws")
        with self._lock:
            self._reach(index, run)
            return self._at(index)

    def words(self, first: int, last: int, run: Run) -> int | None:
        """How many words are drawn from one position to a later one, as far as that is known.

        Args:
            first: the number of a draw.
            last: the number of a later one.
            run: as for `state`.

        Returns:
            The words; None if a draw had to be made in between.
        """
        with self._lock:
            self._reach(last, run)
            barrier = self._barriers[bisect_right(self._barriers, last) - 1]
            return self._words[last] - self._words[first] if barrier <= first else None

    def _reach(self, index: int, run: Run) -> None:
        while len(self._words) <= index:
            self._pass(len(self._words) - 1, run)

    def _pass(self, index: int, run: Run) -> None:
        """Extend the known positions over one draw."""
        cost = self._costs[index]
        if cost is None:
            self._make(index, run)
            return
        source = self._source[index]
        words, cached = cost.after(source is not None)
        self._words.append(self._words[index] + words)
        self._source.append((index + 1 if cost.normals else source) if cached else None)

    def _make(self, index: int, run: Run) -> None:
        """Run an unknown draw and keep the state after it."""
        if self._running is not None:
            raise RuntimeError(
                f"draw {self._running} asks for a state after itself: what makes a draw may "
                "only ask for states up to it"
            )
        generator = generator_at(self._at(index))
        self._running = index
        try:
            run(index, generator)
        finally:
            self._running = None
        after = state_of(generator)
        self._barriers.append(index + 1)
        self._kept.append(after)
        self._words.append(self._words[index])
        self._source.append(index + 1 if has_normal(after) else None)

    def _at(self, index: int) -> bytes:
        base, state = self._nearest(index)
        if base != index:
            state = self._moved(state, base, index)
            self._recent.append((index, state))
        return state

    def _nearest(self, index: int) -> tuple[int, bytes]:
        """The last position up to `index` whose state is at hand."""
        barrier = bisect_right(self._barriers, index) - 1
        nearest = self._barriers[barrier], self._kept[barrier]
        for recent in self._recent:
            if nearest[0] < recent[0] <= index:
                nearest = recent
        return nearest

    def _moved(self, state: bytes, base: int, index: int) -> bytes:
        source = self._source[index]
        if source is None:
            state = without_normal(state)
        elif source > base:
            words = self._words[source] - _PAIR - self._words[base]
            state, base = paired(jump(without_normal(state), words)), source
        return jump(state, self._words[index] - self._words[base])


def paired(state: bytes) -> bytes:
    """The state after one pair of normals, the second of them cached."""
    generator = generator_at(state)
    torch.empty(1, dtype=torch.float64, device="cpu").normal_(generator=generator)
    return state_of(generator)
