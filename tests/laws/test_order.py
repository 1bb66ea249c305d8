"""Law 2, order: parts in any order, in any number of calls, give the bits of the whole."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

import pytest
import torch

import lateinit
from tests.support.building import SEED, deferred, eager, models
from tests.support.models import MODELS
from tests.support.snapshots import assert_same, snapshot, tensors_of

if TYPE_CHECKING:
    from tests.support.cases import Case


def shuffled(things: list[Any], order: int) -> list[Any]:
    return random.Random(order).sample(things, len(things))


@pytest.mark.parametrize("order", range(2))
@models()
def test_names_in_any_order_give_the_same_bits(case: Case, order: int) -> None:
    model = deferred(case)
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    names += [name for name, _ in model.named_buffers(remove_duplicate=False)]
    for name in shuffled(names, order):
        lateinit.materialize(model, only=[name])
        owner, _, last = name.rpartition(".")
        assert not lateinit.is_deferred(getattr(model.get_submodule(owner), last))
    assert_same(eager(case), lateinit.materialize(model))


@pytest.mark.parametrize("order", range(2))
@models()
def test_tensors_in_any_order_give_the_same_bits(case: Case, order: int) -> None:
    model = deferred(case)
    for _, tensor in shuffled(tensors_of(model), order):
        assert lateinit.materialize(tensor) is tensor
    assert_same(eager(case), model)


@models()
def test_submodules_in_any_order_give_the_same_bits(case: Case) -> None:
    model = deferred(case)
    for module in shuffled(list(model.modules()), 0):
        lateinit.materialize(module)
    assert_same(eager(case), model)


@models()
def test_tensors_recorded_side_by_side_do_not_disturb_each_other(case: Case) -> None:
    torch.manual_seed(SEED)
    expected = [MODELS[0].build(), case.build(), MODELS[0].build()]
    torch.manual_seed(SEED)
    with lateinit.deferred():
        first = MODELS[0].build()
        middle = case.build()
        last = MODELS[0].build()
    for model in (last, middle, first):
        lateinit.materialize(model)
    for twin, model in zip(expected, (first, middle, last), strict=True):
        assert_same(twin, model)


@models()
def test_materialising_again_changes_nothing(case: Case) -> None:
    model = lateinit.materialize(deferred(case))
    with torch.inference_mode(mode=any(t.is_inference() for _, t in tensors_of(model))):
        for parameter in model.parameters():
            parameter.data.zero_()
    changed = snapshot(model)
    assert_same(changed, lateinit.materialize(model))
