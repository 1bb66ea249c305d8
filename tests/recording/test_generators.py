"""Generators that are copied, rewound and seeded in a block, in any order, against eager."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.random import (  # before any block patches them
    get_rng_state,
    initial_seed,
    manual_seed,
    set_rng_state,
)

import lateinit
from lateinit.errors import SeedError

if TYPE_CHECKING:
    from collections.abc import Callable

DRAWS = (
    lambda n, g: torch.randn(n, generator=g),
    lambda n, g: torch.rand(n, generator=g),
    lambda n, g: torch.empty(n).exponential_(generator=g),
    lambda n, g: torch.randperm(n, generator=g),
)
NAMES = ("draw", "draw", "copy", "copy settled", "seed", "clone", "keep", "rewind", "fork", "tell")
NAMES += ("tell own", "seed by name", "forget")
THREE = st.integers(0, 2)
STEPS = st.tuples(st.sampled_from(NAMES), THREE, THREE, st.sampled_from((1, 15, 16, 40)))


def run(steps: list[tuple[str, int, int, int]]) -> list[Any]:
    """Go through the steps with the default generator and two others."""
    generators = [torch.default_generator, torch.Generator().manual_seed(7)]
    generators.append(torch.Generator().manual_seed(0))  # stands where the default one does
    found: list[Any] = []
    kept = [get_rng_state()]
    for name, first, second, number in steps:
        one, other = generators[first], generators[second]
        if name == "draw":
            found.append(DRAWS[number % 4](number, one if first else None))
        elif name == "copy":
            one.set_state(other.get_state())
        elif name == "copy settled":
            one.set_state(torch.get_rng_state())
        elif name.startswith("seed"):
            (manual_seed if name == "seed by name" else one.manual_seed)(number % 2)
        elif name == "clone":
            generators[2] = other.clone_state()
        elif name == "keep":
            kept.append(other.get_state())
        elif name == "rewind":
            (set_rng_state if first == 0 else one.set_state)(kept[number % len(kept)])
        elif name == "fork":
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(number)
                found += [torch.randn(number), torch.initial_seed()]
        elif name == "tell own":
            own = generators[1 + first % 2]
            found += [torch.rand(number, generator=own), own.get_state()]
        elif name == "forget":  # the cached normals, which the end of a state holds
            state = get_rng_state().clone()
            state[-48:] = torch.Generator().get_state()[-48:]
            set_rng_state(state)
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


@settings(max_examples=200)
@given(st.lists(STEPS, min_size=2, max_size=10))
def test_another_seed_gives_its_draws_or_is_refused(steps: list[tuple[str, int, int, int]]) -> None:
    def draws() -> list[torch.Tensor]:
        # States would depend on the seed, and are real.
        return [
            found
            for found in run(steps)
            if isinstance(found, torch.Tensor) and found.dtype is not torch.uint8
        ]

    torch.manual_seed(0)
    recorded = lateinit.deferred_init(draws)
    torch.manual_seed(5)
    expected = draws()
    try:
        lateinit.materialize(recorded, seed=5)
    except SeedError:
        return
    assert all(map(torch.equal, recorded, expected))


def test_a_state_that_two_streams_reach_under_one_seed_is_refused_under_another() -> None:
    def draw() -> torch.Tensor:
        start = get_rng_state()
        manual_seed(0)
        get_rng_state()  # the same bytes under seed 0 only
        set_rng_state(start)
        return torch.randn(3)

    torch.manual_seed(0)
    expected = draw()
    torch.manual_seed(0)
    drawn = lateinit.deferred_init(draw)
    with pytest.raises(SeedError, match="under another seed"):
        lateinit.materialize(drawn, seed=5)
    assert torch.equal(lateinit.materialize(drawn), expected)


def test_a_state_that_two_streams_reach_under_every_seed_is_honoured_under_another() -> None:
    def draw() -> list[torch.Tensor]:
        drawn = []
        for _ in range(2):
            manual_seed(0)
            with torch.random.fork_rng(devices=[]):
                drawn.append(own_seed(3))
            drawn.append(torch.randn(3))
        return [torch.tensor(d) if isinstance(d, int) else d for d in drawn]

    expected = draw()
    torch.manual_seed(0)
    drawn = lateinit.deferred_init(draw)
    assert all(map(torch.equal, lateinit.materialize(drawn, seed=5), expected))


def _seeded_by_name() -> torch.Tensor:
    manual_seed(0)
    return torch.randn(3)


def _seeded_directly() -> torch.Tensor:
    torch.default_generator.manual_seed(0)
    return torch.randn(3)


def _set_to_the_start() -> torch.Tensor:
    set_rng_state(torch.Generator().manual_seed(0).get_state())
    return torch.randn(3)


@pytest.mark.parametrize("draw", [_seeded_by_name, _seeded_directly, _set_to_the_start])
def test_generator_seeded_to_be_where_it_was_draws_the_same_under_any_seed(
    draw: Callable[[], torch.Tensor],
) -> None:
    torch.manual_seed(0)
    drawn = lateinit.deferred_init(draw)
    assert torch.equal(lateinit.materialize(drawn, seed=5), draw())


class _Holds(nn.Module):
    """Holds one real tensor, and nothing that is deferred."""

    def __init__(self, make: Callable[[], torch.Tensor]) -> None:
        super().__init__()
        self.register_buffer("made", make())


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.from_numpy(np.zeros(3)).normal_(),
        lambda: torch.from_numpy(np.zeros(3, np.float32)).copy_(torch.randn(3)),
        torch.get_rng_state,
        get_rng_state,
        torch.default_generator.get_state,
        lambda: [torch.randn(3), torch.default_generator.get_state()][1],
    ],
)
def test_seed_of_a_model_whose_random_values_are_real_is_refused(
    make: Callable[[], torch.Tensor],
) -> None:
    torch.manual_seed(0)
    model = lateinit.deferred_init(_Holds, make)
    torch.manual_seed(0)
    assert torch.equal(model.made, make())
    with pytest.raises(SeedError, match="seed=5 cannot be honoured"):
        lateinit.materialize(model, seed=5)
    lateinit.materialize(model)


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


SEED_READS: dict[str, Callable[[], object]] = {
    "at once": torch.initial_seed,
    "by a name imported before": initial_seed,
    "after a draw": lambda: [torch.randn(3), torch.initial_seed()],
    "after a fork": lambda: [own_seed(5), torch.initial_seed()],
    "in a fork": lambda: [torch.random.fork_rng(devices=[]).__enter__(), torch.initial_seed()],
    "of a state from before": lambda: [seeded_away_and_back(), torch.initial_seed()],
}


def own_seed(seed: int) -> int:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return torch.initial_seed()


def seeded_away_and_back() -> None:
    state = torch.get_rng_state()
    torch.manual_seed(5)
    torch.set_rng_state(state)


@pytest.mark.parametrize("read", SEED_READS.values(), ids=list(SEED_READS))
def test_another_seed_is_refused_if_the_constructor_read_the_seed(
    read: Callable[[], object],
) -> None:
    torch.manual_seed(3)
    model = lateinit.deferred_init(lambda: [read(), nn.Linear(2, 2)][1])
    with pytest.raises(SeedError, match=r"the constructor read torch.initial_seed\(\)"):
        lateinit.materialize(model, seed=5)
    lateinit.materialize(model)


@pytest.mark.parametrize("seed", [3, 4])
def test_seed_that_the_constructor_gave_may_be_read_under_another(seed: int) -> None:
    torch.manual_seed(3)
    model = lateinit.deferred_init(lambda: [own_seed(seed), nn.Linear(2, 2)][1])
    torch.manual_seed(5)
    expected = nn.Linear(2, 2)
    assert torch.equal(lateinit.materialize(model, seed=5).weight, expected.weight)


GIVEN: dict[str, Callable[[torch.Generator], torch.Tensor]] = {
    "bernoulli": lambda g: torch.bernoulli(torch.full((3,), 0.5), generator=g),
    "binomial": lambda g: torch.binomial(torch.full((3,), 5.0), torch.full((3,), 0.5), generator=g),
    "dirichlet": lambda g: torch._sample_dirichlet(torch.ones(3), generator=g),
    "gamma": lambda g: torch._standard_gamma(torch.ones(3), generator=g),
    "multinomial": lambda g: torch.multinomial(torch.ones(9), 4, generator=g),
    "poisson": lambda g: torch.poisson(torch.ones(3), generator=g),
    "poisson, by place": lambda g: torch.poisson(torch.ones(3), g),
}


@pytest.mark.parametrize("draw", GIVEN.values(), ids=list(GIVEN))
def test_generator_is_given_in_any_place(draw: Callable[[torch.Generator], torch.Tensor]) -> None:
    expected = draw(torch.Generator().manual_seed(1))
    found = lateinit.deferred_init(lambda: draw(torch.Generator().manual_seed(1)))
    assert torch.equal(lateinit.materialize(found), expected)
