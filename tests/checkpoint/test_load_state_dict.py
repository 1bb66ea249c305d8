"""Between recording and materialising: models are loaded, copied, and sent elsewhere."""

from __future__ import annotations

import copy
import io
import pickle
from typing import TYPE_CHECKING

import pytest
import torch
from torch import nn

import lateinit
from lateinit.errors import (
    DeferredTensorError,
    LateinitError,
)
from tests.support.models import MODELS
from tests.support.snapshots import assert_same, snapshot
from tests.support.twins import TwoViews, assert_untouched, run_alone, still_deferred, twins

if TYPE_CHECKING:
    from pathlib import Path


# -- state dicts -----------------------------------------------------------------------------------


def other_state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach() * 3 + 1 for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("assign", [False, True], ids=["copied", "assigned"])
def test_strict_loading_truly_loads(assign: bool) -> None:
    eager, model = twins()
    state = other_state(eager)
    result = model.load_state_dict(copy.deepcopy(state), assign=assign)
    eager.load_state_dict(state, assign=assign)
    assert not result.missing_keys
    assert still_deferred(model) == ["table"]
    assert_same(eager, lateinit.materialize(model))


@pytest.mark.parametrize("assign", [False, True], ids=["copied", "assigned"])
def test_partial_loading_leaves_the_rest_to_be_initialised(assign: bool) -> None:
    eager, model = twins()
    state = {name: t for name, t in other_state(eager).items() if name.startswith("dec.")}
    result = model.load_state_dict(copy.deepcopy(state), strict=False, assign=assign)
    expected = eager.load_state_dict(state, strict=False, assign=assign)
    assert result == expected
    assert not [path for path in still_deferred(model) if path.startswith("dec.")]
    assert_same(eager, lateinit.materialize(model))


def test_strict_loading_of_a_part_raises_as_torch_does() -> None:
    eager, model = twins()
    state = {"dec.bias": torch.ones(4), "odd": torch.ones(1)}
    for twin in (eager, model):
        with pytest.raises(RuntimeError, match=r'Missing key\(s\)[\s\S]*"enc\.weight"'):
            twin.load_state_dict(state)
    assert_same(eager, lateinit.materialize(model))


@pytest.mark.parametrize("assign", [False, True], ids=["copied", "assigned"])
def test_loading_of_a_wrong_shape_raises_as_torch_does(assign: bool) -> None:
    eager, model = twins()
    state = {**other_state(eager), "enc.bias": torch.ones(9)}
    for twin in (eager, model):
        with pytest.raises(RuntimeError, match=r"size mismatch for enc\.bias: .*\[9\].*\[8\]"):
            twin.load_state_dict(copy.deepcopy(state), assign=assign)
    assert lateinit.is_deferred(model.enc.bias)
    assert_same(eager, lateinit.materialize(model))


def test_loading_casts_to_the_dtype_of_the_model() -> None:
    eager, model = twins()
    state = {name: tensor.double() for name, tensor in other_state(eager).items()}
    for twin in (eager, model):
        twin.load_state_dict(state)
    assert_same(eager, lateinit.materialize(model))


def test_foreign_module_that_holds_a_deferred_parameter_truly_loads() -> None:
    eager, model = twins()
    foreign, expected = nn.Linear(4, 8), nn.Linear(4, 8)
    foreign.weight, expected.weight = model.enc.weight, eager.enc.weight
    state = other_state(expected)
    for twin in (foreign, expected):
        twin.load_state_dict(state)
    assert model.enc.weight is foreign.weight
    assert_same(expected, foreign)
    assert_same(eager, lateinit.materialize(model))


def test_foreign_module_that_holds_a_deferred_buffer_truly_loads() -> None:
    eager, model = twins()
    foreign = nn.Module()
    foreign.register_buffer("mine", model.table)
    foreign.load_state_dict({"mine": torch.full((4,), 9.0)})
    eager.table.fill_(9)
    assert_same(eager, lateinit.materialize(model))


def test_state_dict_on_meta_is_refused_and_never_taken_for_values() -> None:
    eager, model = twins()
    state = {name: t.to("meta") for name, t in eager.state_dict().items()}
    with pytest.raises(RuntimeError, match=r"enc\.weight[\s\S]*meta|enc\.weight[\s\S]*no values"):
        model.load_state_dict(state)
    assert_same(eager, lateinit.materialize(model))


def test_deferred_state_dict_does_not_load_into_a_real_model() -> None:
    eager, model = twins()
    before = snapshot(eager)
    with pytest.raises(RuntimeError, match=r"enc\.weight[\s\S]*lateinit\.materialize"):
        eager.load_state_dict(model.state_dict())
    assert_same(before, snapshot(eager))
    assert_untouched(eager, model)


def test_loading_by_swapping_truly_loads_or_raises() -> None:
    eager, model = twins()
    state = other_state(eager)
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        model.load_state_dict(state)
    except RuntimeError:
        assert_same(eager, lateinit.materialize(model))
    else:
        eager.load_state_dict(state)
        assert_same(eager, lateinit.materialize(model))
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


def test_copying_values_into_a_deferred_parameter_gives_it_those() -> None:
    eager, model = twins()
    for twin in (eager, model):
        with torch.no_grad():
            twin.dec.weight.copy_(torch.ones(4, 8))
        twin.dec.bias.data.copy_(torch.arange(4.0))
    assert not lateinit.is_deferred(model.dec.weight)
    assert_same(eager, lateinit.materialize(model))


# -- optimizers, copies, other processes -----------------------------------------------------------


def test_optimizer_built_over_deferred_parameters_steps_over_real_ones() -> None:
    eager, model = twins()
    optimizers = [
        torch.optim.AdamW(
            [
                {"params": [p for p in twin.parameters() if p.dim() > 1], "weight_decay": 0.1},
                {"params": [p for p in twin.parameters() if p.dim() <= 1], "lr": 0.5},
            ]
        )
        for twin in (eager, model)
    ]
    lateinit.materialize(model)
    inputs = torch.randn(6, 4)
    for _ in range(3):
        for twin, optimizer in zip((eager, model), optimizers, strict=True):
            optimizer.zero_grad()
            twin(inputs).square().sum().backward()
            optimizer.step()
    assert_same(eager, model)


def test_gradient_of_a_deferred_parameter_is_not_lost_in_silence() -> None:
    def build() -> nn.Module:
        layer = nn.Linear(2, 2)
        layer.weight.sum().backward()
        return layer

    eager, model = twins(build)
    try:
        lateinit.materialize(model)
    except LateinitError:
        return
    assert torch.equal(eager.weight.grad, model.weight.grad)


def test_parameter_can_be_swapped_as_a_real_one_can() -> None:
    _, model = twins()
    parameter, ones = model.enc.weight, nn.Parameter(torch.ones(8, 4))
    torch.utils.swap_tensors(parameter, ones)
    assert torch.equal(parameter.detach(), torch.ones(8, 4))
    assert lateinit.is_deferred(ones)


SENT = """
import pickle, sys, warnings
import torch
import lateinit
from tests.support.models import MODELS
from tests.support.models import MODELS
from tests.support.snapshots import first_difference, snapshot

warnings.simplefilter("ignore", FutureWarning)  # the old weight_norm
torch.manual_seed(99)
with open(sys.argv[1], "rb") as file:
    sent = pickle.load(file)
for name, model in sent.items():
    lateinit.materialize(model)
    case = next(case for case in MODELS if case.name == name)
    torch.manual_seed(0)
    difference = first_difference(snapshot(case.build()), snapshot(model))
    if difference is not None:
        print(name, difference)
"""


def test_deferred_models_can_be_materialised_in_another_process(tmp_path: Path) -> None:
    sent = {}
    for case in MODELS:
        # What is inside a graph or was made in inference mode is pickled as a plain leaf.
        if case.pickles and case.deepcopies and case.trains:
            torch.manual_seed(0)
            sent[case.name] = lateinit.deferred_init(case.build)
    assert len(sent) > 90
    path = tmp_path / "models.pickle"
    path.write_bytes(pickle.dumps(sent))
    assert run_alone(SENT, str(path)) == ""


class Counted(nn.Module):
    """A batch norm that has counted a batch in the constructor."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3)
        self.norm(torch.arange(6.0).view(2, 3))


@pytest.mark.parametrize("assign", [False, True], ids=["copied", "assigned"])
def test_counter_that_a_state_dict_lacks_is_what_it_was(assign: bool) -> None:
    eager, model = twins(Counted)
    for twin in (eager, model):
        state = {"norm.weight": torch.ones(3)}
        twin.load_state_dict(state, strict=False, assign=assign)
    assert_same(eager, lateinit.materialize(model))


def test_counter_of_a_lazy_layer_may_be_lacking_too() -> None:
    layer = lateinit.deferred_init(lateinit.nn.LazyBatchNorm1d)
    assert layer.load_state_dict({"weight": torch.ones(6)}, strict=False).missing_keys == [
        "bias",
        "running_mean",
        "running_var",
    ]
    assert_same(nn.BatchNorm1d(6), lateinit.materialize(layer))


class TwoHalves(nn.Module):
    """Two parameters on one storage."""

    def __init__(self) -> None:
        super().__init__()
        whole = torch.randn(6)
        self.first, self.last = nn.Parameter(whole[:3]), nn.Parameter(whole[3:])


def test_pickle_of_half_a_shared_memory_is_refused() -> None:
    eager, model = twins(TwoHalves)
    lateinit.materialize(model.first)
    with pytest.raises(DeferredTensorError, match=r"cannot pickle.*shared.*materialise the rest"):
        pickle.dumps(model)
    assert_same(eager, lateinit.materialize(model))


def test_pickle_of_half_a_shared_table_has_the_other_half() -> None:
    eager, model = twins(TwoViews)
    lateinit.materialize(model.real)
    back = lateinit.materialize(pickle.loads(pickle.dumps(model))).state_dict()
    for name, value in eager.state_dict().items():
        assert torch.equal(back[name], value)


def test_copied_model_can_be_saved_by_torch_too() -> None:
    eager, model = twins()
    copied, file = copy.deepcopy(model), io.BytesIO()
    torch.save(copied, file)  # by protocol 2, which cannot say torch.preserve_format
    file.seek(0)
    assert_same(eager, lateinit.materialize(torch.load(file, weights_only=False)))


def complex_parameter() -> nn.Module:
    model = nn.Module()
    model.both = nn.Parameter(torch.randn(3, 5, dtype=torch.complex64))
    return model


@pytest.mark.parametrize("name", ["data", "T", "mT", "H", "mH", "real", "imag"])
def test_attribute_that_is_a_view_cannot_be_written_to_unseen(name: str) -> None:
    eager, model = twins(complex_parameter)
    view = getattr(model.both.detach(), name)
    view.mul_(2)
    getattr(eager.both.detach(), name).mul_(2)
    lateinit.materialize(model)
    for twin in (eager, model):
        getattr(twin.both.detach(), name).mul_(3)
    assert_same(eager, model)
    assert torch.equal(lateinit.materialize(view), getattr(model.both.detach(), name))


def test_shallow_copy_of_a_model_has_its_very_parameters() -> None:
    eager, model = twins()
    copied = copy.copy(model)
    assert copied.enc.weight is model.enc.weight
    lateinit.materialize(copied)
    assert_same(eager, model)


def test_shallow_copy_of_a_parameter_shares_its_memory() -> None:
    eager, model = twins()
    copied = copy.copy(model.enc.weight)
    assert isinstance(copied, nn.Parameter)
    lateinit.materialize(model)
    lateinit.materialize(copied)
    assert type(copied) is nn.Parameter
    assert copied.data_ptr() == model.enc.weight.data_ptr()
    assert torch.equal(copied, eager.enc.weight)


def test_saving_a_deferred_state_dict_with_torch_saves_the_program(tmp_path: Path) -> None:
    eager, model = twins()
    torch.save(model.state_dict(), tmp_path / "state.pt")
    with pytest.raises(pickle.UnpicklingError, match="lateinit"):
        torch.load(tmp_path / "state.pt", weights_only=True)
    loaded = torch.load(tmp_path / "state.pt", weights_only=False)
    assert lateinit.is_deferred(loaded)
    lateinit.materialize(loaded)
    for name, tensor in eager.state_dict().items():
        assert torch.equal(loaded[name], tensor), name
    assert loaded["enc.weight"].data_ptr() == loaded["tied.weight"].data_ptr()
    assert_untouched(eager, model)
