"""Law 1, parity: every bit, dtype, stride, tie and flag is the eager twin's."""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

import pytest
import torch
from torch import nn

import lateinit
from lateinit.errors import SeedError
from tests.support.building import SEED, deferred, eager, models
from tests.support.snapshots import assert_same

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.support.cases import Case


@models()
def test_materialised_model_equals_its_eager_twin(case: Case) -> None:
    expected, ended = eager(case), torch.get_rng_state()
    model = deferred(case)
    assert torch.equal(ended, torch.get_rng_state())
    torch.manual_seed(99)
    elsewhere = torch.get_rng_state()
    assert lateinit.materialize(model) is model
    assert torch.equal(elsewhere, torch.get_rng_state())
    assert not lateinit.is_deferred(model)
    assert_same(expected, model)


@models()
def test_generator_can_be_left_where_it_was(case: Case) -> None:
    expected = eager(case)
    torch.manual_seed(SEED)
    before = torch.get_rng_state()
    model = deferred(case, advance_rng=False)
    assert torch.equal(before, torch.get_rng_state())
    assert_same(expected, lateinit.materialize(model))


@models()
def test_another_seed_gives_what_eager_gives_from_it(case: Case) -> None:
    model = deferred(case)
    try:
        lateinit.materialize(model, seed=5)
    except SeedError:
        assert case.reads_random
        assert_same(eager(case), lateinit.materialize(model))
    else:
        assert_same(eager(case, seed=5), model)


@contextmanager
def another_default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@models()
def test_surroundings_of_the_construction_are_kept(case: Case) -> None:
    with another_default_dtype(torch.float64):
        expected = eager(case)
        model = deferred(case)
    assert_same(expected, lateinit.materialize(model))


@models()
def test_surroundings_of_materialising_do_not_matter(case: Case) -> None:
    model = deferred(case)
    with ExitStack() as stack:
        stack.enter_context(another_default_dtype(torch.bfloat16))
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch.autocast("cpu", dtype=torch.bfloat16))
        stack.enter_context(torch.device("meta"))
        lateinit.materialize(model)
    assert_same(eager(case), model)


@models()
def test_inference_mode_around_materialising_does_not_matter(case: Case) -> None:
    model = deferred(case)
    with torch.inference_mode():
        lateinit.materialize(model)
    assert_same(eager(case), model)


@pytest.mark.usefixtures("fresh_memory_of_nan")
@models()
def test_no_element_is_left_unwritten(case: Case) -> None:
    expected = eager(case)
    assert_same(expected, lateinit.materialize(deferred(case)))


CASTS = {
    "bfloat16": lambda model: model.bfloat16(),
    "half and back": lambda model: model.half().float(),
    "double": lambda model: model.double(),
}


@pytest.mark.parametrize("cast", CASTS.values(), ids=CASTS.keys())
@models(lambda case: case.casts)
def test_cast_of_a_deferred_model_is_honoured(case: Case, cast: Callable[..., nn.Module]) -> None:
    expected, model = eager(case), deferred(case)
    try:
        cast(expected)
    except RuntimeError:  # what eager refuses is no model to compare with
        return
    assert_same(expected, lateinit.materialize(cast(model)))


@models()
def test_flags_set_on_a_deferred_model_are_kept(case: Case) -> None:
    expected, model = eager(case), deferred(case)
    for twin in (expected, model):
        twin.eval()
        for parameter in twin.parameters():
            if parameter.is_floating_point():
                parameter.requires_grad_(not parameter.requires_grad)
    assert_same(expected, lateinit.materialize(model))
