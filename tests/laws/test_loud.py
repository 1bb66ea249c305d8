"""Law 9, loud: nothing is left half done, and asking disturbs nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

import lateinit
from tests.support.building import SEED, deferred, eager, models
from tests.support.snapshots import assert_same, tensors_of

if TYPE_CHECKING:
    from tests.support.cases import Case


class HalfwayError(Exception):
    pass


def build_and_raise(case: Case) -> None:
    with lateinit.deferred():
        case.build()
        raise HalfwayError


@models()
def test_exception_inside_the_block_leaves_no_trace(case: Case) -> None:
    expected = eager(case)
    torch.manual_seed(SEED)
    before = torch.get_rng_state()
    with pytest.raises(HalfwayError):
        build_and_raise(case)
    assert torch.equal(before, torch.get_rng_state())
    assert_same(expected, case.build())


@models()
def test_asking_about_a_deferred_model_changes_nothing(case: Case) -> None:
    expected, model = eager(case), deferred(case)
    state = torch.get_rng_state()
    before = {path: tensor.is_meta for path, tensor in tensors_of(model)}
    assert str(lateinit.plan(model))
    assert str(lateinit.summary(model))
    assert torch.equal(state, torch.get_rng_state())
    assert {path: tensor.is_meta for path, tensor in tensors_of(model)} == before
    assert_same(expected, lateinit.materialize(model))
