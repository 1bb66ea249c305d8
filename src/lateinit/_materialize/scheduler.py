"""Running the steps of a plan, the large ones by several threads."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial

import torch

from lateinit._distributed.shard_ranges import Shard, groups, run_leaves, shards_of
from lateinit._program.plan import Step
from lateinit._program.program import Draw, Program
from lateinit._replay.chunks import (
    PIECE,
    ChunkedFill,
    fill_of,
    is_small,
    late_of,
    pieces,
    run_piece,
    words_of,
)
from lateinit._replay.replay import Replay, Storages
from lateinit._rng import mt19937
from lateinit._rng.alignment import UNIT
from lateinit._rng.truncated_normal import Late
from lateinit._torch.modes import without_modes
from lateinit._torch.operators import TRUNCATED
from lateinit._torch.storage import allocate
from lateinit._workers import Workers

_AHEAD = 3  # runs that wait for a thread, for each thread
_LEAST = 1 << 21  # elements below which a run is not worth its jump
_MOST_JOINED = 16  # small fills that join a run, which begins when they are known

Results = Callable[[], Storages]


def execute(
    replay: Replay, steps: Iterable[Step], threads: int | None = None
) -> Iterator[tuple[Step, Results]]:
    """Run steps; yields each with a function that gives its storages, or raises what failed.

    Steps that begin by filling a large storage are given to ``threads`` threads (by default
    ``torch.get_num_threads()``), in pieces, and so are small ones that draw right after them; all
    others run here, as eager construction runs them.
    Of a storage that is only filled to be cut into shards, no more than those is computed where
    that can be; where it cannot, there is one such storage at a time.
    """
    count = torch.get_num_threads() if threads is None else threads
    found = _fills(replay.program, steps)
    left = sum(fill.ref.numel for _, fill in found if fill is not None and not is_small(fill))
    waiting: deque[_Started] = deque()
    crew: _Crew | None = None  # made where something is large
    try:
        for number, (step, fill) in enumerate(found):
            if fill is None:
                yield step, partial(replay.run, step)
                continue
            crew = crew or _Crew(replay, count)
            # Long runs need few jumps, short ones at the end keep all threads busy.
            length = max(_LEAST, min(PIECE, left // (2 * count))) if count > 1 else PIECE
            left -= 0 if is_small(fill) else fill.ref.numel
            passing = fill.ref.storage not in step.gives
            shards = shards_of(replay.program, step, fill) if passing else None
            try:
                if shards is None:
                    waiting.append(crew.start(step, fill, length, _followed(found, number)))
                else:
                    waiting.append(crew.start_shards(step, shards))
            except Exception:
                # There may be too little memory for this one: what has its own is given still.
                while waiting:
                    yield crew.collect(waiting.popleft())
                raise
            most = 0 if passing and shards is None else _AHEAD * count
            while waiting and (most == 0 or crew.runs - waiting[0].run > most):
                yield crew.collect(waiting.popleft())
        while waiting and crew is not None:
            yield crew.collect(waiting.popleft())
    finally:
        if crew is not None:
            crew.pool.shutdown()


def _fills(program: Program, steps: Iterable[Step]) -> list[tuple[Step, ChunkedFill | None]]:
    """The steps, each with the fill that threads are to make, if any.

    A small one is among them where it is drawn right after a large one, as a bias is after
    a weight: the thread's generator stands there already, and another one would have to jump.
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
    """Whether a fill is made as a whole, and ends where its elements say in the random stream."""
    return fill.ref.storage in step.gives and fill.ops[0].name != TRUNCATED


def _followed(found: list[tuple[Step, ChunkedFill | None]], number: int) -> bool:
    """Whether the next step fills a storage that joins the run of this one."""
    fill = found[number + 1][1] if number + 1 < len(found) else None
    return fill is not None and is_small(fill)


@dataclass(frozen=True, slots=True)
class _Started:
    """A step that threads work on: what they begin, the ops that come after, and the last run."""

    step: Step
    begun: Storages
    rest: Step | None
    done: list[Future[None]]
    run: int


@dataclass(frozen=True, slots=True)
class _Job:
    """A piece of a fill, and how many words after the first draw of its run it is drawn.

    ``late`` is what is known of the late rounds of a ``trunc_normal_``.
    """

    fill: ChunkedFill
    storage: torch.UntypedStorage
    piece: tuple[int, int]
    after: int
    late: Late | None
    done: Future[None] = field(default_factory=Future)


@dataclass(slots=True)
class _Run:
    """Jobs that one thread does in turn, its generator moving on from each to the next."""

    jobs: list[_Job] = field(default_factory=list)
    numel: int = 0
    origin: tuple[Draw, int] | None = None  # the draw that it begins in, and how far in


class _Crew:
    """Threads, and the run of jobs that is being put together for one of them."""

    def __init__(self, replay: Replay, threads: int) -> None:
        self.pool = Workers(threads)
        self.runs = 0  # that were given to the threads
        self._replay = replay
        self._threads = threads
        self._run = _Run()
        self._last: tuple[Draw, int, bytes] | None = None

    def start(self, step: Step, fill: ChunkedFill, length: int, followed: bool = False) -> _Started:
        """Have a storage filled, in runs of about ``length`` elements.

        The last one is not begun yet where it is ``followed`` by something small.
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
        """Have shards of storages filled."""
        begun: Storages = {}
        done: list[Future[None]] = []
        for shard in shards:
            storage = begun[shard.storage] = self._allocated(shard.storage)
            if shard.copied.box.size != shard.copied.shape:
                torch.empty(0, dtype=torch.uint8).set_(storage).zero_()
            draw = shard.fill.draw
            state = None if draw is None else self._replay.streams.state(draw)
            parts = groups(shard, self._threads)
            done += [self.pool.submit(run_leaves, shard, storage, part, state) for part in parts]
        self.flush()
        self.runs += 1
        return _Started(step, begun, None, done, self.runs - 1)

    def collect(self, started: _Started) -> tuple[Step, Results]:
        """A step that was started, and what waits for it, completes it and gives its storages."""
        if started.run == self.runs:
            self.flush()

        def storages() -> Storages:
            for future in started.done:
                future.result()
            if started.rest is None:
                return started.begun
            return self._replay.run(started.rest, started.begun)

        return started.step, storages

    def flush(self) -> None:
        """Give the threads the run as it is."""
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
        return late_of(self._replay.program, fill, self._replay.streams.state(fill.draw))

    def _words_to(self, draw: Draw) -> int | None:
        """The words from the draw that the run begins in to another one."""
        return self._replay.streams.words(self._run.origin[0], draw) if self._run.origin else 0

    def _state(self, run: _Run) -> bytes | None:
        """Where the generator stands at the beginning of a run."""
        if run.origin is None:
            return None
        draw, into = run.origin
        if self._last is not None and self._last[0] == draw:
            state = mt19937.jump(self._last[2], into - self._last[1])
        else:
            state = mt19937.jump(self._replay.streams.state(draw), into)
        self._last = (draw, into, state)
        return state

    def _allocated(self, number: int) -> torch.UntypedStorage:
        known = self._replay.program.storages[number]
        with without_modes():
            return allocate(known.nbytes, known.device)


def _work(jobs: list[_Job], state: bytes | None) -> None:
    """Do the jobs of a run; what fails is raised to whoever waits for the job or a later one."""
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
    except Exception as error:  # noqa: BLE001
        _fail(jobs, error)


def _fail(jobs: list[_Job], error: BaseException) -> None:
    """Let nobody wait for what is not done."""
    for job in jobs:
        if not job.done.done():
            job.done.set_exception(error)
