"""Running checks in processes that may take too long, run out of memory or crash."""

from __future__ import annotations

import multiprocessing
import os
import resource
import time
import warnings
from collections import deque
from multiprocessing.connection import wait
from typing import TYPE_CHECKING

import torch

from tests.zoo import check
from tests.zoo.check import Outcome

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from multiprocessing.connection import Connection

    Outcomes = Callable[[str], Iterable[Outcome]]

MOST_MEMORY = 8 << 30
TYPES_PER_PROCESS = 60

TIMEOUT, CRASH = "out of time", "crashed"
# What a process sends when it has imported all that it needs, and the seconds that it may take.
_READY, _STARTING = "ready", 120.0

# A fork of this process would have its threads' locks and memory, but not its threads.
CONTEXT = multiprocessing.get_context("forkserver")


def check_all(
    model_types: list[str],
    jobs: int,
    seconds: float,
    threads: int = 1,
    outcomes: Outcomes = check.outcomes,
) -> Iterator[list[Outcome]]:
    """The outcomes of each type, as they come; a type that takes longer is ended.

    Args:
        model_types: what to check.
        jobs: how many processes there are at a time.
        seconds: the most that one outcome may take.
        threads: how many threads torch has in each process.
        outcomes: the function of a module that gives the outcomes of one type.
    """
    waiting = deque(model_types)
    busy = [_Worker(outcomes, seconds, threads) for _ in range(min(jobs, len(waiting)))]
    try:
        for worker in busy:
            worker.begin(waiting.popleft())
        while busy:
            soonest = min(worker.until for worker in busy)
            wait([worker.connection for worker in busy], max(0.0, soonest - time.monotonic()))
            for worker in list(busy):
                found = worker.answer()
                if found is None:
                    continue
                if waiting:
                    worker.begin(waiting.popleft())
                else:
                    worker.end()
                    busy.remove(worker)
                yield found
    finally:
        for worker in busy:
            worker.end()


def prepare(threads: int = 1) -> None:
    """Give torch so many threads, and let transformers be silent."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    torch.set_num_threads(threads)
    import transformers

    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")


class _Worker:
    """A process that checks one type after another, and is replaced when it fails or is old."""

    def __init__(self, outcomes: Outcomes, seconds: float, threads: int) -> None:
        self._arguments = outcomes, threads
        self._seconds = seconds
        self._start()

    def _start(self) -> None:
        self.connection, theirs = CONTEXT.Pipe()
        self._process = CONTEXT.Process(target=_serve, args=(theirs, *self._arguments), daemon=True)
        self._process.start()
        theirs.close()
        self._checked = 0
        self._starting = _STARTING

    def begin(self, model_type: str) -> None:
        if self._checked == TYPES_PER_PROCESS:
            self.end()
            self._start()
        self._checked += 1
        self._type = model_type
        self._found: list[Outcome] = []
        self.until = time.monotonic() + self._seconds + self._starting
        self._starting = 0.0
        self.connection.send(model_type)

    def answer(self) -> list[Outcome] | None:
        """The outcomes of the type if there will be no others."""
        try:
            while self.connection.poll():
                outcome = self.connection.recv()
                self.until = time.monotonic() + self._seconds
                if outcome == _READY:
                    continue
                if outcome is None:
                    return self._found
                self._found.append(outcome)
            if time.monotonic() < self.until:
                return None
            status = TIMEOUT
        except (EOFError, ConnectionError):
            status = CRASH
        self.end()
        self._start()
        return [*self._found, Outcome(self._type, "", status, f"after {self._seconds:g} s")]

    def end(self) -> None:
        self._process.kill()
        self._process.join()
        self.connection.close()


def _serve(connection: Connection, outcomes: Outcomes, threads: int) -> None:
    resource.setrlimit(resource.RLIMIT_DATA, (MOST_MEMORY, MOST_MEMORY))
    prepare(threads)
    connection.send(_READY)
    while True:
        try:
            model_type = connection.recv()
        except EOFError:
            return
        for outcome in outcomes(model_type):
            connection.send(outcome)
        connection.send(None)
