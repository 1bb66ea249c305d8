"""`materialize` and `plan`: what is taken, where it goes, and what stays as it was."""

from __future__ import annotations

import gc
import itertools
import weakref
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.prune import L1Unstructured
from torch.utils.weak import WeakIdKeyDictionary

import lateinit
from lateinit._materialize import scheduler
from lateinit._replay import Session
from lateinit.errors import DeferredTensorError
from tests.support.cases import Bag
from tests.support.snapshots import assert_same, snapshot, tensors_of
from tests.support.twins import twins as twins_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from lateinit._program import Step


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.enc = nn.Linear(4, 8)
        self.dec = nn.Linear(8, 4)
        self.norm = nn.BatchNorm1d(4)
        self.tied = nn.Linear(4, 8, bias=False)
        self.tied.weight = self.enc.weight
        self.register_buffer("table", torch.arange(4.0).sqrt(), persistent=False)
        self.attribute = torch.randn(3)
        self.listed = [torch.randn(2), {"deep": torch.arange(3)}]


def twins(build: Callable[[], nn.Module] = Net, seed: int = 0) -> tuple[nn.Module, nn.Module]:
    return twins_of(build, seed)


def real(model: nn.Module) -> list[str]:
    return sorted(path for path, tensor in tensors_of(model) if not lateinit.is_deferred(tensor))


@pytest.fixture
def replayed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the ops that run for real."""
    names: list[str] = []
    run = Session.call

    def noted(self: Session, op: Any, *args: Any, **kwargs: Any) -> Any:
        names.append(op.name)
        return run(self, op, *args, **kwargs)

    monkeypatch.setattr(Session, "call", noted)
    return names


# -- only= -----------------------------------------------------------------------------------------

SELECTIONS = {
    "one name": ("dec.bias", ["dec.bias"]),
    "glob": ("*.bias", ["dec.bias", "enc.bias", "norm.bias"]),
    "glob of one character": ("?ec.bias", ["dec.bias"]),
    "set of characters": ("[de]*.weight", ["dec.weight", "enc.weight", "tied.weight"]),
    "list": (["dec.*", "table"], ["dec.bias", "dec.weight", "table"]),
    "tuple": (("table", "table"), ["table"]),
    "second name of a tie": ("tied.weight", ["enc.weight", "tied.weight"]),
    "plain attribute": ("attribute", ["attribute"]),
    "in containers": ("listed.*", ["listed.0", "listed.1.deep"]),
    "no pattern": ([], []),
    "everything": ("*", None),
    "predicate on the name": (
        lambda fqn, _: fqn.startswith("norm.running"),
        ["norm.running_mean", "norm.running_var"],
    ),
    "predicate on the tensor": (
        lambda _, tensor: tensor.dtype == torch.int64,
        ["listed.1.deep", "norm.num_batches_tracked"],
    ),
    "predicate on the second name": (
        lambda fqn, _: fqn == "tied.weight",
        ["enc.weight", "tied.weight"],
    ),
    "predicate that takes nothing": (lambda *_: False, []),
}


@pytest.mark.parametrize(("only", "expected"), SELECTIONS.values(), ids=SELECTIONS)
def test_selection_is_materialised_and_nothing_else(only: Any, expected: list[str] | None) -> None:
    eager, model = twins()
    planned = lateinit.plan(model, only=only)
    assert lateinit.materialize(model, only=only) is model
    wanted = expected if expected is not None else sorted(path for path, _ in tensors_of(eager))
    assert real(model) == wanted
    assert {name for name, _ in planned.names} == set(wanted) - {"tied.weight"}
    assert_same(eager, lateinit.materialize(model))


def test_selection_may_be_an_iterator() -> None:
    _, model = twins()
    lateinit.materialize(model, only=(f"{part}.bias" for part in ("enc", "dec")))
    assert real(model) == ["dec.bias", "enc.bias"]


def test_names_are_those_seen_from_the_target() -> None:
    _, model = twins()
    lateinit.materialize(model.enc, only="bias")
    lateinit.materialize({"some": [model.dec]}, only="some.0.bias")
    assert real(model) == ["dec.bias", "enc.bias"]


def test_predicate_may_ask_for_what_is_known_of_a_deferred_tensor() -> None:
    _, model = twins()
    lateinit.materialize(
        model, only=lambda _, t: t.is_meta and t.numel() < 9 and t.requires_grad and t.shape == (8,)
    )
    assert real(model) == ["enc.bias"]


# -- targets ---------------------------------------------------------------------------------------


def test_one_tensor_is_materialised_alone() -> None:
    eager, model = twins()
    weight = model.dec.weight
    assert lateinit.materialize(weight) is weight
    assert real(model) == ["dec.weight"]
    assert torch.equal(weight, eager.dec.weight)
    assert type(weight) is nn.Parameter


@pytest.mark.parametrize("container", [list, tuple, set, lambda t: dict(enumerate(t))])
def test_containers_of_modules_and_tensors_are_gone_through(container: Any) -> None:
    torch.manual_seed(0)
    expected = [nn.Linear(2, 2), torch.randn(3), nn.Parameter(torch.randn(2))]
    torch.manual_seed(0)
    with lateinit.deferred():
        things = [nn.Linear(2, 2), torch.randn(3), nn.Parameter(torch.randn(2))]
    held = container(things)
    assert lateinit.is_deferred(held)
    assert lateinit.materialize(held) is held
    assert not lateinit.is_deferred(held)
    assert_same(Bag(all=expected), Bag(all=things))


def test_parameter_lists_and_dicts_are_gone_through() -> None:
    def build() -> nn.Module:
        return nn.ModuleDict(
            {
                "list": nn.ParameterList([torch.randn(2), torch.randn(3)]),
                "dict": nn.ParameterDict({"a": torch.randn(2), "b": nn.Parameter(torch.ones(1))}),
            }
        )

    eager, model = twins(build)
    assert_same(eager, lateinit.materialize(model))


@pytest.mark.parametrize("seed", [None, 5])
def test_how_much_is_drawn_may_depend_on_what_was_drawn(seed: int | None) -> None:
    def build() -> nn.Module:
        model = nn.Module()
        rates = torch.rand(100)
        model.counts, model.last = torch.poisson(rates * 20), torch.rand(5)
        return model

    eager, _ = twins(build, seed=seed or 0)
    _, model = twins(build)
    model.last = lateinit.materialize(model.last, seed=seed)
    assert_same(eager, lateinit.materialize(model, seed=seed))


def test_what_is_recorded_in_several_blocks_is_materialised_together() -> None:
    torch.manual_seed(0)
    expected = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
    torch.manual_seed(0)
    model = nn.ModuleList(lateinit.deferred_init(nn.Linear, 2, 2) for _ in range(2))
    assert_same(expected, lateinit.materialize(model))


def test_real_and_empty_targets_are_left_alone() -> None:
    layer = nn.Linear(2, 2)
    before = snapshot(layer)
    assert lateinit.materialize(layer) is layer
    assert_same(before, snapshot(layer))
    for nothing in ([], {}, nn.ReLU(), torch.ones(2)):
        assert lateinit.materialize(nothing) is nothing


def test_materialising_in_the_block_is_allowed() -> None:
    def build() -> nn.Module:
        model = Net()
        lateinit.materialize(model.enc)
        model.dec.weight.data.copy_(model.enc.weight.T)
        return model

    eager, model = twins(build)
    assert real(model) == ["enc.bias", "enc.weight", "tied.weight"]
    assert_same(eager, lateinit.materialize(model))


def test_calling_again_runs_nothing(replayed: list[str]) -> None:
    _, model = twins()
    lateinit.materialize(model)
    assert replayed
    replayed.clear()
    lateinit.materialize(model)
    assert not replayed


def test_each_op_runs_once(replayed: list[str]) -> None:
    _, model = twins()
    planned = [model_op for step in lateinit.plan(model).steps for model_op in step.ops]
    for name in ("enc", "dec", "norm"):
        lateinit.materialize(getattr(model, name))
    lateinit.materialize(model)
    assert len(replayed) == len(planned)


@pytest.mark.parametrize("threads", [1, 2, 7])
def test_number_of_threads_does_not_matter_to_the_bits(threads: int) -> None:
    def build() -> nn.Module:
        return nn.Sequential(nn.Linear(1200, 1000), nn.Linear(1000, 1024), nn.Linear(7, 3))

    eager, model = twins(build)
    assert_same(eager, lateinit.materialize(model, threads=threads))


# -- device=, dtype= -------------------------------------------------------------------------------


def test_device_of_the_recording_is_the_default() -> None:
    eager, model = twins()
    assert_same(eager, lateinit.materialize(model, device="cpu"))
    assert {tensor.device.type for _, tensor in tensors_of(model)} == {"cpu"}


class ManyDtypes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.single_ = nn.Parameter(torch.randn(5))
        self.double_ = nn.Parameter(torch.randn(5, dtype=torch.float64))
        self.half_ = nn.Parameter(torch.randn(5, dtype=torch.float16))
        self.complex_ = nn.Parameter(torch.randn(5, dtype=torch.complex64))
        self.frozen = nn.Parameter(torch.arange(5), requires_grad=False)
        self.register_buffer("count", torch.tensor(3))
        self.register_buffer("mask", torch.rand(5) > 0.5)
        self.register_buffer("mean", torch.zeros(5))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_dtype_casts_floating_point_tensors_and_leaves_the_others(dtype: torch.dtype) -> None:
    eager, model = twins(ManyDtypes)
    lateinit.materialize(model, dtype=dtype)
    for (path, expected), (_, found) in zip(tensors_of(eager), tensors_of(model), strict=True):
        cast = expected.detach().to(dtype) if expected.is_floating_point() else expected
        assert found.dtype == cast.dtype, path
        assert torch.equal(found, cast), path
        assert found.requires_grad == expected.requires_grad
        assert type(found) is type(expected)


def test_dtype_keeps_ties_and_shared_memory() -> None:
    def build() -> nn.Module:
        model = Net()
        words = torch.randn(6)
        model.register_buffer("head", words[:4])
        model.register_buffer("tail", words[2:])
        return model

    eager, model = twins(build)
    lateinit.materialize(model, dtype=torch.float64)
    assert model.tied.weight is model.enc.weight
    assert torch.equal(model.enc.weight, eager.enc.weight.double())
    model.head[3] = 9
    assert model.tail[1] == 9


def test_dtype_keeps_strides() -> None:
    def build() -> nn.Module:
        return nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)

    eager, model = twins(build)
    lateinit.materialize(model, dtype=torch.float64)
    assert model.weight.stride() == eager.weight.stride()
    assert torch.equal(model.weight, eager.weight.double())


def test_dtype_is_asked_for_after_the_one_that_the_model_was_cast_to() -> None:
    eager, model = twins()
    eager.bfloat16().double()
    model.bfloat16()
    lateinit.materialize(model, dtype=torch.float64, only="dec.weight")
    assert torch.equal(model.dec.weight, eager.dec.weight)
    lateinit.materialize(model)
    assert model.enc.weight.dtype == torch.bfloat16
    assert torch.equal(model.enc.weight.double(), eager.enc.weight)


def test_what_is_real_already_keeps_its_dtype() -> None:
    eager, model = twins()
    lateinit.materialize(model, only="enc.*")
    lateinit.materialize(model, dtype=torch.float64)
    assert model.enc.weight.dtype == torch.float32
    assert torch.equal(model.enc.weight, eager.enc.weight)
    assert model.dec.weight.dtype == torch.float64


@pytest.mark.parametrize("seed", [0, 7, 2**40 + 3])
def test_seed_replaces_the_state_that_construction_began_with(seed: int) -> None:
    _, model = twins(seed=99)
    torch.manual_seed(seed)
    assert_same(Net(), lateinit.materialize(model, seed=seed))


def test_seed_may_differ_from_part_to_part() -> None:
    first, _ = twins(seed=1)
    second, _ = twins(seed=2)
    _, model = twins(seed=0)
    lateinit.materialize(model.enc, seed=1)
    lateinit.materialize(model.dec, seed=2)
    assert torch.equal(model.enc.weight, first.enc.weight)
    assert torch.equal(model.dec.weight, second.dec.weight)


DERIVED = {
    "zeros_like": torch.zeros_like,
    "zeros_like on its device": lambda p: torch.zeros_like(p, device=p.device),
    "new_full": lambda p: p.new_full((2, 2), 3.0),
    "another memory format": lambda p: p.to(memory_format=torch.contiguous_format, copy=True),
    "copy on its device": lambda p: p.to(p.device, copy=True),
    "cast like another": lambda p: p.to(p.new_zeros(1, dtype=torch.float64)),
    "cast on its device": lambda p: p.to(p.device, torch.float64),
    "double": lambda p: p.double(),
    "half and back": lambda p: p.half().float(),
    "clone of cpu": lambda p: p.cpu().clone(),
    "transposed product": lambda p: p.T @ p,
    "joined": lambda p: torch.cat([p, p * 2]),
    "chosen": lambda p: torch.where(p > 0, p, torch.tensor(0.0)),
    "where they are positive": lambda p: p.gt(0).nonzero(),
}


@pytest.mark.parametrize("derive", DERIVED.values(), ids=DERIVED)
def test_what_is_computed_from_deferred_tensors_is_deferred_too(
    derive: Callable[[torch.Tensor], torch.Tensor],
) -> None:
    eager, model = twins()
    found = derive(model.enc.weight)
    assert lateinit.is_deferred(found)
    lateinit.materialize(found)
    expected = derive(eager.enc.weight)
    assert not found.is_meta
    assert found.dtype == expected.dtype
    assert torch.equal(found, expected)
    assert_same(eager, lateinit.materialize(model))


WRITES: dict[str, Callable[[torch.Tensor, torch.Tensor], Any]] = {
    "an element": lambda mask, weight: mask.__setitem__((0, 1), 5),
    "where a mask is": lambda mask, weight: mask.__setitem__(weight > 0, 0),
    "at places": lambda mask, weight: mask.view(-1).__setitem__(weight.view(-1).argsort()[:9], 0),
    "where": lambda mask, weight: mask.copy_(torch.where(weight > 0, 1.0, 0.0)),
    "a row": lambda mask, weight: mask.__setitem__(0, weight[1]),
    "a real scalar": lambda mask, weight: mask.__setitem__(0, torch.tensor(4.0)),
    "pruned": lambda mask, weight: mask.mul_(L1Unstructured(0.3).compute_mask(weight, mask)),
}


@pytest.mark.parametrize("write", WRITES.values(), ids=list(WRITES))
def test_what_was_made_of_deferred_tensors_can_be_written(
    write: Callable[[torch.Tensor, torch.Tensor], Any],
) -> None:
    eager, model = twins()
    for layer in (eager.enc, model.enc):
        layer.mask = torch.ones_like(layer.weight)
        write(layer.mask, layer.weight.detach())
    assert_same(eager, lateinit.materialize(model))


def test_unrecorded_meta_tensor_is_not_written_to_a_deferred_one() -> None:
    copied = lateinit.deferred_init(lambda: nn.Parameter(torch.ones(3))).detach().clone()
    with pytest.raises(DeferredTensorError, match="write a meta tensor, which has no values"):
        copied.mul_(torch.zeros(3, device="meta"))
    assert lateinit.materialize(copied).tolist() == [1, 1, 1]


def test_model_moved_to_where_it_is_stays_what_it_is() -> None:
    eager, model = twins()
    model.cpu().to("cpu").to(torch.device("cpu"), torch.float64).to("meta")
    assert_same(eager.double(), lateinit.materialize(model))


# -- progress --------------------------------------------------------------------------------------


def test_progress_is_shown_on_stderr_only(capfd: pytest.CaptureFixture[str]) -> None:
    eager, model = twins()
    lateinit.materialize(model, progress=True)
    captured = capfd.readouterr()
    assert not captured.out
    assert "materialise" in captured.err
    assert "bytes" in captured.err
    assert_same(eager, model)


def test_nothing_is_printed_unless_asked_for(capfd: pytest.CaptureFixture[str]) -> None:
    _, model = twins()
    lateinit.materialize(model)
    captured = capfd.readouterr()
    assert not captured.out
    assert not captured.err


def test_progress_reaches_its_end(capfd: pytest.CaptureFixture[str]) -> None:
    model = lateinit.deferred_init(nn.Linear, 100, 10)
    lateinit.materialize(model, progress=True)
    assert "4.0/4.0 kB" in capfd.readouterr().err


# -- plans -----------------------------------------------------------------------------------------


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(4, 4)
        nn.init.normal_(self.proj.weight, std=0.02)
        self.register_buffer("decay", torch.exp(-torch.arange(4)))


def test_plan_can_be_read() -> None:
    _, model = twins(Twice)
    lines = str(lateinit.plan(model)).splitlines()
    assert lines[0] == "3 steps, 5 of 6 recorded ops, 96 bytes"
    assert lines[1:5] == [
        "      1  uniform_(%1:float32[4], -0.5, 0.5)  # draw 1 of stream 0",
        "         -> proj.bias",
        "      2  normal_(%0:float32[4x4], 0.0, 0.02)  # draw 2 of stream 0",
        "         -> proj.weight",
    ]
    assert [line.split(" = ")[1].partition("(")[0] for line in lines[5:8]] == [
        "arange",
        "neg",
        "exp",
    ]
    assert lines[8:] == ["         -> decay"]


def test_plan_of_a_part_and_of_what_is_left() -> None:
    _, model = twins(Twice)
    part = lateinit.plan(model, only="proj.weight")
    assert [name for name, _ in part.names] == ["proj.weight"]
    assert part.nbytes == 64
    assert str(part).count("->") == 1
    lateinit.materialize(model.proj)
    assert [name for name, _ in lateinit.plan(model).names] == ["decay"]
    lateinit.materialize(model)
    assert str(lateinit.plan(model)).startswith("0 steps, 0 of 0 recorded ops, 0 bytes")


def test_plan_leaves_out_what_is_overwritten() -> None:
    _, model = twins(Twice)
    text = str(lateinit.plan(model, only="proj.weight"))
    assert "normal_" in text
    assert "uniform_" not in text


def test_plan_runs_nothing(replayed: list[str]) -> None:
    _, model = twins()
    replayed.clear()
    state = torch.get_rng_state()
    assert str(lateinit.plan(model))
    assert not replayed
    assert not real(model)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("build", [Twice, lambda: nn.LSTM(3, 4), lambda: nn.Embedding(6, 4)])
@pytest.mark.parametrize("only", [None, "*weight*"])
def test_the_plan_that_is_printed_is_the_one_that_runs(
    build: Any, only: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = lateinit.deferred_init(build)
    planned, ran = lateinit.plan(model, only=only), []
    run = scheduler.execute

    def noted(session: Session, steps: Iterable[Step], threads: int | None) -> Any:
        ran.append((session.program, steps))
        return run(session, steps, threads)

    monkeypatch.setattr("lateinit._materialize.filling.execute", noted)
    lateinit.materialize(model, only=only)
    assert ran == [(planned.program, planned.steps)]


def test_plan_over_several_blocks_is_refused() -> None:
    models = nn.ModuleList(lateinit.deferred_init(nn.Linear, 2, 2) for _ in range(2))
    with pytest.raises(ValueError, match="several blocks: plan one part at a time"):
        lateinit.plan(models)


# -- what stays ------------------------------------------------------------------------------------


class Overlapping(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        words = torch.randn(12)
        self.register_buffer("head", words[:8])
        self.register_buffer("tail", words[4:])
        self.register_buffer("table", words.view(3, 4).T)
        self.matrix = nn.Parameter(words.view(4, 3))


@pytest.mark.parametrize("order", list(itertools.permutations(["head", "tail", "table", "matrix"])))
def test_tensors_on_one_storage_share_it_in_whatever_order(order: tuple[str, ...]) -> None:
    eager, model = twins(Overlapping)
    for name in order:
        lateinit.materialize(getattr(model, name))
    assert_same(eager, model)


def test_write_to_a_part_is_seen_by_what_is_materialised_later() -> None:
    eager, model = twins(Overlapping)
    for twin in (eager, model):
        lateinit.materialize(twin.head).fill_(3)
    assert lateinit.is_deferred(model.tail)
    assert_same(eager, lateinit.materialize(model))


@pytest.mark.parametrize("when", ["in the constructor", "on the deferred model"])
def test_memory_format_is_kept(when: str) -> None:
    def build() -> nn.Module:
        layer = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ConvTranspose2d(4, 3, 2))
        return layer.to(memory_format=torch.channels_last) if "constructor" in when else layer

    eager, model = twins(build)
    if "deferred" in when:
        for twin in (eager, model):
            twin.to(memory_format=torch.channels_last)
    lateinit.materialize(model)
    assert model[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert_same(eager, model)


def test_objects_weak_references_and_keys_stay() -> None:
    _, model = twins()
    weight = model.enc.weight
    reference, weak = weakref.ref(weight), WeakIdKeyDictionary()
    weak[weight] = "kept"
    keys = {weight: "kept"}
    finalised: list[int] = []
    weakref.finalize(weight, finalised.append, 1)
    lateinit.materialize(model)
    assert model.enc.weight is weight is model.tied.weight is reference()
    assert weak[weight] == keys[model.enc.weight] == "kept"
    assert not finalised


def test_attributes_of_parameters_stay() -> None:
    _, model = twins()
    model.enc.weight.partition_dim = 1
    model.dec.weight._no_weight_decay = True
    lateinit.materialize(model)
    assert model.enc.weight.partition_dim == 1
    assert model.dec.weight._no_weight_decay
    assert vars(model.enc.bias) == {}


class Marked(nn.Parameter):
    """A parameter of a class of its own."""

    def doubled(self) -> torch.Tensor:
        return self.detach() * 2


class Plain(torch.Tensor):
    pass


def test_classes_of_tensors_stay() -> None:
    def build() -> nn.Module:
        model = nn.Module()
        model.weight = Marked(torch.randn(3))
        model.register_buffer("buffer", nn.Buffer(torch.randn(3)))
        model.plain = torch.randn(3).as_subclass(Plain)
        return model

    eager, model = twins(build)
    assert isinstance(model.weight, Marked)
    lateinit.materialize(model)
    assert type(model.weight) is Marked
    assert type(model.plain) is Plain
    assert type(model.buffer) is type(eager.buffer)
    assert torch.equal(model.weight.doubled(), eager.weight.doubled())


def test_deferred_parameters_are_parameters() -> None:
    _, model = twins()
    assert all(isinstance(p, nn.Parameter) for p in model.parameters())
    assert not isinstance(model.table, nn.Parameter)
    assert [name for name, _ in model.named_parameters()] == [
        name for name, _ in Net().named_parameters()
    ]
    assert all(p.is_meta and p.is_leaf for p in model.parameters())
    layer = nn.Linear(2, 2)
    layer.weight = model.dec.weight
    assert "weight" in layer._parameters


def test_hooks_on_modules_fire_after() -> None:
    fired: list[str] = []

    def build() -> nn.Module:
        layer = nn.Linear(3, 2)
        layer.register_forward_pre_hook(lambda *_: fired.append("pre"))
        layer.register_forward_hook(lambda *_: fired.append("forward"))
        layer.register_full_backward_hook(lambda *_: fired.append("backward"))
        layer.register_state_dict_post_hook(lambda *_: fired.append("state"))
        return layer

    _, model = twins(build)
    model.register_load_state_dict_post_hook(lambda *_: fired.append("load"))
    lateinit.materialize(model)
    assert not fired
    model(torch.ones(1, 3, requires_grad=True)).sum().backward()
    model.load_state_dict(model.state_dict())
    assert fired == ["pre", "forward", "backward", "state", "load"]


def test_parametrizations_can_be_added_to_and_removed_from_a_deferred_module() -> None:
    class Doubled(nn.Module):
        def forward(self, weight: torch.Tensor) -> torch.Tensor:
            return weight * 2

        def right_inverse(self, weight: torch.Tensor) -> torch.Tensor:
            return weight / 2

    def build() -> nn.Module:
        layer = nn.Linear(3, 2)
        parametrize.register_parametrization(layer, "weight", Doubled())
        return layer

    eager, model = twins(build)
    assert_same(eager, lateinit.materialize(model))
    assert torch.equal(eager.weight, model.weight)
    for twin in (eager, model):
        parametrize.remove_parametrizations(twin, "weight")
    assert_same(eager, model)


def test_parameters_moved_between_modules_go_with_them() -> None:
    def move(first: nn.Module, second: nn.Module) -> None:
        first.dec.weight, second.dec.weight = second.dec.weight, first.dec.weight
        first.tied.weight = nn.Parameter(first.enc.weight.detach())
        second.enc.bias = first.enc.bias
        del second.norm

    expected = twins(seed=1)[0], twins(seed=2)[0]
    models = twins(seed=1)[1], twins(seed=2)[1]
    move(*expected)
    move(*models)
    lateinit.materialize(models[1])
    assert models[0].enc.bias is models[1].enc.bias
    assert not lateinit.is_deferred(models[0].enc.bias)
    lateinit.materialize(models[0])
    assert models[0].tied.weight.data_ptr() == models[0].enc.weight.data_ptr()
    assert_same(nn.ModuleList(expected), nn.ModuleList(models))


def test_closures_and_optimizers_hold_what_they_held() -> None:
    eager, model = twins()
    weight = model.enc.weight

    def held() -> torch.Tensor:
        return weight

    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    lateinit.materialize(model)
    assert optimizer.param_groups[0]["params"][0] is weight
    assert torch.equal(held(), eager.enc.weight)


def test_flags_set_in_between_are_kept() -> None:
    eager, model = twins()
    for twin in (eager, model):
        twin.eval().requires_grad_(False)
        twin.dec.weight.requires_grad_(True)
    assert_same(eager, lateinit.materialize(model))


def test_models_that_are_done_with_can_be_freed() -> None:
    _, model = twins()
    reference = weakref.ref(model.enc.weight.untyped_storage())
    lateinit.materialize(model)
    assert reference() is None or reference().device.type == "cpu"
    weight = weakref.ref(model.enc.weight)
    del model
    gc.collect()
    assert weight() is None


def test_a_program_goes_with_its_last_tensor() -> None:
    gc.collect()
    gc.disable()
    try:
        with lateinit.deferred() as program:
            layer = nn.Linear(4, 4)
            nn.init.trunc_normal_(layer.weight, a=-1.0, b=1.0)
        alive = weakref.ref(program)
        del program
        lateinit.materialize(layer, only="weight")
        assert alive() is not None
        lateinit.materialize(layer)
        assert alive() is None
    finally:
        gc.enable()


def test_a_plan_leaves_out_what_is_real() -> None:
    class Window(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3, 5))
            self.row = self.weight.data[1]

    model = lateinit.deferred_init(Window)
    assert len(lateinit.plan(model).steps) == 1
    lateinit.materialize(model, only="weight")
    assert lateinit.is_deferred(model.row)
    assert lateinit.plan(model).steps == ()


def _fitted() -> nn.Module:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
    model.kept = torch.zeros(3, requires_grad=True)
    model.optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    for _ in range(2):
        loss = model(torch.randn(5, 3)).square().mean() + (model.kept * torch.randn(3)).sum()
        model.optimizer.zero_grad()
        loss.backward()
        model.optimizer.step()
    return model


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=str)
def test_gradients_of_the_constructor_are_carried_over(dtype: torch.dtype | None) -> None:
    torch.manual_seed(1)
    expected = _fitted().to(dtype or torch.float32)
    model = lateinit.deferred_init(_fitted)
    lateinit.materialize(model, dtype=dtype, seed=1)
    for ours, theirs in zip(expected.parameters(), model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
        assert torch.equal(ours.grad, theirs.grad)
    if dtype is None:
        expected.optimizer.step()
        model.optimizer.step()
        assert all(map(torch.equal, expected.parameters(), model.parameters()))


def test_tensor_that_realises_itself_keeps_its_gradient() -> None:
    torch.manual_seed(1)
    expected = _fitted()
    torch.manual_seed(1)
    model = lateinit.deferred_init(_fitted)
    assert torch.equal(model.kept + 1, expected.kept + 1)
    assert torch.equal(model.kept.grad, expected.kept.grad)
