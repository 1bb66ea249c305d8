"""The protocol of pytorch-pfn-extras, ours and, where it is installed, theirs beside it."""

from __future__ import annotations

import copy
import inspect
import pickle
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.parameter import is_lazy

import lateinit
from tests.support.snapshots import assert_same

LAYERS = {
    "LazyLinear": ((10,), (nn.Linear, 3), (2, 3)),
    "LazyConv1d": ((4, 3), (nn.Conv1d, 3), (2, 3, 6)),
    "LazyConv2d": ((4, 3), (nn.Conv2d, 3), (2, 3, 6, 6)),
    "LazyConv3d": ((4, 3), (nn.Conv3d, 3), (2, 3, 6, 6, 6)),
    "LazyBatchNorm1d": ((), (nn.BatchNorm1d, 3), (2, 3)),
    "LazyBatchNorm2d": ((), (nn.BatchNorm2d, 3), (2, 3, 6, 6)),
    "LazyBatchNorm3d": ((), (nn.BatchNorm3d, 3), (2, 3, 6, 6, 6)),
}
BY_LAYER = pytest.mark.parametrize("name", LAYERS)


def lazy(name: str) -> Any:
    return getattr(lateinit.pfn_extras, name)(None, *LAYERS[name][0])


def plain(name: str) -> nn.Module:
    arguments, (cls, size), _ = LAYERS[name]
    return cls(size, *arguments)


def as_plain(module: Any) -> nn.Module:
    """The layer with what belongs to the protocol taken off, to compare with a plain one."""
    for name in ("lazy_parameter_names", "lazy_buffer_names", "_lazy_ready"):
        del module.__dict__[name]
    module._load_state_dict_pre_hooks.clear()
    module.__class__ = module._plain
    return module


@BY_LAYER
def test_with_none_the_size_is_inferred(name: str) -> None:
    torch.manual_seed(0)
    with lateinit.deferred():
        model = nn.Sequential(nn.Linear(2, 2), lazy(name), nn.Linear(2, 2))
    lateinit.infer_shapes(model[1], torch.empty(LAYERS[name][2], device="meta"))
    assert isinstance(model[1], plain(name).__class__)
    assert model[1].lazy_parmeters_determined
    torch.manual_seed(0)
    twin = nn.Sequential(nn.Linear(2, 2), plain(name), nn.Linear(2, 2))
    model[1] = as_plain(lateinit.materialize(model)[1])
    assert_same(twin, model)


@BY_LAYER
def test_with_a_size_it_is_an_ordinary_layer(name: str) -> None:
    arguments, (_, size), shape = LAYERS[name]
    torch.manual_seed(0)
    layer = getattr(lateinit.pfn_extras, name)(size, *arguments)
    assert layer.lazy_parameters_determined
    torch.manual_seed(0)
    assert_same(plain(name), as_plain(copy.deepcopy(layer)))
    layer(torch.ones(shape))
    layer.load_state_dict(copy.deepcopy(layer).state_dict())


@BY_LAYER
def test_the_first_forward_initialises_the_very_parameters(name: str) -> None:
    layer = lazy(name)
    held = list(layer.parameters())
    assert not layer.lazy_parmeters_determined
    torch.manual_seed(2)
    layer(torch.ones(LAYERS[name][2]))
    torch.manual_seed(2)
    twin = plain(name)
    twin(torch.ones(LAYERS[name][2]))
    for found, expected in zip(layer.parameters(), twin.parameters(), strict=True):
        assert torch.equal(found, expected)
    assert all(p is h for p, h in zip(layer.parameters(), held, strict=True))


@BY_LAYER
def test_state_dicts_in_four_combinations(name: str) -> None:
    ready, other, uninitialised = lazy(name), lazy(name), lazy(name)
    ready(torch.ones(LAYERS[name][2]))
    other(torch.ones(LAYERS[name][2]))
    assert not set(uninitialised.lazy_parameter_names) & set(uninitialised.state_dict())
    other.load_state_dict(ready.state_dict())
    assert torch.equal(other.weight, ready.weight)
    with pytest.raises(RuntimeError, match=r"Can't load uninitialized (parameters|buffers)"):
        ready.load_state_dict(uninitialised.state_dict())
    uninitialised.load_state_dict(lazy(name).state_dict())
    assert is_lazy(uninitialised.weight)
    uninitialised.load_state_dict(ready.state_dict())
    assert uninitialised.lazy_parmeters_determined
    assert torch.equal(uninitialised.weight, ready.weight)


def test_state_dicts_work_inside_other_modules() -> None:
    one, two = (nn.Sequential(lazy("LazyLinear")) for _ in range(2))
    assert list(one.state_dict()) == []
    one(torch.ones(1, 3))
    two.load_state_dict(one.state_dict())
    assert torch.equal(two[0].weight, one[0].weight)


@BY_LAYER
def test_states_of_the_original_load_here(name: str) -> None:
    theirs = pytest.importorskip("pytorch_pfn_extras").nn
    arguments, _, shape = LAYERS[name]
    if name.startswith("LazyBatchNorm") and len(shape) > 2:
        return  # the original takes the wrong dim
    original = getattr(theirs, name)(None, *arguments)
    original(torch.ones(shape))
    layer = lazy(name)
    layer.load_state_dict(original.state_dict())
    assert torch.equal(layer.weight, original.weight)


def test_batch_norm_takes_the_channel_dim_where_the_original_takes_the_last() -> None:
    layer = lateinit.pfn_extras.LazyBatchNorm2d(None)
    layer(torch.ones(2, 3, 5, 4))
    assert layer.num_features == 3


@BY_LAYER
def test_what_is_known_is_checked(name: str) -> None:
    state = {k: torch.ones(7, *v.shape[1:]) for k, v in plain(name).state_dict().items()}
    if name.startswith("LazyBatchNorm"):
        return  # nothing is known there
    with pytest.raises(RuntimeError, match="dim 0 must be"):
        lazy(name).load_state_dict(state)


@pytest.mark.parametrize("again", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
@BY_LAYER
def test_it_survives_copies(name: str, again: Any) -> None:
    layer = again(lazy(name))
    layer(torch.ones(LAYERS[name][2]))
    assert again(layer).lazy_parmeters_determined


@BY_LAYER
def test_signatures_are_those_of_the_original(name: str) -> None:
    theirs = pytest.importorskip("pytorch_pfn_extras").nn
    ours = list(inspect.signature(getattr(lateinit.pfn_extras, name)).parameters)
    assert ours[0] == next(iter(inspect.signature(getattr(theirs, name)).parameters))


class Scale(lateinit.pfn_extras.LazyInitializationMixin, nn.Module):
    """Written as for the original's mixin."""

    lazy_parameter_names = ("weight",)
    lazy_buffer_names = ("seen",)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if isinstance(self.weight, lateinit.pfn_extras.UninitializedParameter):
            self.weight = nn.Parameter(self.weight.new_empty(x.shape[-1]))
            self.seen = torch.zeros(x.shape[-1])
            nn.init.normal_(self.weight)
        return x * self.weight + self.seen


def test_code_written_for_the_mixin_runs() -> None:
    module = Scale()
    held = module.weight
    assert not module.lazy_parmeters_determined
    assert "weight" not in module.state_dict()
    module(torch.ones(2, 3))
    assert module.weight is held
    assert module.lazy_parameters_determined
    other = Scale()
    other.load_state_dict(module.state_dict())
    assert torch.equal(other.weight, module.weight)
    assert other.seen.shape == (3,)
    with pytest.raises(RuntimeError, match="Can't load uninitialized"):
        module.load_state_dict(Scale().state_dict())
    Scale().load_state_dict(Scale().state_dict())


def test_code_written_for_the_mixin_draws_at_its_place_in_a_block() -> None:
    torch.manual_seed(0)
    with lateinit.deferred():
        model = nn.Sequential(nn.Linear(2, 3), Scale(), nn.Linear(3, 2))
    lateinit.infer_shapes(model, torch.ones(1, 2))
    lateinit.materialize(model)
    torch.manual_seed(0)
    first, weight, last = nn.Linear(2, 3), torch.empty(3).normal_(), nn.Linear(3, 2)
    assert torch.equal(model[0].weight, first.weight)
    assert torch.equal(model[1].weight, weight)
    assert torch.equal(model[2].weight, last.weight)


def test_an_optimizer_that_is_built_too_early_warns_and_still_trains() -> None:
    module = Scale()
    with pytest.warns(UserWarning, match="Use of uninitialized lazy parameter in Optimizer"):
        optimizer = torch.optim.SGD(module.parameters(), lr=0.5)
    module(torch.ones(2, 3)).sum().backward()
    before = module.weight.detach().clone()
    optimizer.step()
    assert torch.equal(module.weight, before - 0.5 * module.weight.grad)
    # The others keep their objects too, and do not warn.
    torch.optim.SGD(lateinit.nn.LazyLinear(3).parameters(), lr=0.5)


def test_layers_of_the_original_draw_at_their_place_in_a_block() -> None:
    theirs = pytest.importorskip("pytorch_pfn_extras").nn
    torch.manual_seed(0)
    with lateinit.deferred():
        model = nn.Sequential(nn.Linear(2, 3), theirs.LazyLinear(None, 4), nn.Linear(4, 2))
    lateinit.infer_shapes(model, torch.ones(1, 2))
    lateinit.materialize(model)
    torch.manual_seed(0)
    twin = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 4), nn.Linear(4, 2))
    for found, expected in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(found, expected)


@BY_LAYER
def test_resetting_an_uninitialised_layer_does_nothing(name: str) -> None:
    layer = lazy(name)
    before = torch.get_rng_state()
    layer.reset_parameters()
    assert torch.equal(before, torch.get_rng_state())
    layer(torch.ones(LAYERS[name][2]))
    nn.init.constant_(layer.weight, 9)
    layer.reset_parameters()
    assert not torch.equal(layer.weight, torch.full_like(layer.weight, 9))
