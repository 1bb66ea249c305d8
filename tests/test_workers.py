"""Worker threads: in order, all results, and with fewer threads where the system gives no more."""

from __future__ import annotations

import threading
import time
from concurrent.futures import CancelledError
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

import lateinit
from lateinit._workers import Workers
from tests.support.snapshots import assert_same

if TYPE_CHECKING:
    from collections.abc import Callable


def allowing(count: int) -> Callable[[threading.Thread], None]:
    """``Thread.start`` of a system that gives only so many threads."""
    left = [count]
    start = threading.Thread.start

    def limited(thread: threading.Thread) -> None:
        if not left[0]:
            raise RuntimeError("can't start new thread")
        left[0] -= 1
        start(thread)

    return limited


@pytest.mark.parametrize("given", [0, 1, 2, 5])
def test_all_calls_are_made_in_order_by_as_many_threads_as_there_are(
    given: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(threading.Thread, "start", allowing(given))
    names: set[str] = set()

    def square(number: int) -> int:
        time.sleep(0.001)
        names.add(str(threading.get_ident()))
        return number * number

    with Workers(3) as workers:
        assert list(workers.map(square, range(20))) == [n * n for n in range(20)]
    assert len(names) <= max(1, min(given, 3))
    assert given or names == {str(threading.get_ident())}


@pytest.mark.parametrize("given", [0, 2])
def test_what_a_call_raises_is_raised_to_whoever_waits(
    given: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(threading.Thread, "start", allowing(given))
    with Workers(2) as workers:
        future = workers.submit(lambda: 1 / 0)
        assert workers.submit(lambda: 3).result() == 3
        with pytest.raises(ZeroDivisionError):
            future.result()


def test_what_has_not_begun_is_cancelled() -> None:
    begun, go_on = threading.Event(), threading.Event()

    def wait() -> str:
        begun.set()
        go_on.wait()
        return "done"

    workers = Workers(1)
    first, second = workers.submit(wait), workers.submit(wait)
    begun.wait()
    threading.Timer(0.05, go_on.set).start()
    workers.shutdown()
    assert first.result() == "done"
    with pytest.raises(CancelledError):
        second.result()


@pytest.mark.parametrize("given", [0, 1])
def test_a_model_is_materialised_and_saved_with_fewer_threads(
    given: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    def build() -> nn.Module:
        model = nn.Sequential(nn.Linear(700, 900), nn.Linear(900, 300))
        nn.init.trunc_normal_(model[0].weight, a=-1.0, b=0.5)
        return model

    torch.manual_seed(0)
    eager = build()
    torch.manual_seed(0)
    late = lateinit.deferred_init(build)
    monkeypatch.setattr(threading.Thread, "start", allowing(given))
    lateinit.save_checkpoint(late, tmp_path / "saved.safetensors")
    monkeypatch.setattr(threading.Thread, "start", allowing(given))
    assert_same(eager, lateinit.materialize(late, threads=3))
    again = lateinit.deferred_init(build)
    lateinit.load_checkpoint(again, tmp_path / "saved.safetensors")
    assert_same(eager, again)
