"""Generators that are copied, rewound and seeded in a block, in any order, against eager."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import lateinit

DRAWS = (
    lambda n, g: torch.randn(n, generator=g),
    lambda n, g: torch.rand(n, generator=g),
    lambda n, g: torch.empty(n).exponential_(generator=g),
    lambda n, g: torch.randperm(n, generator=g),
)
NAMES = ("draw", "draw", "copy", "copy settled", "seed", "clone", "keep", "rewind", "fork", "tell")
THREE = st.integers(0, 2)
STEPS = st.tuples(st.sampled_from(NAMES), THREE, THREE, st.sampled_from((1, 15, 16, 40)))


def run(steps: list[tuple[str, int, int, int]]) -> list[Any]:
    """Go through the steps with the default generator and two others."""
    generators = [torch.default_generator, torch.Generator().manual_seed(7)]
    generators.append(torch.Generator().manual_seed(0))  # stands where the default one does
    found: list[Any] = []
    kept = [torch.get_rng_state()]
    for name, first, second, number in steps:
        one, other = generators[first], generators[second]
        if name == "draw":
            found.append(DRAWS[number % 4](number, one if first else None))
        elif name == "copy":
            one.set_state(other.get_state())
        elif name == "copy settled":
            one.set_state(torch.get_rng_state())
        elif name == "seed":
            one.manual_seed(number)
        elif name == "clone":
            generators[2] = other.clone_state()
        elif name == "keep":
            kept.append(other.get_state())
        elif name == "rewind":
            one.set_state(kept[number % len(kept)])
        elif name == "fork":
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(number)
                found += [torch.randn(number), torch.initial_seed()]
        else:
            found += [torch.initial_seed(), torch.get_rng_state()]
    return found


@settings(max_examples=300)
@given(st.lists(STEPS, min_size=2, max_size=14))
def test_generators_are_followed_wherever_they_are_set(
    steps: list[tuple[str, int, int, int]],
) -> None:
    torch.manual_seed(0)
    expected, ended = run(steps), torch.get_rng_state()
    torch.manual_seed(0)
    found = lateinit.deferred_init(run, steps)
    assert torch.equal(ended, torch.get_rng_state())
    lateinit.materialize(found)
    for ours, theirs in zip(expected, found, strict=True):
        assert torch.equal(ours, theirs) if isinstance(ours, torch.Tensor) else ours == theirs


def test_two_generators_go_on_from_one_place_each_on_its_own() -> None:
    steps = [("draw", 1, 0, 16), ("copy", 1, 0, 1), ("draw", 1, 0, 16), ("draw", 0, 0, 16)]
    drawn = lateinit.materialize(lateinit.deferred_init(run, steps))
    assert torch.equal(drawn[1], drawn[2])


def test_seed_that_is_told_is_the_one_that_was_set() -> None:
    with lateinit.deferred():
        torch.manual_seed(5)
        torch.randn(3)
        assert torch.initial_seed() == 5
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(6)
            torch.randn(3)
            assert torch.initial_seed() == 6
        assert torch.initial_seed() == 5
