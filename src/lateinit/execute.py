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

_AHEAD = 3  # steps that wait for a thread, for each thread


@dataclass(frozen=True, slots=True)
class _Running:
    step: Step
    fill: Fill
    storage: torch.UntypedStorage
    futures: list[Future[None]]


def execute(
    replay: Replay, steps: Iterable[Step], threads: int | None = None
) -> Iterator[tuple[Step, Callable[[], Storages]]]:
    """Run steps; yields each with a function that gives its storages, or raises what failed.

    Steps that begin by filling a large storage are given to ``threads`` threads (by default
    ``torch.get_num_threads()``), in pieces; all others run here, as eager construction runs them.
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
            waiting.append(_start(replay, step, fill, pool, count))
            if len(waiting) > _AHEAD * count:
                yield _collect(replay, waiting.popleft())
        while waiting:
            yield _collect(replay, waiting.popleft())
    finally:
        if pool is not None:
            pool.shutdown(wait=True, cancel_futures=True)


def _start(
    replay: Replay, step: Step, fill: Fill, pool: ThreadPoolExecutor, threads: int
) -> _Running:
    known = replay.program.storages[fill.ref.storage]
    with without_modes():
        storage = allocate(known.nbytes, known.device)
        op = fill.draws
        state = replay.streams.state(op.draw) if op is not None and op.draw is not None else None
    futures = []
    for piece in pieces(fill, threads):
        at = None if state is None else state_at(fill, piece[0], state)
        futures.append(pool.submit(run_piece, fill, storage, piece, at))
    return _Running(step, fill, storage, futures)


def _collect(replay: Replay, running: _Running) -> tuple[Step, Callable[[], Storages]]:
    def storages() -> Storages:
        for future in running.futures:
            future.result()
        rest = Step(running.step.ops[len(running.fill.ops) :], running.step.gives)
        return replay.run(rest, {running.fill.ref.storage: running.storage})

    return running.step, storages
