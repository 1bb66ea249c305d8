"""Law 8, identity: objects stay the objects they were, and copies are their own."""

from __future__ import annotations

import copy
import pickle
from typing import TYPE_CHECKING

import pytest
import torch

import lateinit
from lateinit.errors import DeferredTensorError
from tests.support.building import deferred, eager, models, step, trainable
from tests.support.models import MODELS
from tests.support.snapshots import assert_same, tensors_of

if TYPE_CHECKING:
    from tests.support.cases import Case


@models()
def test_objects_stay_the_objects_they_were(case: Case) -> None:
    model = deferred(case)
    before = tensors_of(model)
    lateinit.materialize(model)
    for (path, tensor), (_, after) in zip(before, tensors_of(model), strict=True):
        assert tensor is after, path


@models(lambda case: case.trains)
def test_optimizer_built_before_trains_as_the_eager_twin(case: Case) -> None:
    expected, model = eager(case), deferred(case)
    if not trainable(expected):
        assert not trainable(model)
        return
    optimizers = [
        torch.optim.SGD(trainable(twin), lr=0.1, momentum=0.9) for twin in (expected, model)
    ]
    lateinit.materialize(model)
    for _ in range(2):
        step(expected, optimizers[0])
        step(model, optimizers[1])
    assert_same(expected, model)


@models(lambda case: case.trains)
def test_hooks_set_before_fire_after(case: Case) -> None:
    model = deferred(case)
    fired = []
    for index, parameter in enumerate(trainable(model)):
        parameter.register_hook(lambda _, index=index: fired.append(("gradient", index)))
        parameter.register_post_accumulate_grad_hook(
            lambda _, index=index: fired.append(("accumulated", index))
        )
    lateinit.materialize(model)
    if count := len(trainable(model)):
        step(model, torch.optim.SGD(trainable(model)))
        assert sorted(fired) == [
            (kind, index) for kind in ("accumulated", "gradient") for index in range(count)
        ]


def test_graph_made_in_a_constructor_is_refused_rather_than_cut() -> None:
    case = next(case for case in MODELS if case.name == "attribute_that_is_not_a_leaf")
    expected, model = eager(case), lateinit.materialize(deferred(case))
    expected.normalised.square().sum().backward()
    with pytest.raises(DeferredTensorError, match="its graph was not"):
        model.normalised.square().sum().backward()


@pytest.mark.parametrize("grad", [True, False])
def test_what_a_constructor_computed_can_be_written_in_place_afterwards(grad: bool) -> None:
    case = next(case for case in MODELS if case.name == "attribute_that_is_not_a_leaf")
    expected, model = eager(case), lateinit.materialize(deferred(case))
    with torch.set_grad_enabled(grad):
        for made in (expected, model):
            made.normalised.view(-1)[0] = 2
            made.normalised.mul_(3)
    assert torch.equal(model.normalised, expected.normalised)
    assert (model.normalised.is_leaf, model.normalised.requires_grad) == (False, True)


@models(lambda case: case.deepcopies)
def test_deep_copy_of_a_deferred_model_is_a_model_of_its_own(case: Case) -> None:
    expected, model = eager(case), deferred(case)
    copied = copy.deepcopy(model)
    lateinit.materialize(copied)
    assert_same(copy.deepcopy(expected), copied)
    theirs = {tensor.untyped_storage()._cdata for _, tensor in tensors_of(copied)}
    lateinit.materialize(model)
    assert_same(expected, model)
    ours = {tensor.untyped_storage()._cdata for _, tensor in tensors_of(model)}
    assert not ours & theirs


# What is inside a graph or was made in inference mode comes out of a pickle as a plain leaf.
@models(lambda case: case.pickles and case.deepcopies and case.trains)
def test_pickled_deferred_model_materialises_to_the_same_bits(case: Case) -> None:
    expected, model = eager(case), deferred(case)
    loaded = pickle.loads(pickle.dumps(model))
    assert_same(expected, lateinit.materialize(loaded))
