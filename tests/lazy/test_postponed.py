"""Initialisations of a lazy layer before its shape is known: run at their place, or refused."""

from __future__ import annotations

import copy
import pickle
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn
from torch.nn import init

import lateinit
from lateinit.errors import UninitializedError
from tests.support.snapshots import assert_same

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")

HEADS: dict[str, Callable[..., nn.Module]] = {
    "ours": lambda lazy: lateinit.nn.LazyLinear(6) if lazy else nn.Linear(4, 6),
    "pfn-extras": lambda lazy: lateinit.pfn_extras.LazyLinear(None, 6) if lazy else nn.Linear(4, 6),
    "pfn-extras' own": lambda lazy: (
        pytest.importorskip("pytorch_pfn_extras").nn.LazyLinear(None, 6)
        if lazy
        else nn.Linear(4, 6)
    ),
    "torch": lambda lazy: nn.LazyLinear(6) if lazy else nn.Linear(4, 6),
}


class Block(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.up = nn.Linear(dim, 4)
        self.scale = nn.Parameter(torch.randn(dim))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.up(x * self.scale)


class Net(nn.Module):
    def __init__(self, lazy: bool, head: str, finish: Callable[[Any], None]) -> None:
        super().__init__()
        self.first = nn.Linear(5, 4)
        self.norm = lateinit.nn.LazyBatchNorm1d() if lazy else nn.BatchNorm1d(4)
        self.block = lateinit.lazy(Block, dim=lateinit.size(-1))() if lazy else Block(4)
        self.head = HEADS[head](lazy)
        self.head.narrow = True
        self.last = nn.Linear(6, 3)
        finish(self)
        self.after = nn.Linear(3, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.after(self.last(self.head(self.block(self.norm(self.first(x))))))


def scaled(module: nn.Module) -> None:
    """Reads shapes and an attribute."""
    if isinstance(module, nn.Linear):
        std = module.weight.shape[1] ** -0.5 if getattr(module, "narrow", False) else 0.02
        module.weight.data.normal_(0, std)
        module.bias.data.zero_()
    if isinstance(module, nn.BatchNorm1d):
        init.uniform_(module.weight)
        module.weight.data.mul_(2)


def reset(module: nn.Module) -> None:
    if hasattr(module, "reset_parameters"):
        module.reset_parameters()


def directly(net: Any) -> None:
    init.zeros_(net.head.bias)
    init.xavier_uniform_(net.head.weight)
    net.head.weight.data.normal_()
    net.head.bias.detach().fill_(3)
    init.trunc_normal_(net.block.up.weight, std=0.02)
    init.kaiming_normal_(net.block.up.weight.data)
    net.norm.weight.data.uniform_()
    init.constant_(net.norm.bias.data, 9)
    with torch.no_grad():
        net.head.weight.mul_(0.5).div_(3).clamp_(-1, 1)
        net.head.weight.add_(torch.ones(()).item())
    init.orthogonal_(net.block.up.weight)


def each_reset(net: Any) -> None:
    for part in (net.head, net.block.up, net.norm):
        part.reset_parameters()


WAYS: dict[str, Callable[[Any], None]] = {
    "apply": lambda net: net.apply(scaled),
    "apply twice": lambda net: net.apply(scaled).apply(reset),
    "directly": directly,
    "each reset": each_reset,
    "reset": lambda net: net.apply(reset),
}
THEIRS = ("pfn-extras' own", "torch")
# The placeholders of other libraries remember nothing.
PAIRS = [
    (head, way)
    for head in sorted(HEADS)
    for way in sorted(WAYS)
    if head not in THEIRS or way != "directly"
]
BY_PAIR = pytest.mark.parametrize(("head", "way"), PAIRS)


def twins(head: str, way: str) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    twin = Net(False, head, WAYS[way])
    torch.manual_seed(0)
    model = lateinit.deferred_init(Net, True, head, WAYS[way])
    return twin, model


def assert_equal(twin: nn.Module, model: nn.Module) -> None:
    found, expected = model.state_dict(), twin.state_dict()
    assert found.keys() == expected.keys()
    assert [name for name in found if not torch.equal(found[name], expected[name])] == []
    parts = (*model.modules(), *model.parameters())
    assert not [name for part in parts for name in vars(part) if "postponed" in name]
    assert all(not part._forward_pre_hooks for part in model.modules())


@pytest.mark.parametrize("real", [False, True])
@BY_PAIR
def test_it_is_run_at_its_place_in_the_random_stream(head: str, way: str, real: bool) -> None:
    twin, model = twins(head, way)
    assert lateinit.infer_shapes(model, torch.ones(3, 5), real=real) == []
    assert_equal(twin, lateinit.materialize(model))


@BY_PAIR
def test_copies_have_it_too(head: str, way: str) -> None:
    twin, model = twins(head, way)
    for each in (copy.deepcopy(model), model):
        lateinit.infer_shapes(each, torch.ones(3, 5))
        assert_equal(twin, lateinit.materialize(each))


@BY_PAIR
def test_a_checkpoint_comes_after_it(head: str, way: str, tmp_path: Any) -> None:
    twin, model = twins(head, way)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.add_(1)
    other = copy.deepcopy(model)
    model.load_state_dict(twin.state_dict())
    lateinit.save_checkpoint(twin, tmp_path / "twin.safetensors")
    if head == "pfn-extras' own":
        with pytest.raises(UninitializedError, match=r"head\.weight: call lateinit\.infer_shapes"):
            lateinit.load_checkpoint(other, tmp_path / "twin.safetensors")
        lateinit.infer_shapes(other, torch.ones(3, 5))
    lateinit.load_checkpoint(other, tmp_path / "twin.safetensors")
    for each in (model, other):
        lateinit.infer_shapes(each, torch.ones(3, 5))
        assert_equal(twin, lateinit.materialize(each))


@pytest.mark.parametrize(("head", "way"), [pair for pair in PAIRS if pair[0] not in THEIRS])
def test_a_cast_comes_after_it(head: str, way: str) -> None:
    twin, model = twins(head, way)
    twin.half().float()
    model.half().float()
    lateinit.infer_shapes(model, torch.ones(3, 5))
    assert_equal(twin, lateinit.materialize(model))


def test_a_pickled_model_has_it() -> None:
    torch.manual_seed(0)
    twin = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    init.normal_(twin[0].weight)
    torch.manual_seed(0)
    with lateinit.deferred():
        model = nn.Sequential(lateinit.nn.LazyLinear(3), nn.Linear(3, 2))
        init.normal_(model[0].weight)
    model = pickle.loads(pickle.dumps(model))
    lateinit.infer_shapes(model, torch.ones(1, 4))
    assert_same(twin, lateinit.materialize(model))


def test_apply_outside_a_block_is_as_ever() -> None:
    seen: list[nn.Module] = []
    net = nn.Sequential(lateinit.nn.LazyLinear(2), nn.ReLU())
    assert net.apply(seen.append) is net
    assert seen == [net[0], net[1], net]


REFUSED: dict[str, Callable[[Any], Any]] = {
    "asks for its size": lambda p: p.data.size(),
    "asks for its shape": lambda p: p.data.shape,
    "copies a tensor": lambda p: p.data.copy_(torch.ones(3)),
    "fills by a tensor": lambda p: p.data.fill_(torch.ones(())),
    "has a generator": lambda p: p.data.normal_(generator=torch.Generator()),
    "resizes": lambda p: p.data.resize_(3),
    "sets an item": lambda p: p.data.__setitem__(slice(None), 3),
    "sets its data": lambda p: setattr(p, "data", torch.ones(3)),
    "sets the data of its data": lambda p: setattr(p.data, "data", torch.ones(3)),
    "was cast": lambda p: p.half().normal_(),
}


@pytest.mark.parametrize("block", [True, False])
@pytest.mark.parametrize("name", sorted(REFUSED))
@pytest.mark.parametrize("held", ["bias", "weight"])
def test_what_cannot_be_remembered_is_refused_at_that_line(
    name: str, held: str, block: bool
) -> None:
    def build() -> None:
        REFUSED[name](getattr(lateinit.nn.LazyLinear(3), held))

    with pytest.raises(UninitializedError, match=rf"LazyLinear\.{held}"):
        lateinit.deferred_init(build) if block else build()


@pytest.mark.parametrize(
    "write",
    [
        lambda p: p.data.normal_(),
        lambda p: init.constant_(p.data, 9),
        init.zeros_,
        init.xavier_uniform_,
    ],
)
def test_outside_a_block_nothing_is_remembered(write: Any) -> None:
    layers = [lateinit.nn.LazyLinear(3), lateinit.deferred_init(lateinit.nn.LazyLinear, 3)]
    for layer in layers:
        with pytest.raises(UninitializedError, match=r"LazyLinear\.weight \(3, \?\)"):
            write(layer.weight)
    with lateinit.deferred(), pytest.raises(UninitializedError, match=r"LazyLinear\.weight"):
        write(layers[0].weight)  # it was made before the block


LOST: dict[str, Callable[[Any], Any]] = {
    "a factor": lambda p: p.data.mul_(2),
    "a fill of its data": lambda p: p.data.fill_(7),
    "a list of tensors": lambda p: torch._foreach_add_([p.data], 1.0),
    "a random fill": lambda p: p.data.normal_(),
    "a view of its data": lambda p: p.data.view(-1).fill_(2),
    "a word of nn.init": init.zeros_,
    "an initialiser that warns": init.kaiming_normal_,
    "an item": lambda p: p.data.__setitem__(slice(None), 3),
    "detached": lambda p: p.detach().fill_(3),
    "from a number": lambda p: p.copy_(torch.tensor(5.0)),
    "from a number, its data": lambda p: p.data.copy_(torch.tensor(5.0)),
    "nn.init on its data": lambda p: init.constant_(p.data, 9),
    "other data": lambda p: setattr(p, "data", torch.ones(3, 4)),
    "shapes are asked for": init.xavier_uniform_,
    "with other data cast": lambda p: setattr(p, "data", torch.ones(3, 4).half()),
}


@pytest.mark.parametrize("cast", [False, True])
@pytest.mark.parametrize("way", sorted(LOST))
@pytest.mark.parametrize("head", THEIRS)
def test_in_a_block_the_placeholders_of_others_refuse_what_would_be_lost(
    head: str, way: str, cast: bool
) -> None:
    def build() -> None:
        layer: Any = HEADS[head](True)
        if cast:
            layer.half()
        with torch.no_grad():
            LOST[way](layer.weight)

    with pytest.raises(UninitializedError, match=r"(?s)LazyLinear\.weight.*in another deferred"):
        lateinit.deferred_init(build)


def test_what_pfn_extras_placeholders_lose_before_they_are_registered_is_refused() -> None:
    lazy = pytest.importorskip("pytorch_pfn_extras").nn.modules.lazy
    with pytest.raises(UninitializedError, match="UninitializedParameter has no shape yet"):
        lateinit.deferred_init(lambda: lazy.UninitializedParameter().data.fill_(1))


def buffered(mixin: Any) -> Any:
    class Centre(mixin, nn.Module):  # type: ignore[misc]
        lazy_buffer_names = ("mean",)

    return Centre()


BUFFERED: dict[str, Callable[[], Any]] = {
    "pfn-extras' own": lambda: (
        buffered(
            pytest.importorskip("pytorch_pfn_extras").nn.modules.lazy.LazyInitializationMixin
        ).mean
    ),
    "pfn-extras' own layer": lambda: (
        pytest.importorskip("pytorch_pfn_extras").nn.LazyBatchNorm1d(None).half().running_mean
    ),
    "ours": lambda: buffered(lateinit.pfn_extras.LazyInitializationMixin).double().mean,
}


@pytest.mark.parametrize(
    "fill",
    [
        lambda buffer: buffer.fill_(7),
        lambda buffer: buffer.data.normal_(),
        lambda buffer: buffer.copy_(torch.ones(1)),
        init.ones_,
    ],
)
@pytest.mark.parametrize("kind", sorted(BUFFERED))
def test_in_a_block_a_lazy_buffer_refuses_a_fill_that_would_be_lost(kind: str, fill: Any) -> None:
    with pytest.raises(UninitializedError, match=r"mean has no shape yet.*in another deferred"):
        lateinit.deferred_init(lambda: fill(BUFFERED[kind]()))


def test_an_empty_tensor_that_is_no_lazy_buffer_may_be_filled_beside_one() -> None:
    def build() -> torch.Tensor:
        BUFFERED["ours"]()
        return torch.empty(0).fill_(3)

    assert lateinit.materialize(lateinit.deferred_init(build)).shape == (0,)


class Scale(lateinit.pfn_extras.LazyInitializationMixin, nn.Module):
    lazy_parameter_names = ("weight",)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.lazy_parameters_determined:
            self.weight = nn.Parameter(self.weight.new_empty(x.shape[-1]))
            init.uniform_(self.weight)
        return x * self.weight


@pytest.mark.parametrize(
    "way",
    [
        lambda scale: scale.apply(lambda m: m.weight.data.normal_(0, m.weight.shape[0])),
        lambda scale: init.normal_(scale.weight, std=4),
        lambda scale: scale.weight.data.normal_().mul_(4),
    ],
)
def test_what_initialises_itself_in_its_first_call_is_initialised_again_after_it(way: Any) -> None:
    torch.manual_seed(0)
    torch.rand(4)
    expected = torch.randn(4) * 4, nn.Linear(4, 2)
    torch.manual_seed(0)
    with lateinit.deferred():
        scale = Scale()
        way(scale)
        last = nn.Linear(4, 2)
    for each in (copy.deepcopy(scale), scale):
        lateinit.infer_shapes(each, torch.ones(2, 4))
        assert torch.equal(lateinit.materialize(each).weight, expected[0])
    assert_same(expected[1], lateinit.materialize(last))


NAMES = sorted(
    name for name, found in vars(init).items() if name.endswith("_") and not name.startswith("_")
)
BOUND_BEFORE = {name: getattr(init, name) for name in NAMES}
WIDE = {"constant_": (3.0,), "dirac_": (), "sparse_": (0.5,)}


@pytest.mark.parametrize("name", NAMES)
def test_an_initialiser_is_remembered_by_a_name_that_was_bound_before_the_block(name: str) -> None:
    def build(linear: nn.Module) -> nn.Module:
        conv = nn.Conv1d(4, 3, 2) if not lazy else lateinit.nn.LazyConv1d(3, 2)
        weight: Any = conv.weight if name == "dirac_" else linear.weight
        assert BOUND_BEFORE[name](weight, *WIDE.get(name, ())) is weight
        return nn.Sequential(linear, nn.Linear(3, 3), conv)

    lazy, example = False, torch.empty(2, 4, device="meta")
    torch.manual_seed(0)
    twin = build(nn.Linear(4, 3))
    torch.manual_seed(0)
    lazy = True
    model: Any = lateinit.deferred_init(lambda: build(lateinit.nn.LazyLinear(3)))
    lateinit.infer_shapes(model[0], example)
    lateinit.infer_shapes(model[2], torch.empty(1, 4, 5, device="meta"))
    assert_same(twin, lateinit.materialize(model))


def test_an_old_name_of_an_initialiser_is_remembered_too() -> None:
    def build(linear: nn.Module) -> nn.Module:
        with pytest.warns(FutureWarning, match="deprecated"):
            init.xavier_normal(linear.weight)  # type: ignore[attr-defined]
        return nn.Sequential(linear, nn.Linear(3, 3))

    torch.manual_seed(0)
    twin = build(nn.Linear(4, 3))
    torch.manual_seed(0)
    model = lateinit.deferred_init(lambda: build(lateinit.nn.LazyLinear(3)))
    lateinit.infer_shapes(model, torch.empty(2, 4, device="meta"))
    assert_same(twin, lateinit.materialize(model))


def test_a_first_forward_that_would_leave_it_out_is_refused() -> None:
    model = lateinit.deferred_init(lambda: nn.Sequential(nn.LazyLinear(3)).apply(scaled))
    for _ in range(2):
        with pytest.raises(UninitializedError, match=r"LazyLinear.*call lateinit\.infer_shapes"):
            model(torch.ones(2, 4))
    lateinit.infer_shapes(model, torch.ones(2, 4))
    assert lateinit.materialize(model)(torch.ones(2, 4)).shape == (2, 3)
