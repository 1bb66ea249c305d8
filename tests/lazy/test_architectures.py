"""Law 4 on the architectures that people declare lazily."""

from __future__ import annotations

import pytest
import torch

import lateinit
from tests.support.lazy_architectures import ARCHITECTURES, inputs_of
from tests.support.lazy_models import Layers
from tests.support.snapshots import assert_same
from tests.support.twins import deferred, eager

WIDTH = 6


@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
def test_a_lazily_declared_architecture_equals_its_eager_twin(name: str) -> None:
    make, _ = ARCHITECTURES[name]
    twin = eager(lambda: make(Layers(lazy=False), WIDTH))
    after = torch.get_rng_state()
    model = deferred(lambda: make(Layers(lazy=True), WIDTH))
    assert lateinit.infer_shapes(model, *inputs_of(name, "meta")) == []
    lateinit.settle_rng(model)
    assert torch.equal(torch.get_rng_state(), after)
    assert_same(twin, lateinit.materialize(model))


@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
def test_a_real_dry_run_gives_it_the_same_shapes(name: str) -> None:
    make, _ = ARCHITECTURES[name]
    model, twin = make(Layers(lazy=True), WIDTH), make(Layers(lazy=False), WIDTH)
    with torch.no_grad():
        model.eval()(*inputs_of(name, "cpu"))
    assert [p.shape for p in model.parameters()] == [p.shape for p in twin.parameters()]
