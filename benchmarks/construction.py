"""Describing a model: seconds and memory of `deferred()` and of the alternatives."""

from __future__ import annotations

from typing import TYPE_CHECKING

from benchmarks.contenders import CONTENDERS, eager, materialized
from benchmarks.harness import MB, Goal, Row, Run, alternate, assert_equal, in_process
from benchmarks.models import MODELS

if TYPE_CHECKING:
    from collections.abc import Callable

OTHERS = {
    "gpt2_xl": ("meta", "init_empty_weights", "eager"),
    "llama_70b": ("meta", "meta_with_initialisers"),
    "linears": ("meta", "init_empty_weights", "eager"),
    "resnet_152": ("meta", "init_empty_weights", "eager"),
}
NOTES = {
    ("llama_70b", "meta"): "on meta, transformers skips all of its initialisers; eager runs them",
    ("llama_70b", "meta_with_initialisers"): "on meta, with the initialisers that eager runs",
}
AGAINST_META = Goal(1.2)
DESCRIBED_IN = 100 * MB
# A description is quick to make, and eager construction of 1.5 billion elements is not.
ROUNDS, EAGER_ROUNDS = 9, 1


def construction(name: str) -> Callable[[Run], list[Row]]:
    """A case: one model, described in all ways."""

    def case(run: Run) -> list[Row]:
        return [*seconds(name, run), *memory(name, run)]

    return case


def seconds(name: str, run: Run) -> list[Row]:
    names = ("deferred", *OTHERS[name])
    ways = {n: lambda n=n: CONTENDERS[n](lambda: MODELS[name](tiny=run.tiny)) for n in names}
    for n in names:
        CONTENDERS[n](lambda: MODELS[name](tiny=True))
    found = alternate(ways, run.times(ROUNDS), {"eager": EAGER_ROUNDS})
    equal = same_values(name, run) if "eager" in names else None
    return [
        Row(
            name,
            "describe",
            found["deferred"],
            other,
            found[other],
            goal=AGAINST_META if other == "meta" else None,
            equal=equal,
            note=NOTES.get((name, other), ""),
        )
        for other in OTHERS[name]
    ]


def same_values(name: str, run: Run) -> bool:
    """What is described is what eager construction gives; one model after the other."""

    def make() -> object:
        return MODELS[name](tiny=run.tiny)

    assert_equal(eager(make), materialized(make))
    return True


def memory(name: str, run: Run) -> list[Row]:
    size, others = (["tiny"], ()) if run.tiny else ([], OTHERS[name])
    peaks = {
        other: [in_process("benchmarks.memory", other, name, *size)["peak"] / MB]
        for other in ("deferred", *others)
    }
    what, ours, limit = "peak memory to describe", peaks["deferred"], [DESCRIBED_IN / MB]
    rows = [Row(name, what, ours, other, peaks[other], unit="MB") for other in others]
    return [*rows, Row(name, what, ours, "the limit", limit, unit="MB", goal=Goal(1.0))]
