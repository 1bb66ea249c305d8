"""Law 4, lazy parity, for every lazy layer: the eager twin's bits, objects and attributes."""

from __future__ import annotations

import copy
import inspect
import pickle
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.parameter import is_lazy

import lateinit
from lateinit._lazy import mixin
from lateinit._lazy.layers import LAYERS
from tests.support.lazy_cases import CASES, LazyCase
from tests.support.snapshots import assert_same

# torch says so once a process, whoever is first.
pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections:UserWarning")

BY_CASE = pytest.mark.parametrize("case", CASES, ids=str)


def between(layer: nn.Module) -> nn.ModuleList:
    return nn.ModuleList([layer, nn.Linear(3, 3)])


def eager_twin(case: LazyCase) -> nn.ModuleList:
    torch.manual_seed(0)
    first = nn.Linear(2, 2)
    return between(case.eager).append(first)


def lazy_model(case: LazyCase) -> nn.ModuleList:
    """The same model; what is drawn before and after the lazy layer shows where it draws."""
    torch.manual_seed(0)
    with lateinit.deferred():
        first = nn.Linear(2, 2)
        return between(case.lazy).append(first)


def initialised(case: LazyCase) -> nn.ModuleList:
    model = lazy_model(case)
    if case.layer == "AdaptiveLogSoftmaxWithLoss":  # its forward itself looks at values
        lateinit.infer_shapes(model[0], *case.inputs("cpu"), real=True)
    else:
        lateinit.infer_shapes(model[0], *case.inputs())
    return model


@BY_CASE
def test_a_deferred_lazy_layer_equals_its_eager_twin(case: LazyCase) -> None:
    model = initialised(case)
    assert type(model[0]) is type(case.eager)
    assert lateinit.is_deferred(model)
    assert_same(eager_twin(case), lateinit.materialize(model))


@BY_CASE
def test_a_lazy_layer_computes_what_its_eager_twin_computes(case: LazyCase) -> None:
    eager, model = eager_twin(case), lateinit.materialize(initialised(case))
    inputs = case.inputs("cpu")
    for ours, theirs in zip(outputs(model[0](*inputs)), outputs(eager[0](*inputs)), strict=True):
        assert torch.equal(ours, theirs)


def outputs(result: object) -> list[torch.Tensor]:
    if isinstance(result, torch.Tensor):
        return [result]
    return [t for part in result if part is not None for t in outputs(part)]


@BY_CASE
def test_outside_a_block_the_first_forward_initialises_as_the_plain_class_does(
    case: LazyCase,
) -> None:
    torch.manual_seed(7)
    layer = case.lazy
    held = list(layer.parameters())
    first = layer(*case.inputs("cpu"))
    after = torch.get_rng_state()
    torch.manual_seed(7)
    eager = case.eager
    expected = eager(*case.inputs("cpu"))
    assert_same(eager, layer)
    assert torch.equal(after, torch.get_rng_state())
    for ours, theirs in zip(outputs(first), outputs(expected), strict=True):
        assert torch.equal(ours, theirs)
    for parameter in layer.parameters():
        assert any(parameter is other for other in held)


@BY_CASE
def test_construction_draws_and_allocates_nothing(case: LazyCase) -> None:
    before = torch.get_rng_state()
    layer = case.lazy
    assert torch.equal(before, torch.get_rng_state())
    assert all(is_lazy(t) for t in (*layer.parameters(), *layer.buffers()))
    assert isinstance(layer, type(case.eager))


@BY_CASE
def test_a_lazy_layer_survives_pickling_and_copying_before_its_first_input(case: LazyCase) -> None:
    layer = case.lazy
    for other in (pickle.loads(pickle.dumps(layer)), copy.deepcopy(layer)):
        torch.manual_seed(7)
        other(*case.inputs("cpu"))
        torch.manual_seed(7)
        eager = case.eager
        eager(*case.inputs("cpu"))
        assert_same(eager, other)
    assert layer.has_uninitialized_params() or not list(case.eager.state_dict())


@BY_CASE
def test_a_deferred_lazy_layer_survives_pickling_and_copying(case: LazyCase) -> None:
    if case.layer == "AdaptiveLogSoftmaxWithLoss":
        return
    for again in (lambda m: pickle.loads(pickle.dumps(m)), copy.deepcopy):
        before = again(lazy_model(case))
        lateinit.infer_shapes(before[0], *case.inputs())
        assert_same(eager_twin(case), lateinit.materialize(before))
        assert_same(eager_twin(case), lateinit.materialize(again(initialised(case))))


@BY_CASE
def test_state_dicts_load_in_the_combinations_that_make_sense(case: LazyCase) -> None:
    eager = case.eager
    state = eager.state_dict()
    layer = case.lazy
    if state:
        layer.load_state_dict(state)
        assert type(layer) is type(eager)
        assert_same(eager, layer)
        with pytest.raises(RuntimeError, match="uninitialised state cannot be loaded"):
            layer.load_state_dict(case.lazy.state_dict())
    other = case.lazy
    other.load_state_dict(case.lazy.state_dict())
    assert all(is_lazy(t) for t in (*other.parameters(), *other.buffers()))
    other(*case.inputs("cpu"))
    other.load_state_dict(eager.state_dict())


@BY_CASE
def test_a_checkpoint_loaded_into_a_deferred_lazy_layer_leaves_the_rest_as_it_was(
    case: LazyCase,
) -> None:
    eager, model = eager_twin(case), lazy_model(case)
    if not eager[0].state_dict():
        return
    with torch.no_grad():
        for parameter in eager[0].parameters():
            parameter.add_(1)
    model[0].load_state_dict(eager[0].state_dict())
    assert_same(eager, lateinit.materialize(model))


@BY_CASE
def test_what_is_cast_before_its_shape_is_known_holds_the_cast_values(case: LazyCase) -> None:
    if case.layer == "AdaptiveLogSoftmaxWithLoss":
        return
    model = lazy_model(case).double()
    inputs = [x.double() for x in case.inputs()]
    lateinit.infer_shapes(model[0], *inputs)
    assert_same(eager_twin(case).double(), lateinit.materialize(model))


def test_every_layer_of_torch_that_is_lazy_is_lazy_here() -> None:
    ours = {layer.__name__ for layer in LAYERS}
    theirs = {name for name in dir(nn) if name.startswith("Lazy")}
    assert theirs <= ours


def test_every_layer_has_a_case() -> None:
    assert {layer.__name__ for layer in LAYERS} == {f"Lazy{case.layer}" for case in CASES}


@pytest.mark.parametrize("name", sorted(n for n in dir(nn) if n.startswith("Lazy")), ids=str)
def test_signatures_are_those_of_torch(name: str) -> None:
    ours = inspect.signature(getattr(lateinit.nn, name)).parameters
    theirs = inspect.signature(getattr(nn, name)).parameters
    if theirs.keys() == {"args", "kwargs"} or "kwargs" in theirs:
        return
    assert list(ours)[: len(theirs)] == list(theirs)
    for parameter in theirs:
        assert ours[parameter].default == theirs[parameter].default


def test_law_4_fails_where_a_layer_draws_at_another_place(monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES[0]
    model = initialised(case)
    elsewhere = SimpleNamespace(hole_of=lambda module: None, close=mixin.holes.close)
    monkeypatch.setattr(mixin, "holes", elsewhere)
    with pytest.raises(AssertionError, match="bits"):
        assert_same(eager_twin(case), lateinit.materialize(_elsewhere(case)))
    monkeypatch.undo()
    assert_same(eager_twin(case), lateinit.materialize(model))


def _elsewhere(case: LazyCase) -> nn.Module:
    """The layer alone of a model that was initialised as if it had no place of its own."""
    model = lazy_model(case)
    lateinit.infer_shapes(model[0], *case.inputs())
    twin = eager_twin(case)
    model[1], model[2] = twin[1], twin[2]
    return model


@pytest.mark.parametrize("block", [True, False])
@pytest.mark.parametrize(
    "take_out",
    [
        lambda layer: setattr(layer, "bias", None),
        lambda layer: layer.register_parameter("bias", None),
        lambda layer: delattr(layer, "bias"),
    ],
)
def test_what_was_taken_out_of_a_lazy_layer_does_not_come_back(take_out: Any, block: bool) -> None:
    def build(lazy: bool) -> nn.Module:
        first = lateinit.nn.LazyLinear(3) if lazy else nn.Linear(5, 3)
        take_out(first)
        return nn.Sequential(first, nn.Linear(3, 2))

    torch.manual_seed(0)
    twin = build(lazy=False)
    torch.manual_seed(0)
    model = lateinit.deferred_init(build, True) if block else build(lazy=True)
    example = torch.empty(2, 5, device="meta")
    torch.manual_seed(0)
    if hasattr(model[0], "bias"):
        lateinit.infer_shapes(model, example)
    else:  # whose forward fails, as the twin's does
        model[0].initialize_parameters(example)
    lateinit.materialize(model)
    assert vars(twin[0])["_parameters"].keys() == vars(model[0])["_parameters"].keys()
    assert getattr(model[0], "bias", None) is None
    assert torch.equal(twin[0].weight, model[0].weight)
    assert not block or torch.equal(twin[1].weight, model[1].weight)


@pytest.mark.filterwarnings("ignore:Casting complex values to real")
def test_a_cast_reaches_complex_buffers_as_it_does_eagerly() -> None:
    class Rotated(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(width, 6))
            self.register_buffer("turn", torch.randn(2, dtype=torch.complex64))
            self.register_buffer("steps", torch.arange(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ self.weight

    torch.manual_seed(0)
    twin = Rotated(5).to(torch.float16)
    torch.manual_seed(0)
    model = lateinit.deferred_init(lateinit.lazy(Rotated, width=lateinit.size(-1)))
    model.to(torch.float16)
    lateinit.infer_shapes(model, torch.empty(2, 5, dtype=torch.float16, device="meta"))
    assert_same(twin, lateinit.materialize(model))


@pytest.mark.parametrize("name", sorted(n for n in dir(nn) if n.startswith("Lazy")), ids=str)
def test_a_lazy_layer_is_an_instance_of_torchs_until_it_is_a_plain_one(name: str) -> None:
    case = next(case for case in CASES if f"Lazy{case.layer}" == name)
    layer = case.lazy
    assert isinstance(layer, getattr(nn, name))
    assert isinstance(layer, nn.modules.lazy.LazyModuleMixin)
    layer(*case.inputs("cpu"))
    assert type(layer) is type(case.eager)


@BY_CASE
def test_resetting_a_lazy_layer_does_nothing_as_with_torchs(case: LazyCase) -> None:
    torch.manual_seed(7)
    layer = case.lazy
    before = torch.get_rng_state()

    def reset(module: nn.Module) -> None:
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()

    nn.Sequential(copy.deepcopy(layer), layer).apply(reset)
    assert torch.equal(before, torch.get_rng_state())
    layer(*case.inputs("cpu"))
    torch.manual_seed(7)
    eager = case.eager
    eager(*case.inputs("cpu"))
    assert_same(eager, layer)
    layer.apply(reset)
    eager.apply(reset)
    assert hasattr(layer, "reset_parameters") == hasattr(eager, "reset_parameters")


class Resets(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.Linear(width, 2)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.ones_(self.inner.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x)


def test_a_lazy_version_of_a_class_is_reset_once_it_has_its_size() -> None:
    block = lateinit.lazy(Resets, width=lateinit.size(-1))()
    block.reset_parameters()
    block.inner.reset_parameters()
    block = pickle.loads(pickle.dumps(copy.deepcopy(block)))
    block(torch.ones(1, 3))
    assert torch.equal(block.inner.weight, torch.ones(2, 3))
    assert "reset_parameters" not in vars(block.inner)
    block.inner.reset_parameters()
    assert not torch.equal(block.inner.weight, torch.ones(2, 3))
    block.reset_parameters()
    assert torch.equal(block.inner.weight, torch.ones(2, 3))
