"""Execute the steps of a plan, the large fills on several threads.

A *fill* is the beginning of a step that computes one storage element by element, so that flat
pieces of it can be computed alone (``_replay.chunks``). A *run* is a sequence of pieces, of one
fill or of neighbouring ones, that one thread computes with one generator. Moving a generator to a
distant position (a *jump*) costs as much as half a million draws, which is why pieces are joined to
runs. This module divides the work; ``filling.py`` decides which steps to run.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial

import torch

from lateinit._distributed import Shard, groups, run_leaves, shards_of
from lateinit._program import Draw, Plan, Program, Step
from lateinit._replay import (
    PIECE,
    ChunkedFill,
    Computed,
    Session,
    Storages,
    fill_of,
    is_small,
    late_of,
    pieces,
    run_piece,
    words_of,
)
from lateinit._rng import UNIT, Late, mt19937
from lateinit._torch import TRUNCATED, allocate, without_modes
from lateinit._workers import Workers

# Runs submitted for each thread beyond the oldest unfinished step. Bounds the storages that are
# allocated and not yet in their tensors.
_AHEAD = 3
# The least elements of a run that is cut off for a thread. Its jump takes as long as about 5e5
# draws (see `PIECE`), which is then at most a quarter of the time of its draws.
_LEAST = 1 << 21
# The most steps after a large fill in which a small fill may still join its run. The run does not
# begin before they are known, so this bounds how long it waits.
_MOST_JOINED = 16

Results = Callable[[], dict[int, Computed]]


def execute(
    session: Session, steps: Iterable[Step], threads: int | None = None
) -> Iterator[tuple[Step, Results]]:
    """Run steps; yield each with a function that returns its results, or raises.

    The large fill at the beginning of a step is given to threads in pieces, and so is a small fill
    that draws right after it. All other steps run in the calling thread, when their function is
    called, as eager construction runs them.

    If a storage is needed only to produce shards, only the sharded ranges are computed. If that is
    impossible, the full storage is computed, at most one at a time.

    Args:
        session: runs the steps of the program, under its seed.
        steps: steps of a plan, in program order.
        threads: how many threads fill large storages, by default ``torch.get_num_threads()``.
    """
    count = torch.get_num_threads() if threads is None else threads
    found = _fills(session.program, steps)
    left = sum(fill.ref.numel for _, fill in found if fill is not None and not is_small(fill))
    waiting: deque[_Started] = deque()
    crew: _Crew | None = None  # made for the first large fill
    try:
        for number, (step, fill) in enumerate(found):
            if fill is None:
                yield step, partial(session.run, step)
                continue
            crew = crew or _Crew(session, count)
            # Long runs need few jumps; short runs at the end keep all threads busy. With a single
            # thread they have no use.
            length = max(_LEAST, min(PIECE, left // (2 * count))) if count > 1 else PIECE
            left -= 0 if is_small(fill) else fill.ref.numel
            # The filled storage is no target itself: other storages of this step are computed from
            # it.
            passing = fill.ref.storage not in step.gives
            shards = shards_of(session.program, step, fill) if passing else None
            try:
                if shards is None:
                    waiting.append(crew.start(step, fill, length, _followed(found, number)))
                else:
                    waiting.append(crew.start_shards(step, shards))
            except Exception:
                # Memory may have run out for this step. The steps before it already have theirs, so
                # they are still yielded, and their tensors become real.
                while waiting:
                    yield crew.collect(waiting.popleft())
                raise
            # A full storage that is needed only for its shards is finished before the next step
            # begins, so that never two such storages are in memory.
            most = 0 if passing and shards is None else _AHEAD * count
            while waiting and (most == 0 or crew.runs - waiting[0].run > most):
                yield crew.collect(waiting.popleft())
        while waiting and crew is not None:
            yield crew.collect(waiting.popleft())
    finally:
        if crew is not None:
            # Also if the consumer stops early or is interrupted: no thread may write after this.
            try:
                crew.pool.shutdown()
            finally:
                crew.pool.shutdown()  # again: the first may have been interrupted


def computed_whole(plan: Plan) -> dict[Step, int]:
    """The steps in which ``execute`` computes full tensors to keep shards, with the full bytes.

    These tensors are small, or filled by ops that do not fill in flat order, such as
    ``orthogonal_``.
    """
    program, found = plan.program, {}
    for step, fill in _fills(program, plan.steps):
        passed = {r.storage for n in step.ops for r in program.ops[n].written()} - {*step.gives}
        sharded = any(program.storages[number].followed for number in step.gives)
        if sharded and passed and (fill is None or shards_of(program, step, fill) is None):
            found[step] = sum(program.storages[number].nbytes for number in passed)
    return found


def _fills(program: Program, steps: Iterable[Step]) -> list[tuple[Step, ChunkedFill | None]]:
    """Pair each step with the fill that threads will compute, or with None.

    A small fill is included if it draws right after a large one, as a bias does after a weight: the
    thread's generator is at that position already, and another generator would have to jump there.
    """
    found: list[tuple[Step, ChunkedFill | None]] = []
    following, joined = None, 0
    for step in steps:
        fill, joined = fill_of(program, step), joined + 1
        if fill is not None:
            joined = 0
        elif following is not None and joined <= _MOST_JOINED:
            small = fill_of(program, step, UNIT)
            if small is not None and small.draw == following and _counted(step, small):
                fill = small
        found.append((step, fill))
        draw = fill.draw if fill is not None and _counted(step, fill) else None
        following = None if draw is None else Draw(draw.stream, draw.number + 1)
    return found


def _counted(step: Step, fill: ChunkedFill) -> bool:
    """Whether the position after a fill follows from its number of elements alone.

    It does not if only shards of the fill are computed, nor for a ``trunc_normal_`` that redraws.
    """
    return fill.ref.storage in step.gives and fill.ops[0].name != TRUNCATED


def _followed(found: list[tuple[Step, ChunkedFill | None]], number: int) -> bool:
    """Whether the next step has a small fill, which joins the run of this one."""
    fill = found[number + 1][1] if number + 1 < len(found) else None
    return fill is not None and is_small(fill)


@dataclass(frozen=True, slots=True)
class _Started:
    """A step on which threads work.

    Attributes:
        step: the step.
        begun: the storages that the threads fill.
        rest: the ops after the fill, or None if there are none to run.
        done: one future for each piece.
        run: the number of the run that holds the last piece.
    """

    step: Step
    begun: Storages
    rest: Step | None
    done: list[Future[None]]
    run: int


@dataclass(frozen=True, slots=True)
class _Job:
    """One piece of a fill.

    Attributes:
        fill: the ops that compute it.
        storage: the storage to fill.
        piece: the first element of the piece, and the element after the last.
        after: the words between the first draw of the run and the first draw of this piece.
        late: the late rounds of a ``trunc_normal_``, if known.
        done: set when the piece is filled or has failed.
    """

    fill: ChunkedFill
    storage: torch.UntypedStorage
    piece: tuple[int, int]
    after: int
    late: Late | None
    done: Future[None] = field(default_factory=Future)


@dataclass(slots=True)
class _Run:
    """Jobs that one thread does in turn, with one generator that moves forward between them."""

    jobs: list[_Job] = field(default_factory=list)
    numel: int = 0
    origin: tuple[Draw, int] | None = None  # the draw in which it begins, and the words before it


class _Crew:
    """The threads, and the run that is collected for the next free thread."""

    def __init__(self, session: Session, threads: int) -> None:
        self.pool = Workers(threads)
        self.runs = 0  # runs that were submitted to the threads
        self._session = session
        self._threads = threads
        self._run = _Run()
        self._last: tuple[Draw, int, bytes] | None = None

    def start(self, step: Step, fill: ChunkedFill, length: int, followed: bool = False) -> _Started:
        """Allocate the storage of a fill and add its pieces to runs of about ``length`` elements.

        If the step is ``followed`` by a small fill, its last run is left open, so that the small
        fill joins it.
        """
        number = fill.ref.storage
        storage, done = self._allocated(number), []
        last = self.runs
        for piece in pieces(fill, length):
            done.append(self._add(fill, storage, piece))
            last = self.runs
            ended = piece[1] == fill.ref.numel
            if self._run.numel >= length and not (ended and followed):
                self.flush()
        rest = Step(step.ops[len(fill.ops) :], step.gives)
        return _Started(step, {number: storage}, rest, done, last)

    def start_shards(self, step: Step, shards: list[Shard]) -> _Started:
        """Allocate the shards that a step computes, and have the threads fill them."""
        begun: Storages = {}
        done: list[Future[None]] = []
        for shard in shards:
            storage = begun[shard.storage] = self._allocated(shard.storage)
            if shard.copied.box.size != shard.copied.shape:
                # Uneven shards: FSDP2 pads the local tensor, and its padding is zeros.
                torch.empty(0, dtype=torch.uint8).set_(storage).zero_()
            draw = shard.fill.draw
            state = None if draw is None else self._session.streams.state(draw)
            parts = groups(shard, self._threads)
            done += [self.pool.submit(run_leaves, shard, storage, part, state) for part in parts]
        self.flush()
        self.runs += 1
        return _Started(step, begun, None, done, self.runs - 1)

    def collect(self, started: _Started) -> tuple[Step, Results]:
        """Return a started step, with a function that waits for it and completes it."""
        if started.run == self.runs:
            # The last piece is in the run that is still open, which no thread would ever get.
            self.flush()

        def results() -> dict[int, Computed]:
            for future in started.done:
                future.result()
            if started.rest is None:
                return {number: Computed(storage) for number, storage in started.begun.items()}
            return self._session.run(started.rest, started.begun)

        return started.step, results

    def flush(self) -> None:
        """Submit the open run to the threads."""
        run, self._run = self._run, _Run()
        if not run.jobs:
            return
        try:
            self.pool.submit(_work, run.jobs, self._state(run))
        except BaseException as error:
            _fail(run.jobs, error)
            raise
        self.runs += 1

    def _add(
        self, fill: ChunkedFill, storage: torch.UntypedStorage, piece: tuple[int, int]
    ) -> Future[None]:
        """Add a piece to the open run, or to a new run if the distance between is not known."""
        draw, into = fill.draw, words_of(fill, piece[0])
        after = 0
        if draw is not None:
            words = self._words_to(draw)
            if words is None:
                self.flush()
            if self._run.origin is None:
                self._run.origin = (draw, into)
            else:
                after = (words or 0) + into - self._run.origin[1]
        job = _Job(fill, storage, piece, after, self._late(fill))
        self._run.jobs.append(job)
        self._run.numel += piece[1] - piece[0]
        return job.done

    def _late(self, fill: ChunkedFill) -> Late | None:
        if fill.draw is None or fill.ops[0].name != TRUNCATED:
            return None
        streams = self._session.streams
        return late_of(streams.late, fill, streams.state(fill.draw))

    def _words_to(self, draw: Draw) -> int | None:
        """The words from the first draw of the open run to ``draw``; None if that is not known."""
        return self._session.streams.words(self._run.origin[0], draw) if self._run.origin else 0

    def _state(self, run: _Run) -> bytes | None:
        """The state of the generator at the beginning of a run."""
        if run.origin is None:
            return None
        draw, into = run.origin
        # Within one draw, jump on from the run before: runs of one length are equally far apart,
        # and `mt19937.jump` is fastest over a distance that it has seen.
        if self._last is not None and self._last[0] == draw:
            state = mt19937.jump(self._last[2], into - self._last[1])
        else:
            state = mt19937.jump(self._session.streams.state(draw), into)
        self._last = (draw, into, state)
        return state

    def _allocated(self, number: int) -> torch.UntypedStorage:
        known = self._session.program.storages[number]
        with without_modes():
            return allocate(known.nbytes, known.device)


def _work(jobs: list[_Job], state: bytes | None) -> None:
    """Do the jobs of a run; an error is passed to the futures of all jobs that are not done."""
    try:
        generator = None if state is None else mt19937.generator_at(state)
        at = 0
        for job in jobs:
            drawing = generator if job.fill.draw is not None else None
            if drawing is not None:
                mt19937.move(drawing, job.after - at)
                at = job.after + words_of(job.fill, job.piece[1] - job.piece[0])
            run_piece(job.fill, job.storage, job.piece, drawing, job.late)
            job.done.set_result(None)
    except Exception as error:  # noqa: BLE001 - handed to the thread that waits
        _fail(jobs, error)


def _fail(jobs: list[_Job], error: BaseException) -> None:
    """Set ``error`` on the futures of all jobs that are not done, so that no wait is endless."""
    for job in jobs:
        if not job.done.done():
            job.done.set_exception(error)
