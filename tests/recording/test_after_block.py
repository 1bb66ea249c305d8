"""Law 9: what cannot be honoured raises, says what to do, and leaves nothing half done."""

from __future__ import annotations

import pickle
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from torch import nn

import lateinit
from lateinit.errors import (
    ConstantChangedError,
    DeferredTensorError,
    NotRecordedError,
    PatternError,
    SeedError,
)
from tests.support.snapshots import assert_same, tensors_of
from tests.support.twins import TwoViews, assert_untouched, still_deferred, twins

if TYPE_CHECKING:
    from collections.abc import Callable


# -- using deferred tensors ------------------------------------------------------------------------


@torch.no_grad()
def add_in_place(model: nn.Module) -> None:
    model.enc.weight.add_(1)


@torch.no_grad()
def zero_a_row(model: nn.Module) -> None:
    model.enc.weight[0].zero_()


@torch.no_grad()
def set_an_item(model: nn.Module) -> None:
    model.enc.weight[0, 0] = 1.0


@torch.no_grad()
def foreach(model: nn.Module) -> None:
    torch._foreach_mul_([model.enc.weight], 2.0)


def step_an_optimizer(model: nn.Module) -> None:
    model.enc.weight.grad = torch.zeros_like(model.enc.weight)
    optimizer = torch.optim.SGD([model.enc.weight], lr=0.1)
    try:
        optimizer.step()
    finally:
        optimizer.zero_grad()


WRITES = {
    "init": lambda model: nn.init.normal_(model.enc.weight, std=0.02),
    "init of a constant": lambda model: nn.init.zeros_(model.enc.weight),
    "data": lambda model: model.enc.weight.data.fill_(1.0),
    "row of data": lambda model: model.enc.weight.data[0].zero_(),
    "detached": lambda model: model.enc.weight.detach().mul_(2),
    "add": add_in_place,
    "row": zero_a_row,
    "item": set_an_item,
    "foreach": foreach,
    "copy of another shape": lambda model: model.enc.weight.data.copy_(torch.zeros(4)),
    "copy of a deferred tensor": lambda model: model.enc.weight.data.copy_(model.dec.weight.T),
    "random": lambda model: model.enc.weight.data.uniform_(),
    "out": lambda model: torch.add(torch.ones(8, 4), 1, out=model.enc.weight.data),
    "optimizer": step_an_optimizer,
}


REFUSED_WRITES = {"init", "random", "out", "copy of another shape", "optimizer"}


@pytest.mark.parametrize("write", sorted(WRITES.keys() - REFUSED_WRITES))
def test_write_after_the_block_is_recorded(write: str) -> None:
    eager, model = twins()
    state = torch.get_rng_state()
    WRITES[write](model)
    assert torch.equal(state, torch.get_rng_state())
    assert lateinit.is_deferred(model.enc.weight)
    WRITES[write](eager)
    assert_same(eager, lateinit.materialize(model))


@pytest.mark.parametrize("write", sorted(REFUSED_WRITES))
def test_write_of_draws_or_real_data_after_the_block_is_refused(write: str) -> None:
    eager, model = twins()
    state = torch.get_rng_state()
    with pytest.raises(
        DeferredTensorError, match=r"'enc\.weight'.* no(?: values|ne) yet.*lateinit\.materialize"
    ):
        WRITES[write](model)
    assert torch.equal(state, torch.get_rng_state())
    assert_untouched(eager, model)


def test_write_that_torch_refuses_on_a_real_parameter_is_refused_by_torch() -> None:
    eager, model = twins()
    with pytest.raises(RuntimeError, match="leaf Variable that requires grad"):
        model.enc.weight.add_(1)
    with pytest.raises(RuntimeError, match="leaf Variable that requires grad"):
        model.enc.weight[0].zero_()
    assert_untouched(eager, model)


READS = {
    "item": lambda model: model.norm.num_batches_tracked.item(),
    "tolist": lambda model: model.table.tolist(),
    "numpy": lambda model: model.table.numpy(),
    "numpy by force": lambda model: model.table.numpy(force=True),
    "asarray": lambda model: np.asarray(model.table),
    "array": lambda model: np.array(model.norm.running_var.cpu()),
    "bool": lambda model: bool(model.norm.num_batches_tracked),
    "int": lambda model: int(model.norm.num_batches_tracked),
    "float": lambda model: float(model.norm.num_batches_tracked),
    "complex": lambda model: complex(model.norm.num_batches_tracked),
    "index": lambda model: [1, 2][model.norm.num_batches_tracked],
    "format": lambda model: f"{model.norm.num_batches_tracked:03d}",
    "equal": lambda model: torch.equal(model.table, model.table),
    "allclose": lambda model: torch.allclose(model.table, model.table),
    "random": lambda model: torch.rand_like(model.table),
    "random on its device": lambda model: torch.rand_like(model.table, device=model.table.device),
    "dropout": lambda model: nn.functional.dropout(model.table),
    "membership": lambda model: 3.0 in model.table,
}


@pytest.mark.filterwarnings("ignore:__array__ implementation")  # of torch.Tensor too
@pytest.mark.parametrize("read", READS)
def test_read_of_what_is_no_parameter_is_answered(read: str) -> None:
    eager, model = twins()
    state = torch.get_rng_state()
    expected, after = READS[read](eager), torch.get_rng_state()
    torch.set_rng_state(state)
    found = READS[read](model)
    assert torch.equal(after, torch.get_rng_state())
    assert np.array_equal(expected, found)
    assert_same(eager, lateinit.materialize(model))


READS_OF_A_PARAMETER = {
    "item": lambda weight: weight[0, 0].item(),
    "tolist": lambda weight: weight.tolist(),
    "numpy": lambda weight: weight.detach().numpy(),
    "numpy by force": lambda weight: weight.numpy(force=True),
    "asarray": np.asarray,
    "bool": lambda weight: bool(weight[0, 0]),
    "format": lambda weight: f"{weight[0, 0]:.2f}",
    "equal": lambda weight: torch.equal(weight, weight),
    "random": torch.rand_like,
    "dropout": nn.functional.dropout,
    "membership": lambda weight: 3.0 in weight,
    "storage": lambda weight: weight.untyped_storage().tolist(),
    "graph": lambda weight: (weight * 1).grad_fn.next_functions,
}


@pytest.mark.parametrize("read", READS_OF_A_PARAMETER)
def test_read_of_a_parameter_outside_the_block_is_refused(read: str) -> None:
    eager, model = twins()
    state = torch.get_rng_state()
    with pytest.raises(DeferredTensorError, match=r"enc\.weight.*lateinit\.materialize"):
        READS_OF_A_PARAMETER[read](model.enc.weight)
    assert torch.equal(state, torch.get_rng_state())
    assert_untouched(eager, model)


def test_no_threads_are_refused_before_anything_is_done() -> None:
    eager, model = twins()
    with pytest.raises(ValueError, match="threads=0: at least one"):
        lateinit.materialize(model, threads=0)
    assert_untouched(eager, model)


def test_item_is_called_item() -> None:
    _, model = twins()
    with pytest.raises(DeferredTensorError, match=r"^item needs the values of"):
        model.enc.weight[0, 0].item()


def test_memory_of_a_deferred_tensor_cannot_be_had() -> None:
    eager, model = twins()
    with pytest.raises((BufferError, DeferredTensorError), match=r"meta|lateinit\.materialize"):
        torch.utils.dlpack.to_dlpack(model.table)
    with pytest.raises(RuntimeError, match=r"only available on CPU|lateinit\.materialize"):
        model.share_memory()
    assert_untouched(eager, model)


def test_read_of_what_was_computed_from_deferred_tensors_is_refused() -> None:
    eager, model = twins()
    total = model.enc.weight.sum()
    with pytest.raises(DeferredTensorError, match=r"deferred tensor .*\(\).*lateinit\.materialize"):
        total.item()
    assert_untouched(eager, model)
    assert torch.equal(lateinit.materialize(total).detach(), eager.enc.weight.sum().detach())


def test_backward_through_deferred_tensors_is_refused_rather_than_forgotten() -> None:
    eager, model = twins()
    with pytest.raises(DeferredTensorError, match=r"lateinit\.materialize"):
        model.enc.weight.sum().backward()
    assert_untouched(eager, model)


FORWARDS = {
    "model": lambda model: model(torch.ones(2, 4)),
    "part": lambda model: model.enc(torch.ones(2, 4)),
    "arithmetic": lambda model: torch.ones(8, 4) * model.enc.weight,
    "copy into a real tensor": lambda model: torch.zeros(8, 4).copy_(model.enc.weight),
    "assignment to a slice": lambda model: torch.zeros(9, 8, 4).__setitem__(0, model.enc.weight),
    "functional": lambda model: nn.functional.linear(torch.ones(2, 4), model.enc.weight),
    "stack": lambda model: torch.stack([torch.ones(8, 4), model.enc.weight]),
}


@pytest.mark.parametrize("forward", FORWARDS.values(), ids=FORWARDS)
def test_arithmetic_with_real_tensors_is_refused(forward: Callable[[nn.Module], object]) -> None:
    eager, model = twins()
    with pytest.raises(
        DeferredTensorError,
        match=r"'(?:enc\.)?(?:weight|bias)' \([48].*real tensors.*no values.*lateinit\.materialize",
    ):
        forward(model)
    assert_untouched(eager, model)


def test_failed_forward_pass_leaves_statistics_alone() -> None:
    eager, model = twins(lambda: nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 2)))
    lateinit.materialize(model, only="0.weight")
    with pytest.raises(DeferredTensorError, match=r"lateinit\.materialize"):
        model(torch.ones(2, 4))
    eager[0].num_batches_tracked += 1  # counted before the op that fails, as eagerly
    assert_same(eager, lateinit.materialize(model))


def test_shapes_can_be_propagated_on_meta() -> None:
    eager, model = twins()
    assert model.eval()(torch.ones(3, 4, device="meta")).shape == (3, 4)
    assert_untouched(eager.eval(), model)


def test_printing_a_deferred_tensor_says_what_it_is() -> None:
    eager, model = twins()
    expected = "<deferred Parameter (8, 4), torch.float32, requires_grad=True>"
    assert repr(model.enc.weight) == str(model.enc.weight) == f"{model.enc.weight}" == expected
    assert repr(model.table) == "<deferred tensor (4), torch.float32>"
    assert_untouched(eager, model)


def test_graph_of_a_constructor_is_refused_and_the_values_stay() -> None:
    def build() -> nn.Module:
        layer = nn.Linear(2, 2)
        layer.scaled = layer.weight * 2
        return layer

    _, model = twins(build)
    lateinit.materialize(model)
    with pytest.raises(DeferredTensorError, match=r"graph was not recorded: compute it again"):
        model.scaled.sum().backward()
    assert torch.equal(model.scaled, model.weight * 2)


# -- asking for what is not there ------------------------------------------------------------------


def test_plain_meta_model_is_refused_by_name() -> None:
    model = nn.Sequential(nn.Linear(2, 2, device="meta"))
    with pytest.raises(
        NotRecordedError, match=r"never recorded: 0\.weight, 0\.bias\..*lateinit\.deferred\(\)"
    ):
        lateinit.materialize(model)
    with pytest.raises(NotRecordedError, match=r"never recorded"):
        lateinit.plan(model)


def test_model_that_is_in_part_plain_meta_is_not_begun() -> None:
    eager, model = twins()
    both = nn.Sequential(model, nn.Linear(2, 2, device="meta"))
    with pytest.raises(NotRecordedError, match=r"never recorded: 1\.weight, 1\.bias\."):
        lateinit.materialize(both)
    assert still_deferred(model) == [path for path, _ in tensors_of(model)]
    lateinit.materialize(both, only="0.*")
    assert_same(eager, model)


def test_unknown_pattern_lists_what_is_near() -> None:
    eager, model = twins()
    with pytest.raises(
        PatternError, match=r"only='\*\.wieght' matches no tensor; there are: .*enc\.weight"
    ):
        lateinit.materialize(model, only="*.wieght")
    with pytest.raises(PatternError, match=r"only='dce\.\*'.*dec\."):
        lateinit.materialize(model, only=["enc.*", "dce.*"])
    for ask in (lateinit.plan, lateinit.summary):
        with pytest.raises(PatternError, match=r"only='nothing'"):
            ask(model, only="nothing")
    assert_untouched(eager, model)


@pytest.mark.parametrize("only", [3, [3], [None]])
def test_selection_of_another_type_is_refused(only: object) -> None:
    eager, model = twins()
    with pytest.raises(TypeError, match=r"only="):
        lateinit.materialize(model, only=only)
    assert_untouched(eager, model)


def test_target_that_can_hold_no_tensor_is_refused() -> None:
    for target in (3, "model.pt", None):
        with pytest.raises(TypeError, match=r"module, a tensor"):
            lateinit.materialize(target)


def test_meta_as_the_device_is_refused() -> None:
    eager, model = twins()
    with pytest.raises(ValueError, match=r"device=.*meta"):
        lateinit.materialize(model, device="meta")
    assert_untouched(eager, model)


@pytest.mark.parametrize("dtype", [torch.int32, torch.bool])
def test_dtype_that_holds_no_weights_is_refused(dtype: torch.dtype) -> None:
    eager, model = twins()
    with pytest.raises(ValueError, match=rf"dtype={dtype}.*floating"):
        lateinit.materialize(model, dtype=dtype)
    assert_untouched(eager, model)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_device_that_is_not_there_leaves_everything_as_it_was() -> None:
    eager, model = twins()
    with pytest.raises((RuntimeError, AssertionError), match=r"CUDA|NVIDIA"):
        lateinit.materialize(model, device="cuda")
    assert_untouched(eager, model)


def test_memory_that_is_where_it_would_be_anyway_is_shared() -> None:
    eager, model = twins(TwoViews)
    lateinit.materialize(model, only="real")
    lateinit.materialize(model, device="cpu", dtype=torch.float32)
    assert model.rest[0] == model.real[2]
    assert_same(eager, model)
    eager, model = twins(TwoViews)
    lateinit.materialize(model, only="rest", device="cpu")
    assert_same(eager, lateinit.materialize(model))


class TwoDtypes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.randn(3))
        self.register_buffer("floats", torch.randn(4))
        self.register_buffer("integers", self.floats.view(torch.int32))


def test_dtypes_that_share_memory_are_refused_before_anything_is_done() -> None:
    eager, model = twins(TwoDtypes)
    with pytest.raises(DeferredTensorError, match=r"floats.*integers.*share"):
        lateinit.materialize(model, dtype=torch.float64)
    assert_untouched(eager, model)


def test_memory_that_is_elsewhere_already_is_refused_before_anything_is_done() -> None:
    eager, model = twins(TwoViews)
    lateinit.materialize(model, only="real", dtype=torch.float64)
    with pytest.raises(
        DeferredTensorError, match=r"'rest' shares its memory.*dtype=torch\.float64: ask for the"
    ):
        lateinit.materialize(model)
    assert still_deferred(model) == ["first", "rest"]
    lateinit.materialize(model, only="rest", dtype=torch.float64)
    assert model.rest[0] == model.real[2]
    assert torch.equal(model.rest, eager.rest.double())


# -- seeds -----------------------------------------------------------------------------------------


class Coin(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        wide = torch.rand(()).item() < 0.5
        self.layer = nn.Linear(4, 6 if wide else 5)


class DrawnLength(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("places", torch.rand(64).gt(0.5).nonzero())


class DrawnOutside(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("outside", torch.from_numpy(np.zeros(8)))
        self.outside.normal_()
        self.layer = nn.Linear(2, 2)


@pytest.mark.parametrize("build", [Coin, DrawnLength, DrawnOutside])
def test_seed_that_would_build_another_model_is_refused(build: Callable[[], nn.Module]) -> None:
    eager, model = twins(build)
    before = still_deferred(model)
    with pytest.raises(SeedError, match=r"seed"):
        lateinit.materialize(model, seed=1)
    assert still_deferred(model) == before
    assert_same(eager, lateinit.materialize(model))


def test_refused_seed_says_which_and_why() -> None:
    _, model = twins(Coin)
    with pytest.raises(
        SeedError, match=r"seed=1 cannot be honoured: the constructor read a random value.*record"
    ):
        lateinit.materialize(model, seed=1)


def test_seed_of_blocks_that_did_not_follow_each_other_is_refused() -> None:
    torch.manual_seed(0)
    with lateinit.deferred():
        model = nn.Linear(3, 3)
    torch.rand(3)
    with lateinit.deferred():
        nn.init.normal_(model.weight)
    with pytest.raises(SeedError, match=r"seed=1 cannot be honoured.*did not follow each other"):
        lateinit.materialize(model, seed=1)
    assert lateinit.is_deferred(model.weight)


# -- outside data ----------------------------------------------------------------------------------


def test_outside_data_that_changed_since_is_noticed() -> None:
    table = torch.randn(200, 200)

    class Lookup(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(2, 2)
            self.table = nn.Parameter(torch.empty(200, 200))
            self.table.data.copy_(table)
            self.last = nn.Linear(2, 2)

    eager, model = twins(Lookup)
    kept = table.clone()
    table.add_(1)
    with pytest.raises(
        ConstantChangedError,
        match=r"'table'.*\(200, 200\).*changed in place.*(?:materialise before|pass a copy)",
    ):
        lateinit.materialize(model)
    lateinit.materialize(model, only=["first.*", "last.*"])
    assert still_deferred(model) == ["table"]
    assert torch.equal(eager.table, kept)


UNSEEN: dict[str, Callable[[torch.Tensor], Any]] = {
    "through .data": lambda t: t.data.zero_(),
    "through an array": lambda t: t.numpy().fill(0),
    "by one element": lambda t: t.data[199, 199].add_(1),
}


@pytest.mark.parametrize("change", UNSEEN.values(), ids=list(UNSEEN))
def test_real_data_changed_without_its_version_is_noticed(
    change: Callable[[torch.Tensor], Any],
) -> None:
    table = torch.randn(200, 200)
    double = lateinit.deferred_init(lambda: torch.zeros(200, 200) + table)
    change(table)
    with pytest.raises(ConstantChangedError, match="changed in place"):
        lateinit.materialize(double)


def test_real_data_that_is_what_it_was_is_taken_again() -> None:
    table = torch.randn(200, 200)
    table.add_(1)
    double = lateinit.deferred_init(lambda: torch.zeros(200, 200) + table)
    loaded = pickle.loads(pickle.dumps(double))
    table.neg_().neg_()
    assert torch.equal(lateinit.materialize(double), table)
    assert torch.equal(lateinit.materialize(loaded), table)


def test_small_outside_data_may_change() -> None:
    table = torch.randn(20, 20)
    eager, model = twins(lambda: nn.Embedding.from_pretrained(table * 1))
    other = lateinit.deferred_init(lambda: nn.Parameter(torch.zeros(20, 20) + table))
    expected = table.clone()
    table.zero_()
    assert_same(eager, lateinit.materialize(model))
    assert torch.equal(lateinit.materialize(other), expected)


# -- skip_init -------------------------------------------------------------------------------------


@pytest.mark.parametrize("thing", [nn.functional.linear, torch.Tensor, nn.Linear(2, 2), "Linear"])
def test_skip_init_of_what_is_no_module_class_raises_as_torch_does(thing: object) -> None:
    with pytest.raises(RuntimeError, match="Expected a Module"):
        lateinit.skip_init(thing)


def test_skip_init_whose_constructor_raises_leaves_the_generator() -> None:
    state = torch.get_rng_state()
    with pytest.raises(TypeError, match="missing"):
        lateinit.skip_init(nn.Linear, 3)
    assert torch.equal(state, torch.get_rng_state())
