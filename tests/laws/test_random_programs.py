"""Random programs, recorded and materialised in random order, against eager execution."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import lateinit
from lateinit._tensors import waits
from lateinit.errors import SeedError
from tests.support.building import EAGER_POISON, LATE_POISON, poison
from tests.support.keepers import HOLDING, PLACES
from tests.support.programs import READS, Run, Step, carry_out, run
from tests.support.snapshots import assert_same, bits
from tests.support.test_programs import PROGRAMS, as_model

# After these, what a program does may depend on what it drew.
READING = {*READS, "div_by_read", "positive", "rewound", "trunc_normal_redrawn"}
READING |= {"by_numpy", "by_dlpack", "pickled", "saved", "tried"}
OF_CLASS = {"of_class", "made_of_class"}  # torch itself copies no tensor of such a class
# Real data that is drawn into stays real, so that another seed cannot draw it again; and a plain
# pickle of real tensors cuts their ties.
REAL = {"from_numpy", "by_numpy", "by_dlpack"}


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
    # Memory that is real, as what a block loads: pickle copies it for each tensor on it.
    assume(not {step.op for step in program} & (REAL | {"saved", "pickled"}))
    expected, _ = eagerly(program)
    model = as_model(recorded(program).pool)
    loaded = pickle.loads(pickle.dumps(model))
    assert_same(as_model(expected.pool), lateinit.materialize(loaded))


@pytest.mark.slow
@settings(max_examples=100)
@given(PROGRAMS)
def test_deep_copy_of_a_program_s_tensors_equals_eager(program: list[Step]) -> None:
    assume(not {step.op for step in program} & (REAL | OF_CLASS))
    expected = as_model(eagerly(program)[0].pool)
    model = as_model(recorded(program).pool)
    copied = copy.deepcopy(model)
    assert_same(copy.deepcopy(expected), lateinit.materialize(copied))
    assert_same(expected, lateinit.materialize(model))


# -- tensors kept in places that materialize does not see -----------------------------------------


# Two give memory to a real tensor, and one makes an object in C++, of which torch tells nobody; and
# repr realises nothing.
NOT_ALIKE = {"from_storage", "made_of_class", "swap_data", "text"}


def used(tensor: torch.Tensor) -> bytes:
    """The bits of a tensor that is used with real data."""
    with torch.no_grad():
        plain = tensor.detach().resolve_conj().resolve_neg().flatten()
        return bits("used", torch.cat([plain, torch.zeros(2, dtype=tensor.dtype)]))


def go_on(done: Run, kept: list[int], places: list[str], later: list[Step], *, late: bool) -> list:
    """Use kept tensors before, between and after materialising, among them by an eager program."""
    held = [(PLACES[place], index) for place, index in zip(places, kept, strict=False)]
    holders = [(get, keep(done.pool[index])) for (keep, get), index in held]
    rest = as_model([t for index, t in enumerate(done.pool) if index not in kept])
    pool = [get(holder) for get, holder in holders]
    looked: list = [used(t) for t in pool[::3]]
    if late:
        lateinit.materialize(rest, only=lambda name, _: len(name) % 2 == 0)
    shared = Run([*pool, torch.randn(4, 5), torch.zeros(17)])
    for step in later:
        if step.op not in NOT_ALIKE:
            carry_out(step, shared)
    looked += [repr(shared.seen), *map(used, shared.pool[1::2])]
    if late:
        lateinit.materialize(rest)
    return [*looked, *map(used, shared.pool), torch.get_rng_state().tolist(), rest]


@pytest.mark.parametrize("block", [False, True], ids=["eager after", "block after"])
@settings(max_examples=30)
@given(PROGRAMS, PROGRAMS, st.lists(st.sampled_from(HOLDING), min_size=10, max_size=10))
def test_tensors_in_any_place_are_shared_with_later_programs(
    block: bool, program: list[Step], later: list[Step], places: list[str]
) -> None:
    late = recorded(program)
    kept = [index for index, tensor in enumerate(late.pool) if not waits(tensor)]
    found = go_on(late, kept, places, later, late=True)
    if block:
        with lateinit.deferred():
            again = run(later)
    expected = go_on(eagerly(program)[0], kept, places, later, late=False)
    assert found[:-1] == expected[:-1]
    assert_same(expected[-1], found[-1])
    if block:
        assert_same(as_model(run(later).pool), lateinit.materialize(as_model(again.pool)))
