"""Law 5, load: a state dict over a deferred model gives what it gives the eager twin."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import torch
from torch import nn

import lateinit
from tests.support.building import deferred, eager, models
from tests.support.snapshots import assert_same

if TYPE_CHECKING:
    from tests.support.cases import Case


def other_values(model: nn.Module) -> dict[str, torch.Tensor]:
    """A checkpoint for `model` with the same ties and none of the same floating-point values."""
    return {
        name: tensor.clone() if tensor.dtype.itemsize == 1 else tensor.clone().mul_(3)
        for name, tensor in model.state_dict().items()
    }


@models(lambda case: case.loads)
def test_state_dict_loaded_over_a_deferred_model_is_really_loaded(case: Case) -> None:
    expected, model = eager(case), deferred(case)
    state = other_values(expected)
    expected.load_state_dict(state)
    model.load_state_dict(state)
    assert_same(expected, lateinit.materialize(model))


@models(lambda case: case.loads)
def test_what_a_state_dict_lacks_has_its_initial_value(case: Case) -> None:
    expected, model = eager(case), deferred(case)
    state = dict(list(other_values(expected).items())[::2])
    expected.load_state_dict(state, strict=False)
    model.load_state_dict(state, strict=False)
    assert_same(expected, lateinit.materialize(model))


@models(lambda case: case.loads)
def test_state_dict_assigned_to_a_deferred_model_is_kept(case: Case) -> None:
    expected, model = eager(case), deferred(case)
    state = other_values(expected)
    expected.load_state_dict(state, assign=True)
    model.load_state_dict(copy.deepcopy(state), assign=True)
    assert_same(expected, lateinit.materialize(model))
