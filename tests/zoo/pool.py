"""Running checks in processes that may take too long, run out of memory or crash."""

from __future__ import annotations

import multiprocessing
import os
import queue
import resource
import threading
import warnings
from typing import TYPE_CHECKING, Any

import torch

from tests.zoo.check import Outcome, outcomes

if TYPE_CHECKING:
    from collections.abc import Iterator
    from multiprocessing.connection import Connection

MOST_MEMORY = 8 << 30
TYPES_PER_PROCESS = 60

TIMEOUT, CRASH = "out of time", "crashed"


def check_all(
    model_types: list[str], jobs: int, seconds: float, threads: int = 1
) -> Iterator[list[Outcome]]:
    """The outcomes of each type, as they come; a type that takes longer is ended."""
    waiting: queue.SimpleQueue[str] = queue.SimpleQueue()
    for model_type in model_types:
        waiting.put(model_type)
    done: queue.SimpleQueue[list[Outcome] | None] = queue.SimpleQueue()
    prepare(threads)
    for _ in range(jobs):
        threading.Thread(target=_feed, args=(waiting, done, seconds), daemon=True).start()
    left = jobs
    while left:
        found = done.get()
        if found is None:
            left -= 1
        else:
            yield found


def prepare(threads: int = 1) -> None:
    """Import once what every process needs, and give torch so many threads in each."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    torch.set_num_threads(threads)
    import transformers

    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")


def _feed(waiting: Any, done: Any, seconds: float) -> None:
    worker = None
    try:
        while True:
            model_type = waiting.get_nowait()
            worker = worker or _Worker()
            done.put(worker.check(model_type, seconds))
            worker = worker if worker.usable else worker.end()
    except queue.Empty:
        done.put(None)
    finally:
        if worker is not None:
            worker.end()


class _Worker:
    """A process that checks one type after another."""

    # A process that is forked in between would inherit the end of the pipe that belongs to another
    # one, and hold it open: the crash of that one would not be noticed.
    _one_fork = threading.Lock()

    def __init__(self) -> None:
        context = multiprocessing.get_context("fork")
        with self._one_fork:
            self.connection, theirs = context.Pipe()
            self.process = context.Process(target=_serve, args=(theirs,), daemon=True)
            self.process.start()
            theirs.close()
        self.checked = 0
        self.alive = True

    @property
    def usable(self) -> bool:
        return self.alive and self.checked < TYPES_PER_PROCESS

    def check(self, model_type: str, seconds: float) -> list[Outcome]:
        found: list[Outcome] = []
        self.checked += 1
        self.connection.send(model_type)
        try:
            while self.connection.poll(seconds):
                outcome = self.connection.recv()
                if outcome is None:
                    return found
                found.append(outcome)
            status = TIMEOUT
        except EOFError:
            status = CRASH
        self.alive = False
        return [*found, Outcome(model_type, "", status, f"after {seconds:g} s")]

    def end(self) -> None:
        self.process.kill()
        self.process.join()
        self.connection.close()


def _serve(connection: Connection) -> None:
    resource.setrlimit(resource.RLIMIT_DATA, (MOST_MEMORY, MOST_MEMORY))
    warnings.simplefilter("ignore")
    while True:
        try:
            model_type = connection.recv()
        except EOFError:
            return
        for outcome in outcomes(model_type):
            connection.send(outcome)
        connection.send(None)
