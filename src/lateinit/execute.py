"""Running the steps of a plan, the large ones by several threads."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import torch

from lateinit.chunks import Fill, fill_of, pieces, run_piece, state_at
from lateinit.memory import allocate
from lateinit.plan import Step
from lateinit.replay import Replay, Storages, without_modes
from lateinit.sharding import Shard, groups, run_leaves, shards_of

_AHEAD = 3  # steps that wait for a thread, for each thread

Results = Callable[[], Storages]


@dataclass(frozen=True, slots=True)
class _Running:
    """A step that threads work on: what they begin, and the ops that come after."""

    step: Step
    begun: Storages
    rest: Step | None
    futures: list[Future[None]]


def execute(
    replay: Replay, steps: Iterable[Step], threads: int | None = None
) -> Iterator[tuple[Step, Results]]:
    """Run steps; yields each with a function that gives its storages, or raises what failed.

    Steps that begin by filling a large storage are given to ``threads`` threads (by default
    ``torch.get_num_threads()``), in pieces; all others run here, as eager construction runs them.
    Of a storage that is only filled to be cut into shards, no more than those is computed where
    that can be; where it cannot, there is one such storage at a time.
    """
    count = torch.get_num_threads() if threads is None else threads
    waiting: deque[_Running] = deque()
    pool: ThreadPoolExecutor | None = None  # made where something is large
    try:
        for step in steps:
            fill = fill_of(replay.program, step)
            if fill is None:
                yield step, partial(replay.run, step)
                continue
            pool = pool or ThreadPoolExecutor(count)
            passing = fill.ref.storage not in step.gives
            shards = shards_of(replay.program, step, fill) if passing else None
            if shards is None:
                waiting.append(_start(replay, step, fill, pool, count))
            else:
                waiting.append(_start_shards(replay, step, shards, pool, count))
            most = 0 if passing and shards is None else _AHEAD * count
            while len(waiting) > most:
                yield _collect(replay, waiting.popleft())
        while waiting:
            yield _collect(replay, waiting.popleft())
    finally:
        if pool is not None:
            pool.shutdown(wait=True, cancel_futures=True)


def _start(
    replay: Replay, step: Step, fill: Fill, pool: ThreadPoolExecutor, threads: int
) -> _Running:
    number = fill.ref.storage
    storage, state = _allocated(replay, number), _state(replay, fill)
    futures = []
    for piece in pieces(fill, threads):
        at = None if state is None else state_at(fill, piece[0], state)
        futures.append(pool.submit(run_piece, fill, storage, piece, at))
    rest = Step(step.ops[len(fill.ops) :], step.gives)
    return _Running(step, {number: storage}, rest, futures)


def _start_shards(
    replay: Replay, step: Step, shards: list[Shard], pool: ThreadPoolExecutor, threads: int
) -> _Running:
    begun: Storages = {}
    futures: list[Future[None]] = []
    for shard in shards:
        storage = begun[shard.storage] = _allocated(replay, shard.storage)
        if shard.copied.box.size != shard.copied.shape:
            torch.empty(0, dtype=torch.uint8).set_(storage).zero_()
        state = _state(replay, shard.fill)
        parts = groups(shard, threads)
        futures += [pool.submit(run_leaves, shard, storage, part, state) for part in parts]
    return _Running(step, begun, None, futures)


def _allocated(replay: Replay, number: int) -> torch.UntypedStorage:
    known = replay.program.storages[number]
    with without_modes():
        return allocate(known.nbytes, known.device)


def _state(replay: Replay, fill: Fill) -> bytes | None:
    """Where the generator stands before a fill."""
    op = fill.draws
    return replay.streams.state(op.draw) if op is not None and op.draw is not None else None


def _collect(replay: Replay, running: _Running) -> tuple[Step, Results]:
    def storages() -> Storages:
        for future in running.futures:
            future.result()
        return running.begun if running.rest is None else replay.run(running.rest, running.begun)

    return running.step, storages
