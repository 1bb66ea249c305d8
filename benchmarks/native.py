"""The native kernels: one thread against torch's kernels, on warm and on fresh memory."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

import lateinit
from benchmarks.contenders import SEED, deferred, eager, materialized
from benchmarks.harness import Goal, Row, Run, alternate, assert_equal, bytes_of
from benchmarks.models import MODELS, by_narrow_bounds, vit
from lateinit._rng import fills
from lateinit._torch import NORMAL, UNIFORM

if TYPE_CHECKING:
    from collections.abc import Callable

GOALS = {
    (UNIFORM, torch.float32): 6.0,
    (NORMAL, torch.float32): 3.0,
    (UNIFORM, torch.bfloat16): None,
    (NORMAL, torch.bfloat16): None,
}
WARM, FRESH = 1 << 22, 1 << 26
ROWS, COLUMNS, RANKS = 4096, 8192, 8


def alone(case: Callable[[Run], list[Row]]) -> Callable[[Run], list[Row]]:
    """The same case with one thread."""

    def with_one_thread(run: Run) -> list[Row]:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            return case(run)
        finally:
            torch.set_num_threads(threads)

    return with_one_thread


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(SEED)


def by_torch(op: str, target: torch.Tensor, numbers: tuple[float, float]) -> torch.Tensor:
    return (target.normal_ if op == NORMAL else target.uniform_)(*numbers, generator=generator())


def natively(op: str, target: torch.Tensor, numbers: tuple[float, float]) -> torch.Tensor:
    """By lateinit as it does it here: with torch's kernel where no native one is used."""
    if not fills.fill(op, target, numbers, generator()):
        by_torch(op, target, numbers)
    return target


@alone
def warm(run: Run) -> list[Row]:
    """One tensor in memory that was used before, and fits into a cache."""
    numel = 10_001 if run.tiny else WARM
    rows = []
    for (op, dtype), goal in GOALS.items():
        numbers = (-0.0577, 0.0577) if op == UNIFORM else (0.0, 0.02)
        ours, theirs = torch.ones(2, numel, dtype=dtype)
        ways: dict[str, Callable[[], object]] = {
            "ours": lambda op=op, to=ours, by=numbers: natively(op, to, by),
            "torch": lambda op=op, to=theirs, by=numbers: by_torch(op, to, by),
        }
        found = alternate(ways, run.times(5 * run.rounds))
        assert (bytes_of(ours) == bytes_of(theirs)).all()
        what = f"{op.removeprefix('aten::')} {str(dtype).removeprefix('torch.')}"
        note = f"{min(found['ours']) / numel * 1e9:.2f} ns an element"
        goals = None if goal is None else Goal(goal, faster=True)
        seconds = found["ours"], "torch", found["torch"]
        rows.append(Row("one warm tensor", what, *seconds, goal=goals, equal=True, note=note))
    return rows


class Drawn(nn.Module):
    """One large parameter."""

    def __init__(self, numel: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(numel).normal_(0.0, 0.02))


@alone
def fresh(run: Run) -> list[Row]:
    """One tensor in memory that was not touched before. Touching it alone is shown beside."""
    numel = 10_001 if run.tiny else FRESH

    def make() -> nn.Module:
        return Drawn(numel)

    ways: dict[str, Callable[[], object]] = {
        "eager": lambda: eager(make),
        # Before ours: it is the first one after eager construction that needs huge pages, which the
        # system then has to put together of the small ones just freed.
        "memset, huge pages": lambda: lateinit.materialize(lateinit.deferred_init(Zeros, numel)),
        "ours": lambda: materialized(make),
        "memset": lambda: torch.empty(numel).zero_(),
    }
    found = alternate(ways, run.times())
    assert_equal(eager(make), materialized(make))
    touched = ", ".join(f"{way} {min(found[way]):.3f} s" for way in ways if "memset" in way)
    ours, theirs, goal = found["ours"], found["eager"], Goal(1.5, faster=True)
    return [Row("fresh memory", "fill", ours, "eager", theirs, "s", goal, True, touched)]


class Zeros(nn.Module):
    def __init__(self, numel: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(numel))


class Columns(nn.Module):
    """What a rank of eight keeps of a weight that is cut by columns."""

    def __init__(self, rows: int, columns: int) -> None:
        super().__init__()
        whole = torch.empty(rows, columns).normal_(0.0, 0.02)
        part = whole[:, columns // RANKS : columns // RANKS * 2]
        self.register_buffer("part", part.clone(memory_format=torch.contiguous_format))


@alone
def columns(run: Run) -> list[Row]:
    """A column shard, against torch's `normal_` for as many elements as it has."""
    shape = (64, 256) if run.tiny else (ROWS, COLUMNS)
    share = shape[0] * shape[1] // RANKS
    part = torch.ones(share)

    def make() -> nn.Module:
        return Columns(*shape)

    ways: dict[str, Callable[[], object]] = {
        "ours": lambda: materialized(make),
        "normal_": lambda: part.normal_(0.0, 0.02),
    }
    found = alternate(ways, run.times(3 * run.rounds))
    assert_equal(eager(make), materialized(make))
    return [
        Row(
            *("1 of 8, columns", "fill", found["ours"], "normal_ of the share", found["normal_"]),
            goal=Goal(1.3),
            equal=True,
        )
    ]


def describing(run: Run) -> list[Row]:
    """Describing a model whose `trunc_normal_` redraws, since the rounds have to be counted."""

    def make() -> nn.Module:
        return vit(by_narrow_bounds, tiny=run.tiny, layers=4)

    deferred(make)
    found = alternate({"ours": lambda: deferred(make)}, run.times())["ours"]
    goal = Goal(1.0)
    return [Row("vit_narrow", "describe, redrawn", found, "the limit", [0.15], "s", goal)]


def half(run: Run) -> list[Row]:
    """A model of a billion parameters in bfloat16."""

    def make() -> nn.Module:
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.bfloat16)
        try:
            return MODELS["llama_1b"](tiny=run.tiny)
        finally:
            torch.set_default_dtype(before)

    ways: dict[str, Callable[[], Any]] = {
        "eager": lambda: eager(make),
        "ours": lambda: materialized(make),
    }
    found = alternate(ways, run.times())
    assert_equal(eager(make), materialized(make))
    goal = Goal(3.0, faster=True)
    return [
        Row("llama_1b, bfloat16", "build", found["ours"], "eager", found["eager"], "s", goal, True)
    ]
