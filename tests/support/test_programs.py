"""The random programs themselves, proved on eager execution alone."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.cases import Bag
from tests.support.programs import OPS, Step, run
from tests.support.snapshots import assert_same

NUMBERS = st.integers(0, 200)
STEPS = st.builds(Step, st.sampled_from(sorted(OPS)), NUMBERS, NUMBERS, NUMBERS)
PROGRAMS = st.lists(STEPS, min_size=1, max_size=16)


def as_model(pool: list[torch.Tensor]) -> Bag:
    model = Bag()
    model.pool = pool
    return model


@settings(max_examples=300)
@given(PROGRAMS)
def test_programs_are_deterministic_eagerly(program: list[Step]) -> None:
    torch.manual_seed(0)
    first, ended = run(program), torch.get_rng_state()
    torch.manual_seed(0)
    again = run(program)
    assert repr(first.seen) == repr(again.seen)
    assert torch.equal(ended, torch.get_rng_state())
    assert_same(as_model(first.pool), as_model(again.pool))
