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
# Torch's own placeholders remember nothing, and the reset_parameters of its lazy layers is its own.
PAIRS = [
    (head, way)
    for head in sorted(HEADS)
    for way in sorted(WAYS)
    if head != "torch" or way not in ("directly", "each reset")
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
    lateinit.load_checkpoint(other, tmp_path / "twin.safetensors")
    for each in (model, other):
        lateinit.infer_shapes(each, torch.ones(3, 5))
        assert_equal(twin, lateinit.materialize(each))


@pytest.mark.parametrize(("head", "way"), [pair for pair in PAIRS if pair[0] != "torch"])
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


@pytest.mark.parametrize(
    "write",
    [
        lambda p: p.data.normal_(),
        lambda p: p.data.fill_(7),
        lambda p: init.constant_(p.data, 9),
        init.zeros_,
        init.xavier_uniform_,
    ],
)
def test_in_a_block_torchs_own_placeholders_refuse_what_would_be_lost(write: Any) -> None:
    def build() -> nn.Module:
        layer = nn.LazyLinear(3)
        write(layer.weight)
        return layer

    with pytest.raises(UninitializedError, match="in another deferred"):
        lateinit.deferred_init(build)


def test_apply_to_what_initialises_itself_in_its_first_call_is_refused() -> None:
    class Scale(lateinit.pfn_extras.LazyInitializationMixin, nn.Module):
        lazy_parameter_names = ("weight",)

    def build(way: Any) -> None:
        way(Scale())

    with pytest.raises(UninitializedError, match=r"apply cannot be postponed for Scale"):
        lateinit.deferred_init(build, lambda scale: scale.apply(reset))
    with pytest.raises(UninitializedError, match="uninitialized parameter"):
        lateinit.deferred_init(build, lambda scale: scale.weight.data.zero_())


def test_a_first_forward_that_would_leave_it_out_is_refused() -> None:
    model = lateinit.deferred_init(lambda: nn.Sequential(nn.LazyLinear(3)).apply(scaled))
    with pytest.raises(UninitializedError, match=r"LazyLinear|Linear.*call lateinit\.infer_shapes"):
        model(torch.ones(2, 4))
