"""Measuring two ways in turn, so that what else the machine does falls on both."""

from __future__ import annotations

import gc
import json
import math
import os
import platform
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn

ROOT = Path(__file__).parents[1]
MB = 1e6


@dataclass(frozen=True, slots=True)
class Goal:
    """What a row is to reach: ours over theirs at most so much, or theirs over ours at least."""

    value: float
    faster: bool = False

    def ratio(self, ours: float, theirs: float) -> float:
        over, under = (theirs, ours) if self.faster else (ours, theirs)
        return over / under if under else math.inf

    def met(self, ratio: float) -> bool:
        return ratio >= self.value if self.faster else ratio <= self.value

    def __str__(self) -> str:
        return f"at least {self.value:g} x" if self.faster else f"at most {self.value:g} x"


@dataclass(frozen=True, slots=True)
class Row:
    """One comparison. `equal` is None where no values are compared."""

    case: str
    what: str
    ours: list[float]
    against: str
    theirs: list[float]
    unit: str = "s"
    goal: Goal | None = None
    equal: bool | None = None
    note: str = ""

    @property
    def ratio(self) -> float:
        return (self.goal or Goal(1.0)).ratio(min(self.ours), min(self.theirs))

    @property
    def met(self) -> bool | None:
        return None if self.goal is None else self.goal.met(self.ratio)

    def plain(self) -> dict[str, Any]:
        """The row as JSON has it."""
        return {
            "case": self.case,
            "what": self.what,
            "unit": self.unit,
            "ours": figures(self.ours),
            "against": self.against,
            "theirs": figures(self.theirs),
            "ratio": self.ratio if math.isfinite(self.ratio) else None,
            "goal": None if self.goal is None else str(self.goal),
            "met": self.met,
            "equal": self.equal,
            "note": self.note,
        }


def figures(values: list[float]) -> dict[str, Any]:
    return {"min": min(values), "median": median(values), "all": values}


@dataclass(slots=True)
class Run:
    """How much to measure: ``tiny`` models once, for correctness, or the real ones."""

    tiny: bool = False
    rounds: int = 3
    rows: list[Row] = field(default_factory=list)

    def times(self, few: int | None = None) -> int:
        return 1 if self.tiny else few or self.rounds


def alternate(
    ways: dict[str, Callable[[], object]],
    rounds: int,
    most: dict[str, int] | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """The seconds that each way takes, one after the other, so many times.

    Args:
        ways: what to call; what a call returns is freed before the next one, outside of the time.
        rounds: how often.
        most: fewer rounds for some of them.
        clock: tells the seconds.
    """
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds):
        for name, way in ways.items():
            if number < (most or {}).get(name, rounds):
                gc.collect()
                seconds[name].append(timed(way, clock)[0])
    return seconds


def timed(
    way: Callable[[], Any], clock: Callable[[], float] = time.perf_counter
) -> tuple[float, Any]:
    started = clock()
    result = way()
    return clock() - started, result


def in_process(module: str, *arguments: str) -> dict[str, Any]:
    """What a module prints as JSON when it is run in a process of its own."""
    result: dict[str, Any] = json.loads(printed("-m", module, *arguments).splitlines()[-1])
    return result


def printed(*command: str) -> str:
    """What Python prints in a fresh process; one that fails says why on stderr, not caught."""
    done = subprocess.run(
        [sys.executable, *command], stdout=subprocess.PIPE, text=True, check=True, cwd=ROOT
    )
    return done.stdout


def assert_equal(expected: nn.Module, found: nn.Module) -> None:
    """Fail unless all parameters and buffers of two models have the same bits."""
    ours, theirs = dict(tensors(expected)), dict(tensors(found))
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        other = theirs[name]
        assert tensor.dtype == other.dtype, name
        assert tensor.stride() == other.stride(), name
        same = np.array_equal(bytes_of(tensor), bytes_of(other))
        assert same, f"{name} differs from what eager construction gives"


def tensors(model: nn.Module) -> list[tuple[str, torch.Tensor]]:
    return [*model.named_parameters(), *model.named_buffers()]


def bytes_of(tensor: torch.Tensor) -> Any:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()


def machine() -> dict[str, Any]:
    """What the numbers were measured on."""
    return {
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9),
        "huge_pages": huge_pages(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def processor() -> str:
    known = Path("/proc/cpuinfo")
    lines = known.read_text().splitlines() if known.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def huge_pages() -> str:
    known = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    return known.read_text().strip() if known.exists() else "unknown"
