"""A script: kill a load before each of its steps in turn, and look at the files it was reading.

    python -m tests.support.killed_loads FOLDER FORMAT

A step is a file that is opened or mapped, or a tensor that is put in its place and trained.
"""

from __future__ import annotations

import itertools
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch

import lateinit
from lateinit._checkpoint.load.assign import Placer
from tests.support.formats import FORMATS
from tests.support.killed_saves import in_a_child
from tests.support.snapshots import assert_same
from tests.support.twins import Net, twins


def die_at(last: int, folder: str) -> None:
    steps = itertools.count()

    def step() -> None:
        if next(steps) == last:
            os.kill(os.getpid(), signal.SIGKILL)

    def hook(event: str, details: tuple[Any, ...]) -> None:
        if event == "mmap.__new__" or (event == "open" and str(details[0]).startswith(folder)):
            step()

    put = Placer.put

    def put_and_trained(
        placer: Placer, target: torch.Tensor, source: torch.Tensor, *, take: bool
    ) -> None:
        step()
        put(placer, target, source, take=take)
        with torch.no_grad():
            target.add_(1)
        step()

    Placer.put = put_and_trained  # type: ignore[method-assign]
    sys.addaudithook(hook)


def load(path: Path) -> torch.nn.Module:
    _, model = twins(seed=3)
    lateinit.load_checkpoint(model, path)
    return model


def main(folder: Path, name: str) -> None:
    torch.set_num_threads(1)
    expected = Net()
    path = FORMATS[name](expected.state_dict(), folder)
    load(path)  # what is imported when it is first needed
    files = {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    for step in itertools.count():
        finished = in_a_child(lambda: (die_at(step, str(folder)), load(path)))  # noqa: B023
        left = {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}
        assert left == files, f"killed at step {step}: the files have changed"
        if finished:
            break
    assert_same(expected, load(path))
    sys.stdout.write(f"{step} steps\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
