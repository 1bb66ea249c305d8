"""Random programs, recorded and materialised in random order, against eager execution."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import lateinit
from tests.laws import EAGER_POISON, LATE_POISON, poison
from tests.programs import Run, Step, run
from tests.snapshots import assert_same
from tests.test_programs import PROGRAMS, as_model


def eagerly(program: list[Step]) -> tuple[Run, torch.Tensor]:
    poison(EAGER_POISON)
    torch.manual_seed(0)
    return run(program), torch.get_rng_state()


def recorded(program: list[Step]) -> Run:
    poison(LATE_POISON)
    torch.manual_seed(0)
    with lateinit.deferred():
        return run(program)


@settings(max_examples=300)
@given(PROGRAMS, st.randoms(use_true_random=False))
def test_tensors_in_any_order_equal_eager(program: list[Step], order: object) -> None:
    expected, ended = eagerly(program)
    late = recorded(program)
    assert torch.equal(ended, torch.get_rng_state())
    assert repr(late.seen) == repr(expected.seen)
    for index in order.sample(range(len(late.pool)), len(late.pool)):
        late.pool[index] = lateinit.materialize(late.pool[index])
    assert_same(as_model(expected.pool), as_model(late.pool))


@settings(max_examples=200)
@given(PROGRAMS)
def test_all_tensors_at_once_equal_eager(program: list[Step]) -> None:
    expected, _ = eagerly(program)
    model = as_model(recorded(program).pool)
    assert_same(as_model(expected.pool), lateinit.materialize(model))


@settings(max_examples=200)
@given(PROGRAMS, st.integers(0, 200))
def test_one_tensor_alone_equals_eager(program: list[Step], which: int) -> None:
    expected, _ = eagerly(program)
    late = recorded(program)
    index = which % len(late.pool)
    alone = lateinit.materialize(late.pool[index])
    assert_same(as_model([expected.pool[index]]), as_model([alone]))
