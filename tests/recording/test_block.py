"""`deferred()`: what a block records, what it answers, and what it leaves outside as it was."""

from __future__ import annotations

import functools
import pickle
import random
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from torch import nn

import lateinit
from lateinit._program.program import Program
from lateinit._replay import Session
from tests.support.snapshots import assert_same

if TYPE_CHECKING:
    from collections.abc import Callable


@pytest.fixture
def replayed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the ops that run on real storages; what brings real data in is no arithmetic."""
    names: list[str] = []
    run = Session.call

    def noted(self: Session, op: Any, *args: Any, **kwargs: Any) -> Any:
        if op.name != "lateinit::constant":
            names.append(op.name)
        return run(self, op, *args, **kwargs)

    monkeypatch.setattr(Session, "call", noted)
    return names


# -- generators ------------------------------------------------------------------------------------


def draw_from_two(first: torch.Generator, second: torch.Generator) -> list[torch.Tensor]:
    return [
        torch.randn(5, generator=first),
        torch.rand(20, generator=second),
        torch.empty(7).exponential_(generator=first),
        torch.randperm(9, generator=second),
        torch.randn(33),
        nn.init.trunc_normal_(torch.empty(40), a=-1, b=1, generator=first),
        torch.randint(0, 9, (3,), generator=first),
        torch.multinomial(torch.ones(6), 4, generator=second),
    ]


def test_explicit_generators_are_left_where_eager_construction_leaves_them() -> None:
    torch.manual_seed(0)
    eager = [torch.Generator().manual_seed(seed) for seed in (3, 4)]
    expected, ended = draw_from_two(*eager), torch.get_rng_state()
    torch.manual_seed(0)
    late = [torch.Generator().manual_seed(seed) for seed in (3, 4)]
    with lateinit.deferred():
        found = draw_from_two(*late)
    assert torch.equal(ended, torch.get_rng_state())
    for one, other in zip(eager, late, strict=True):
        assert torch.equal(one.get_state(), other.get_state())
        assert one.initial_seed() == other.initial_seed()
    lateinit.materialize(found[::-1])
    for one, other in zip(expected, found, strict=True):
        assert torch.equal(one, other)
    for one, other in zip(eager, late, strict=True):
        assert torch.equal(one.get_state(), other.get_state())


def test_explicit_generator_goes_on_from_block_to_block() -> None:
    eager, late = (torch.Generator().manual_seed(3) for _ in range(2))
    expected = [torch.randn(5, generator=eager), torch.rand(3, generator=eager)]
    expected.append(torch.randn(6, generator=eager))
    with lateinit.deferred():
        found = [torch.randn(5, generator=late)]
    found.append(torch.rand(3, generator=late))
    with lateinit.deferred():
        found.append(torch.randn(6, generator=late))
    lateinit.materialize(found)
    for one, other in zip(expected, found, strict=True):
        assert torch.equal(one, other)


def test_explicit_generators_can_be_left_too() -> None:
    generator = torch.Generator().manual_seed(3)
    before = generator.get_state(), torch.get_rng_state()
    with lateinit.deferred(advance_rng=False):
        torch.randn(5, generator=generator)
        torch.randn(5)
    assert torch.equal(before[0], generator.get_state())
    assert torch.equal(before[1], torch.get_rng_state())


def states_along_the_way() -> list[torch.Tensor | int]:
    seen: list[torch.Tensor | int] = [torch.get_rng_state(), torch.initial_seed()]
    nn.Linear(5, 7)
    seen.append(torch.get_rng_state())
    with torch.random.fork_rng():
        torch.manual_seed(8)
        nn.Linear(5, 7)
        seen.append(torch.random.get_rng_state())
    seen += [torch.get_rng_state(), torch.random.initial_seed()]
    kept = torch.get_rng_state()
    nn.init.trunc_normal_(torch.empty(50), a=-1, b=1)
    seen.append(torch.get_rng_state())
    torch.set_rng_state(kept)
    nn.init.orthogonal_(torch.empty(4, 4))
    seen.append(torch.get_rng_state())
    return seen


def test_states_read_in_the_block_are_those_of_eager_construction() -> None:
    torch.manual_seed(3)
    expected, ended = states_along_the_way(), torch.get_rng_state()
    torch.manual_seed(3)
    with lateinit.deferred():
        found = states_along_the_way()
    assert torch.equal(ended, torch.get_rng_state())
    for one, other in zip(expected, found, strict=True):
        assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


def test_generators_of_python_and_numpy_draw_as_they_do_eagerly() -> None:
    def build(numbers: np.random.Generator) -> nn.Module:
        layer = nn.Linear(random.randrange(2, 9), 3)
        nn.init.constant_(layer.bias, random.random())
        layer.register_buffer("noise", torch.tensor(numbers.random(4)))
        layer.register_buffer("shared", torch.from_numpy(numbers.random(4)))
        return layer

    twins, after = [], []
    for make in (build, lambda numbers: lateinit.deferred_init(build, numbers)):
        torch.manual_seed(0)
        random.seed(0)
        numbers = np.random.default_rng(0)
        twins.append(make(numbers))
        after.append((random.random(), numbers.random()))
    assert after[0] == after[1]
    assert_same(twins[0], lateinit.materialize(twins[1]))


# -- devices ---------------------------------------------------------------------------------------


@pytest.fixture
def cpu_by_default() -> Any:
    torch.set_default_device("cpu")
    yield
    torch.set_default_device(None)


@pytest.mark.usefixtures("cpu_by_default")
def test_default_device_is_honoured() -> None:
    torch.manual_seed(0)
    expected = nn.Linear(3, 3)
    torch.manual_seed(0)
    layer = lateinit.deferred_init(nn.Linear, 3, 3)
    assert lateinit.is_deferred(layer)
    assert_same(expected, lateinit.materialize(layer))


def in_a_context(device: str) -> nn.Module:
    with torch.device(device):
        layer = nn.Linear(3, 3)
        layer.register_buffer("table", torch.arange(3) * torch.tensor(2))
    return layer


def test_device_context_in_the_block_is_honoured() -> None:
    torch.manual_seed(0)
    expected = in_a_context("cpu")
    torch.manual_seed(0)
    layer = lateinit.deferred_init(in_a_context, "cpu")
    assert lateinit.is_deferred(layer)
    assert_same(expected, lateinit.materialize(layer))


def test_device_context_around_the_block_is_honoured() -> None:
    torch.manual_seed(0)
    expected = nn.Linear(3, 3)
    torch.manual_seed(0)
    with torch.device("cpu"), lateinit.deferred():
        layer = nn.Linear(3, 3)
    assert_same(expected, lateinit.materialize(layer))


ON_META = {
    "argument": lambda: nn.Linear(3, 3, device="meta"),
    "context": lambda: in_a_context("meta"),
    "moved": lambda: nn.Linear(3, 3).to("meta"),
    "like": lambda: nn.ParameterList(
        [nn.Parameter(torch.empty_like(torch.ones(3), device="meta"))]
    ),
}


@pytest.mark.parametrize("build", ON_META.values(), ids=ON_META)
def test_meta_that_was_asked_for_stays_meta(build: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    build()
    ended = torch.get_rng_state()
    torch.manual_seed(0)
    with lateinit.deferred():
        model = build()
        assert all(p.is_meta and p.device.type == "meta" for p in model.parameters())
    assert torch.equal(ended, torch.get_rng_state())
    assert not lateinit.is_deferred(model)
    lateinit.materialize(model)
    assert all(p.is_meta for p in model.parameters())


def test_block_in_a_meta_context_makes_plain_meta_tensors() -> None:
    with torch.device("meta"), lateinit.deferred():
        layer = nn.Linear(3, 3)
    assert not lateinit.is_deferred(layer)
    assert layer.weight.is_meta


def test_deferred_tensors_pass_for_what_they_will_be() -> None:
    with lateinit.deferred():
        layer = nn.Linear(3, 3)
        weight = layer.weight
        assert weight.device == torch.device("cpu")
        assert weight.is_cpu
        assert not weight.is_meta
        assert not weight.is_cuda
        assert weight.get_device() == -1
        assert weight.type() == "torch.FloatTensor"
        assert weight.to("cpu") is weight
        assert weight.cpu() is weight
        assert isinstance(weight, nn.Parameter)
        assert type(weight) is nn.Parameter
        assert layer.to(torch.device("cpu")) is layer
        assert layer.weight is weight
    assert weight.is_meta
    assert weight.device.type == "meta"


def test_addresses_tell_storages_apart_and_views_together() -> None:
    with lateinit.deferred():
        one, other = torch.zeros(4), torch.zeros(4)
        assert one.data_ptr() != other.data_ptr()
        assert one.view(2, 2).data_ptr() == one.data_ptr() == one.data.data_ptr()
        assert one[2:].data_ptr() == one.data_ptr() + 8
        assert one.untyped_storage().data_ptr() == one[2:].untyped_storage().data_ptr()
        assert torch.zeros(0).data_ptr() == 0


# -- reads -----------------------------------------------------------------------------------------


def wide(std: float = 0.02, **bounds: float) -> torch.Tensor:
    return nn.init.trunc_normal_(torch.empty(300, 300), std=std, **bounds)


def test_wide_truncated_normal_is_recorded_without_arithmetic(replayed: list[str]) -> None:
    torch.manual_seed(0)
    expected, ended = wide(), torch.get_rng_state()
    torch.manual_seed(0)
    with lateinit.deferred() as program:
        weight = wide()
    assert torch.equal(ended, torch.get_rng_state())
    assert not replayed
    assert not program.reads
    assert torch.equal(lateinit.materialize(weight), expected)
    assert replayed


def test_rejecting_truncated_normal_is_recorded_without_arithmetic(replayed: list[str]) -> None:
    torch.manual_seed(0)
    expected, ended = wide(std=1.0, a=-1.0, b=1.0), torch.get_rng_state()
    torch.manual_seed(0)
    with lateinit.deferred():
        weight = wide(std=1.0, a=-1.0, b=1.0)
        assert not replayed
    assert torch.equal(ended, torch.get_rng_state())
    assert torch.equal(lateinit.materialize(weight), expected)


WITHOUT_ARITHMETIC = {
    "linear": lambda: nn.Linear(50, 50),
    "convolution": lambda: nn.Conv2d(3, 8, 3),
    "statistics": lambda: nn.BatchNorm2d(8),
    "embedding": lambda: nn.Embedding(50, 8, padding_idx=0),
    "transformer": lambda: nn.TransformerEncoderLayer(16, 2, 32, batch_first=True),
    "recurrent": lambda: nn.LSTM(4, 8, 2),
    "orthogonal": lambda: nn.init.orthogonal_(torch.empty(30, 30)),
    "computed": lambda: torch.outer(torch.arange(40.0), torch.arange(40.0)).cos(),
    "drawn": lambda: torch.randperm(30),
    "every initialiser": lambda: [
        nn.init.xavier_normal_(torch.empty(9, 9)),
        nn.init.kaiming_uniform_(torch.empty(9, 9)),
        nn.init.eye_(torch.empty(9, 9)),
        nn.init.normal_(torch.empty(9)),
        nn.init.constant_(torch.empty(9), 3.0),
    ],
}


@pytest.mark.parametrize("build", WITHOUT_ARITHMETIC.values(), ids=WITHOUT_ARITHMETIC)
def test_ordinary_construction_computes_nothing(
    build: Callable[[], object], replayed: list[str]
) -> None:
    with lateinit.deferred(advance_rng=False) as program:
        assert build() is not None
    assert not replayed
    assert not program.reads


def test_read_computes_what_was_read_and_nothing_else(replayed: list[str]) -> None:
    with lateinit.deferred():
        nn.Linear(2000, 2000)
        rates = torch.linspace(0, 0.1, 3) * 2
        torch.randn(2000, 2000)
        seen = [rate.item() for rate in rates]
    assert seen == pytest.approx([0, 0.1, 0.2])
    assert set(replayed) == {"aten::linspace", "aten::mul.Tensor"}
    assert len(replayed) == 2


def test_random_read_is_right_at_its_place_in_the_stream() -> None:
    def build() -> list[float]:
        nn.Linear(30, 30)
        first = torch.rand(()).item()
        layer = nn.Linear(30, 30)
        return [first, layer.weight[3, 4].item(), float(torch.randn(20)[7])]

    torch.manual_seed(0)
    expected, ended = build(), torch.get_rng_state()
    torch.manual_seed(0)
    assert lateinit.deferred_init(build) == expected
    assert torch.equal(ended, torch.get_rng_state())


# -- blocks and programs ---------------------------------------------------------------------------


def test_call_gives_what_the_function_gives() -> None:
    def build(*args: int, **kwargs: int) -> tuple[object, ...]:
        return args, kwargs, torch.zeros(sum(args))

    args, kwargs, zeros = lateinit.deferred_init(build, 1, 2, make=3, self=4)
    assert args == (1, 2)
    assert kwargs == {"make": 3, "self": 4}
    assert lateinit.is_deferred(zeros)
    assert lateinit.deferred_init(int) == 0


def test_block_gives_its_program() -> None:
    with lateinit.deferred() as program:
        assert str(program) == "(an empty program)"
        layer = nn.Linear(3, 2)
    assert isinstance(program, Program)
    assert repr(program) == "<Program: 2 ops, 2 storages>"
    assert [op.name for op in program.ops] == ["aten::uniform_", "aten::uniform_"]
    assert str(program).count("# draw") == 2
    assert lateinit.plan(layer).program is program
    loaded = pickle.loads(pickle.dumps(program))
    assert str(loaded) == str(program)


def test_streams_and_plans_are_short_to_print() -> None:
    with lateinit.deferred() as program:
        layer = nn.Linear(3, 2)
    assert repr(program.streams[0]) == "<root stream on cpu: 2 draws from 5056 bytes>"
    assert str(lateinit.plan(layer)).startswith("2 steps, ")
    assert str(lateinit.plan(layer.bias)).startswith("1 step, ")


def test_program_has_no_bytes_of_the_model() -> None:
    with lateinit.deferred() as program:
        nn.Linear(3000, 3000)
    assert len(pickle.dumps(program)) < 20_000


def test_everything_that_the_block_made_is_deferred_wherever_it_is_kept() -> None:
    class Keeper:
        pass

    keeper = Keeper()
    with lateinit.deferred():
        keeper.tensor = torch.ones(3)
        keeper.view = keeper.tensor[1:]
        keeper.parameter = nn.Parameter(torch.zeros(2))
        kept = {"list": [torch.eye(2)], "split": torch.arange(6).split(2)}
    for tensor in (keeper.tensor, keeper.view, keeper.parameter, *kept["list"], *kept["split"]):
        assert lateinit.is_deferred(tensor)
        assert repr(tensor).startswith("<deferred")
    lateinit.materialize([keeper.view, kept])
    assert torch.equal(keeper.view, torch.ones(2))
    assert torch.equal(kept["split"][1], torch.tensor([2, 3]))


def test_real_tensors_stay_real_in_the_block_and_after() -> None:
    real = torch.ones(3)
    with lateinit.deferred():
        real += 1
        assert real.sum().item() == 6
        total = real + torch.ones(3)
        layer = nn.Linear(3, 3)
        layer.register_buffer("outside", real)
    assert torch.equal(real, torch.full((3,), 2.0))
    assert layer.outside is real
    assert not lateinit.is_deferred(real)
    assert torch.equal(lateinit.materialize(total), torch.full((3,), 3.0))


def test_is_deferred_asks_about_anything_that_holds_tensors() -> None:
    layer = lateinit.deferred_init(nn.Linear, 3, 3)
    assert lateinit.is_deferred(layer)
    assert lateinit.is_deferred(layer.weight)
    assert lateinit.is_deferred([{"a": (layer,)}])
    lateinit.materialize(layer.weight)
    assert not lateinit.is_deferred(layer.weight)
    assert lateinit.is_deferred(layer)
    for other in (nn.Linear(3, 3), nn.Linear(3, 3, device="meta"), torch.ones(2), [], 3, None):
        assert not lateinit.is_deferred(other)


def test_block_can_be_opened_in_inference_mode_and_without_gradients() -> None:
    for mode in (torch.no_grad, torch.inference_mode):
        torch.manual_seed(0)
        with mode():
            expected = nn.Linear(3, 3)
        torch.manual_seed(0)
        with mode(), lateinit.deferred():
            layer = nn.Linear(3, 3)
        assert_same(expected, lateinit.materialize(layer))


def test_gradients_are_as_they_were_in_the_block() -> None:
    with lateinit.deferred():
        layer = nn.Linear(3, 3)
        assert torch.is_grad_enabled()
        assert layer.weight.requires_grad
        assert not layer.weight.detach().requires_grad
        assert (layer.weight * 2).requires_grad
        with torch.no_grad():
            assert not (layer.weight * 2).requires_grad


def test_out_of_unknown_size_has_the_shape_that_it_has_eagerly() -> None:
    def found() -> list[torch.Tensor]:
        places, rest = torch.empty(0, dtype=torch.int64), torch.zeros(4)
        torch.nonzero(torch.tensor([0, 1, 1]), out=places)
        torch.masked_select(torch.arange(6.0), torch.arange(6) > 2, out=rest[:3])
        return [places, torch.ones(len(places)), rest]

    expected, late = found(), lateinit.deferred_init(found)
    assert [t.shape for t in late] == [t.shape for t in expected]
    assert all(map(torch.equal, lateinit.materialize(late), expected))


def test_streams_are_told_apart_by_states_taken_from_the_generator_itself() -> None:
    def build() -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(3)
        first = [torch.empty(20).uniform_(generator=generator) for _ in range(2)]
        in_first = generator.get_state()
        generator.manual_seed(4)
        second = [torch.empty(20).uniform_(generator=generator) for _ in range(3)]
        in_second = generator.get_state()
        second.append(torch.empty(20).uniform_(generator=generator))
        generator.set_state(in_first)
        first.append(torch.empty(20).uniform_(generator=generator))
        generator.set_state(in_second)
        second.append(torch.empty(20).uniform_(generator=generator))
        return first + second

    expected = build()
    with lateinit.deferred():
        found = build()
    for eager, tensor in zip(expected, lateinit.materialize(found), strict=True):
        assert torch.equal(eager, tensor)


def test_every_tensor_goes_by_its_path_from_the_outermost_module() -> None:
    with lateinit.deferred():
        inner = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2)))
        model = nn.ModuleDict({"left": nn.Sequential(inner), "right": nn.Linear(2, 2)})
    for name, parameter in model.named_parameters():
        with pytest.raises(lateinit.errors.DeferredTensorError, match=f"'{name}'"):
            parameter.tolist()


def test_module_that_is_put_into_itself_has_names_all_the_same() -> None:
    with lateinit.deferred():
        model = nn.Linear(2, 2)
        model.again = nn.Module()
        model.again.model = model
    with pytest.raises(lateinit.errors.DeferredTensorError, match="weight"):
        model.weight.tolist()


@pytest.mark.parametrize("sizes", [(0,), (3, 0)])
def test_any_of_nothing_is_false(sizes: tuple[int, ...]) -> None:
    with lateinit.deferred():
        assert not bool((torch.empty(sizes).normal_() < 100).any())
        assert bool((torch.empty(3).normal_() < 100).any())


def test_what_the_caller_made_on_meta_stays_there_and_is_not_asked_for() -> None:
    class Takes(nn.Module):
        def __init__(self, table: torch.Tensor, weight: nn.Parameter) -> None:
            super().__init__()
            self.weight, self.next = weight, table + 1
            self.register_buffer("table", table)
            self.layer = nn.Linear(2, 2)

    table, weight = (torch.empty(3, device="meta") for _ in range(2))
    model = lateinit.deferred_init(Takes, table, nn.Parameter(weight))
    assert model.table is table
    lateinit.materialize(model)
    assert all(t.is_meta for t in (model.weight, model.table, model.next))
    assert not model.layer.weight.is_meta
    with pytest.raises(lateinit.errors.NotRecordedError, match="never recorded: weight, bias"):
        lateinit.materialize(nn.Linear(2, 2, device="meta"))


def test_function_that_another_library_replaced_is_its_own_after_the_block(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    apply, fill, save = nn.Module.apply, nn.init._no_grad_fill_, torch.to_dlpack
    theirs = [functools.partial(function) for function in (apply, fill, save)]
    places = [(nn.Module, "apply"), (nn.init, "_no_grad_fill_"), (torch, "to_dlpack")]
    for (owner, name), function in zip(places, theirs, strict=True):
        monkeypatch.setattr(owner, name, function)
    for _ in range(2):
        lateinit.deferred_init(nn.Linear, 2, 2)
    assert [vars(owner)[name] for owner, name in places] == theirs
