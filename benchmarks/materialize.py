"""Building a model for real: `deferred()` and `materialize()` against eager construction."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

import lateinit
from benchmarks.contenders import deferred, eager, materialized
from benchmarks.harness import MB, Goal, Row, Run, alternate, assert_equal, in_process, timed
from benchmarks.models import (
    MODELS,
    by_inverse_error_function,
    by_narrow_bounds,
    by_wide_bounds,
    vit,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn

WORKING_SET = 64 * MB
TINY_REPEATS = 20
INITIALISERS = {
    "uniform, erfinv, clamp": by_inverse_error_function,
    "trunc_normal_": by_wide_bounds,
    "trunc_normal_, redrawn": by_narrow_bounds,
}
ELEMENTS = 1 << 26


def against_eager(name: str, goal: float) -> Callable[[Run], list[Row]]:
    """A case: record and materialise one model, and build it eagerly, in turn."""

    def case(run: Run) -> list[Row]:
        make = maker(name, run)
        parts: dict[str, list[float]] = {"record": [], "materialise": []}

        def ours() -> nn.Module:
            seconds, model = timed(lambda: deferred(make))
            parts["record"].append(seconds)
            parts["materialise"].append(timed(lambda: lateinit.materialize(model))[0])
            return model

        ours()
        for seconds in parts.values():
            seconds.clear()
        found = alternate({"eager": lambda: eager(make), "ours": ours}, run.times())
        note = ", ".join(f"{part} {min(seconds):.3f} s" for part, seconds in parts.items())
        equal = same_values(make)
        goals = Goal(goal, faster=True)
        return [Row(name, "build", found["ours"], "eager", found["eager"], "s", goals, equal, note)]

    return case


def maker(name: str, run: Run) -> Callable[[], nn.Module]:
    return lambda: MODELS[name](tiny=run.tiny)


def same_values(make: Callable[[], nn.Module]) -> bool:
    expected = eager(make)
    after = torch.get_rng_state()
    found = materialized(make)
    assert torch.equal(after, torch.get_rng_state()), "the random state ends elsewhere"
    assert_equal(expected, found)
    return True


def recording(run: Run) -> list[Row]:
    """`trunc_normal_` reads what it draws: recording it is to cost no more than the formula."""
    formula, *_, redrawn = INITIALISERS

    def build(name: str) -> nn.Module:
        return vit(INITIALISERS[name], tiny=run.tiny, layers=4)

    def not_advancing() -> None:
        with lateinit.deferred(advance_rng=False):
            build(redrawn)

    ways: dict[str, Callable[[], object]] = {
        name: lambda name=name: deferred(lambda: build(name)) for name in INITIALISERS
    }
    ways[f"{redrawn}, advance_rng=False"] = not_advancing
    ways[formula]()
    found = alternate(ways, run.times())
    return [
        Row("vit", f"describe, {name}", found[name], formula, found[formula], goal=Goal(1.2))
        for name in list(ways)[1:]
    ]


def an_eighth(run: Run) -> list[Row]:
    """A part costs its share: every eighth layer of 24."""
    make = maker("linears", run)
    count = len(make())
    part = tuple(f"{i}." for i in range(0, count, 8))
    seconds: dict[str, list[float]] = {"part": [], "all": []}
    for _ in range(run.times()):
        for name, chosen in (("part", part), ("all", ("",))):
            model = deferred(make)

            def wanted(fqn: str, _: torch.Tensor, chosen: tuple[str, ...] = chosen) -> bool:
                return fqn.startswith(chosen)

            took, _ = timed(lambda m=model, w=wanted: lateinit.materialize(m, only=w))
            seconds[name].append(took)
            expected = eager(make)
            for index in range(0, count, 8):
                assert_equal(expected[index], model[index])
    return [
        Row("linears", "1/8 of it", seconds["part"], "all", seconds["all"], "s", Goal(0.14), True)
    ]


def tiny_model(run: Run) -> list[Row]:
    """The smallest models, many times, since one takes less than a clock's noise."""
    return [row for name in ("smallest", "small_gpt2") for row in tiny_models(name, run)]


def tiny_models(name: str, run: Run) -> list[Row]:
    make = maker(name, run)
    repeats = 1 if run.tiny else TINY_REPEATS

    def ours() -> None:
        for _ in range(repeats):
            lateinit.materialize(lateinit.deferred_init(make))

    def theirs() -> None:
        for _ in range(repeats):
            make()

    torch.manual_seed(0)
    ours()
    found = alternate({"ours": ours, "eager": theirs}, run.times(5 * run.rounds))
    each = {name: [s / repeats for s in seconds] for name, seconds in found.items()}
    equal = same_values(make)
    return [Row(name, "build", each["ours"], "eager", each["eager"], "s", Goal(2.0), equal)]


def peak_memory(run: Run) -> list[Row]:
    """Materialising takes what the model takes, and a bounded working set."""
    names = ("linears", "gpt2_medium", "vit_narrow")
    size, names = (["tiny"], names[:1]) if run.tiny else ([], names)
    rows = []
    for name in names:
        found = in_process("benchmarks.memory", "materialized", name, *size)
        limit = 1.05 * found["model"] + WORKING_SET
        rows.append(
            Row(
                name,
                "peak memory to build",
                [found["peak"] / MB],
                "1.05 x the model + 64 MB",
                [limit / MB],
                "MB",
                Goal(1.0),
            )
        )
    return rows


def fill_rate(run: Run) -> list[Row]:
    """One large tensor, against all cores drawing into memory that is warm."""
    numel = 10_001 if run.tiny else ELEMENTS
    warm = torch.empty(numel).normal_()
    cores = torch.get_num_threads()

    def make() -> nn.Module:
        return Filled(numel)

    found = alternate({"warm": warm.normal_, "ours": lambda: materialized(make)}, run.times())
    limit = [seconds / cores for seconds in found["warm"]]
    equal = same_values(make)
    note = f"{numel / min(found['ours']) / 1e6:.0f} million elements a second"
    goal = Goal(1 / 0.85)
    against = f"{cores} x warm normal_"
    return [Row("one tensor", "fill", found["ours"], against, limit, "s", goal, equal, note)]


class Filled(torch.nn.Module):
    def __init__(self, numel: int) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.empty(numel).normal_())


def threads(run: Run) -> list[Row]:
    """The same with one thread and with all."""
    make, cores = maker("linears", run), torch.get_num_threads()

    def with_threads(count: int) -> Callable[[], None]:
        def way() -> None:
            torch.set_num_threads(count)
            materialized(make)

        return way

    try:
        found = alternate({"1": with_threads(1), "all": with_threads(cores)}, run.times())
    finally:
        torch.set_num_threads(cores)
    goal = Goal(0.85 * cores, faster=True)
    return [
        Row("linears", f"build, {cores} threads", found["all"], "1 thread", found["1"], goal=goal)
    ]
