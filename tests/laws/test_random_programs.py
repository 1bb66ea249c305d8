"""Random programs, recorded and materialised in random order, against eager execution."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import lateinit
from lateinit.errors import SeedError
from tests.support.building import EAGER_POISON, LATE_POISON, poison
from tests.support.programs import READS, Run, Step, run
from tests.support.snapshots import assert_same
from tests.support.test_programs import PROGRAMS, as_model

# After these, what a program does may depend on what it drew.
READING = {*READS, "div_by_read", "positive", "rewound", "trunc_normal_redrawn"}
# Real data that is drawn into stays real, so that another seed cannot draw it again; and a plain
# pickle of real tensors cuts their ties.
REAL = {"from_numpy"}


def eagerly(program: list[Step], seed: int = 0) -> tuple[Run, torch.Tensor]:
    poison(EAGER_POISON)
    torch.manual_seed(seed)
    return run(program), torch.get_rng_state()


def recorded(program: list[Step]) -> Run:
    poison(LATE_POISON)
    torch.manual_seed(0)
    with lateinit.deferred():
        return run(program)


@pytest.mark.slow
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


@pytest.mark.slow
@settings(max_examples=200)
@given(PROGRAMS, st.integers(0, 200))
def test_one_tensor_alone_equals_eager(program: list[Step], which: int) -> None:
    expected, _ = eagerly(program)
    late = recorded(program)
    index = which % len(late.pool)
    alone = lateinit.materialize(late.pool[index])
    assert_same(as_model([expected.pool[index]]), as_model([alone]))


@settings(max_examples=200)
@given(PROGRAMS)
def test_another_seed_equals_eager_from_it_or_is_refused(program: list[Step]) -> None:
    expected, _ = eagerly(program, seed=5)
    model = as_model(recorded(program).pool)
    try:
        lateinit.materialize(model, seed=5)
    except SeedError:
        assert {step.op for step in program} & (READING | REAL)
        expected, _ = eagerly(program)
        lateinit.materialize(model)
    assert_same(as_model(expected.pool), model)


@settings(max_examples=100)
@given(PROGRAMS)
def test_pickled_program_equals_eager(program: list[Step]) -> None:
    assume(not {step.op for step in program} & REAL)
    expected, _ = eagerly(program)
    model = as_model(recorded(program).pool)
    loaded = pickle.loads(pickle.dumps(model))
    assert_same(as_model(expected.pool), lateinit.materialize(loaded))


@pytest.mark.slow
@settings(max_examples=100)
@given(PROGRAMS)
def test_deep_copy_of_a_program_s_tensors_equals_eager(program: list[Step]) -> None:
    assume(not {step.op for step in program} & REAL)
    expected = as_model(eagerly(program)[0].pool)
    model = as_model(recorded(program).pool)
    copied = copy.deepcopy(model)
    assert_same(copy.deepcopy(expected), lateinit.materialize(copied))
    assert_same(expected, lateinit.materialize(model))
