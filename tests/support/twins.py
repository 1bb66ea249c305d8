"""A small model of many kinds of tensor, built both ways, and what several tests ask of it."""

from __future__ import annotations

import linecache
import os
import subprocess
import sys
import textwrap
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

import lateinit
from tests.support.snapshots import assert_same, tensors_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import FrameType

ROOT = Path(__file__).parents[2]


class Net(nn.Module):
    """Of everything one: parameters, statistics, an integer, a buffer that is not saved, a tie."""

    def __init__(self) -> None:
        super().__init__()
        self.enc = nn.Linear(4, 8)
        self.dec = nn.Linear(8, 4)
        self.norm = nn.BatchNorm1d(4)
        self.tied = nn.Linear(4, 8)
        self.tied.weight = self.enc.weight
        nn.init.normal_(self.dec.weight, std=0.02)
        self.register_buffer("table", torch.arange(4.0).sqrt(), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.dec(self.enc(x).relu())) * self.table


class TwoViews(nn.Module):
    """Two buffers on one storage, which overlap."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.randn(3))
        words = torch.randn(6)
        self.register_buffer("real", words[:4])
        self.register_buffer("rest", words[2:])


def eager(build: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return build()


def deferred(build: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return lateinit.deferred_init(build)


def twins(build: Callable[[], nn.Module] = Net, seed: int = 0) -> tuple[nn.Module, nn.Module]:
    return eager(build, seed), deferred(build, seed)


def still_deferred(model: nn.Module) -> list[str]:
    return [path for path, tensor in tensors_of(model) if lateinit.is_deferred(tensor)]


def assert_untouched(eager: nn.Module, model: nn.Module) -> None:
    """Nothing of a model was materialised or changed, and it can go on from here."""
    assert still_deferred(model) == [path for path, _ in tensors_of(model)]
    assert_same(eager, lateinit.materialize(model))


@contextmanager
def interrupted_at(line: int, file: str | None, spared: str = "") -> Iterator[None]:
    """Interrupt a block at the n-th line that it runs of a file; not where ``spared`` stands."""
    assert file is not None
    left = line

    def trace(frame: FrameType, event: str, _: object) -> Any:
        nonlocal left
        if frame.f_code.co_filename != file:
            return None
        if event == "line" and linecache.getline(file, frame.f_lineno).strip() != spared:
            left -= 1
            if left == 0:
                raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(before)


def run_alone(script: str, *arguments: str) -> str:
    """What a script prints in a process of its own, with warnings as errors."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(script), *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={
            **os.environ,
            "PYTHONPATH": f"{Path(lateinit.__file__).parents[1]}{os.pathsep}{ROOT}",
            "OMP_NUM_THREADS": "1",
        },
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
