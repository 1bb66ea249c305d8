"""A pool of worker threads that works with fewer threads if the system cannot start all of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from queue import Empty, SimpleQueue
from threading import Thread
from typing import Any, TypeAlias, TypeVar

A = TypeVar("A")
R = TypeVar("R")
_Calls: TypeAlias = "SimpleQueue[tuple[Future[Any], Callable[..., Any], Any] | None]"


class Workers:
    """A pool of up to ``count`` threads, which run calls in the order of submission.

    ``concurrent.futures.ThreadPoolExecutor`` raises if a thread cannot be started, after it has
    queued the call. This pool goes on with fewer threads; without any thread, ``submit`` runs the
    call itself.

    Example:
        >>> with Workers(2) as workers:
        ...     list(workers.map(abs, [-1, 2]))
        [1, 2]
    """

    def __init__(self, count: int) -> None:
        self._most = count
        self._threads: list[Thread] = []
        self._calls: _Calls = SimpleQueue()

    def submit(self, call: Callable[..., R], *args: Any) -> Future[R]:
        """Queue a call for a thread; returns the future of its result."""
        future: Future[R] = Future()
        if len(self._threads) < self._most:
            self._start_one()
        if self._threads:
            self._calls.put((future, call, args))
        else:
            _run(future, call, args)
        return future

    def map(self, call: Callable[[A], R], items: Iterable[A]) -> Iterator[R]:
        """The results of ``call(item)`` for each item, in order; all calls are queued at once."""
        for future in [self.submit(call, item) for item in items]:
            yield future.result()

    def shutdown(self) -> None:
        """Cancel the queued calls and wait for the running ones; repeat it after an interrupt."""
        while True:
            try:
                left = self._calls.get_nowait()
            except Empty:
                break
            if left is not None:
                left[0].cancel()
        for _ in self._threads:
            self._calls.put(None)
        for thread in self._threads:
            if thread.ident is not None:  # else it was interrupted before it began
                thread.join()

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *error: object) -> None:
        self.shutdown()

    def _start_one(self) -> None:
        thread = Thread(target=_work, args=(self._calls,), name="lateinit", daemon=True)
        self._threads.append(thread)  # first, so that `shutdown` knows one that has just begun
        try:
            thread.start()
        except (RuntimeError, MemoryError):  # "can't start new thread": no stack, or a limit
            self._threads.remove(thread)
            self._most = len(self._threads)

    def __del__(self) -> None:
        # If `shutdown` was interrupted, the threads end by themselves.
        for _ in getattr(self, "_threads", ()):
            self._calls.put(None)


def _work(calls: _Calls) -> None:
    while (found := calls.get()) is not None:
        future, call, args = found
        if future.set_running_or_notify_cancel():
            _run(future, call, args)
        del found, future, call, args  # frees a result that no other code holds


def _run(future: Future[Any], call: Callable[..., Any], args: Any) -> None:
    try:
        result = call(*args)
    except BaseException as error:  # noqa: BLE001 - the future raises it in the waiting thread
        future.set_exception(error)
    else:
        future.set_result(result)
