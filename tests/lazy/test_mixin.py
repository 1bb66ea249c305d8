"""The two mixins: torch's protocol and that of pytorch-pfn-extras, and ``lazy`` of any class."""

from __future__ import annotations

import copy
import pickle
import weakref
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.parameter import is_lazy

import lateinit
from lateinit.errors import RuleError, ShapeError, UninitializedError
from tests.support.snapshots import assert_same

size = lateinit.size


class Scale(lateinit.nn.LazyModuleMixin, nn.Module):
    """Written as for torch's mixin."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = lateinit.nn.UninitializedParameter(known_shape=(None, 2))
        self.register_buffer("seen", lateinit.nn.UninitializedBuffer())

    def initialize_parameters(self, x: torch.Tensor, **_: Any) -> None:
        if self.has_uninitialized_params():
            self.weight.materialize((x.shape[-1], 2))
            self.seen.materialize(x.shape[-1:])
            nn.init.normal_(self.weight)
            nn.init.ones_(self.seen)

    def forward(self, x: torch.Tensor, *, times: int = 1) -> torch.Tensor:
        return times * (x * self.seen) @ self.weight


class PlainScale(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width, 2))
        self.register_buffer("seen", torch.ones(width))
        nn.init.normal_(self.weight)


class BecomesPlain(Scale):
    cls_to_become = PlainScale


def test_code_written_for_torchs_mixin_draws_at_its_place() -> None:
    torch.manual_seed(0)
    with lateinit.deferred():
        model = nn.Sequential(nn.Linear(2, 3), BecomesPlain(), nn.Linear(2, 2))
    lateinit.infer_shapes(model, torch.ones(1, 2))
    torch.manual_seed(0)
    twin = nn.Sequential(nn.Linear(2, 3), PlainScale(3), nn.Linear(2, 2))
    assert_same(twin, lateinit.materialize(model))


def test_a_mixed_in_module_initialises_on_its_first_forward_and_keeps_its_objects() -> None:
    module = Scale()
    held = module.weight
    assert module(torch.ones(4, 3), times=2).shape == (4, 2)
    assert module.weight is held
    assert type(held) is nn.Parameter
    assert type(module) is Scale
    assert not hasattr(module, "_initialize_hook")


def test_state_dicts_of_a_mixed_in_module_in_four_combinations() -> None:
    ready, other, lazy, lazy_too = (Scale() for _ in range(4))
    ready(torch.ones(1, 3))
    other(torch.ones(1, 3))
    other.load_state_dict(ready.state_dict())
    assert torch.equal(other.weight, ready.weight)
    lazy.load_state_dict(lazy_too.state_dict())
    assert is_lazy(lazy.weight)
    lazy.load_state_dict(ready.state_dict())
    assert torch.equal(lazy.weight, ready.weight)
    assert torch.equal(lazy(torch.ones(1, 3)), ready(torch.ones(1, 3)))
    with pytest.raises(RuntimeError, match="uninitialised state cannot be loaded"):
        ready.load_state_dict(lazy_too.state_dict())


def test_a_mixed_in_module_checks_what_is_known() -> None:
    state = {"weight": torch.ones(3, 5), "seen": torch.ones(3)}
    with pytest.raises(
        RuntimeError, match=r"weight: .* has \(3, 5\), but dim 1 must be 2, as in \(\?, 2\)"
    ):
        Scale().load_state_dict(state)
    with pytest.raises(ShapeError, match="dim 1 must be 2"):
        Scale().weight.materialize((3, 4))


def test_a_mixed_in_module_that_leaves_a_placeholder_is_named() -> None:
    class Half(Scale):
        def initialize_parameters(self, x: torch.Tensor, **_: Any) -> None:
            self.seen.materialize(x.shape[-1:])

    with pytest.raises(UninitializedError, match=r"has not been fully initialized.* left weight"):
        Half()(torch.ones(1, 3))


@pytest.mark.parametrize("again", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_mixed_in_module_survives_copies(again: Any) -> None:
    module = again(Scale())
    assert module.weight.known_shape == (None, 2)
    assert module(torch.ones(1, 3)).shape == (1, 2)
    assert again(module).weight.shape == (3, 2)


class Block(nn.Module):
    """A third party's: two sizes, a child, a tie, a table, and a list of parameters."""

    def __init__(self, dim: int, heads: int, hidden: int = 6) -> None:
        super().__init__()
        assert dim % heads == 0
        self.heads, self.head_dim = heads, dim // heads
        self.up = nn.Linear(dim, hidden)
        self.scale = nn.Parameter(torch.randn(dim) * dim**-0.5)
        self.tied = self.scale
        self.mine = [self.scale]
        self.table = torch.linspace(0, 1, dim)
        self.register_buffer("mask", torch.ones(dim, dim).tril(), persistent=False)
        self.down = lateinit.nn.LazyLinear(dim)
        self.bound = self.helped

    def helped(self, x: torch.Tensor) -> torch.Tensor:
        return self.up(x * self.scale + self.table)

    def forward(self, x: torch.Tensor, *, context: torch.Tensor | None = None) -> torch.Tensor:
        return self.down(self.bound(x))


class EagerBlock(Block):
    def __init__(self, dim: int, heads: int, hidden: int = 6) -> None:
        nn.Module.__init__(self)
        self.heads, self.head_dim = heads, dim // heads
        self.up = nn.Linear(dim, hidden)
        self.scale = nn.Parameter(torch.randn(dim) * dim**-0.5)
        self.tied = self.scale
        self.mine = [self.scale]
        self.table = torch.linspace(0, 1, dim)
        self.register_buffer("mask", torch.ones(dim, dim).tril(), persistent=False)
        self.down = nn.Linear(hidden, dim)
        self.bound = self.helped


def test_a_lazy_version_of_any_class_equals_its_eager_twin_lazy_children_too() -> None:
    torch.manual_seed(0)
    with lateinit.deferred():
        model = nn.Sequential(lateinit.lazy(Block, dim=size(-1))(heads=4), nn.Linear(8, 2))
    block = model[0]
    held, up, watched = block.scale, block.up, weakref.ref(block.up.weight)
    lateinit.infer_shapes(model, torch.empty(2, 8, device="meta"))
    assert type(block) is Block
    assert block.up is up
    assert block.scale is held
    assert block.tied is held
    assert block.mine[0] is held
    assert watched() is block.up.weight
    assert block.bound.__self__ is block
    torch.manual_seed(0)
    twin = nn.Sequential(EagerBlock(8, 4), nn.Linear(8, 2))
    twin[0].__class__ = Block
    assert_same(twin, lateinit.materialize(model))
    assert torch.equal(model(torch.ones(1, 8)), twin(torch.ones(1, 8)))


def test_outside_a_block_a_lazy_version_is_initialised_by_its_first_forward() -> None:
    block = lateinit.lazy(Block, dim=size(-1))(4)
    assert block.up.weight.known_shape == (6, None)
    assert block.head_dim == 0
    torch.manual_seed(1)
    block(torch.ones(2, 8))
    torch.manual_seed(1)
    twin = EagerBlock(8, 4)
    assert torch.equal(twin.up.weight, block.up.weight)
    assert torch.equal(twin.scale, block.scale)
    assert block.head_dim == 2


def test_a_rule_may_be_a_function_of_the_forward_arguments() -> None:
    made = lateinit.lazy(Block, dim=lambda x, context=None: x.shape[-1] + context.shape[-1])
    block = made(heads=2)
    with pytest.raises(RuntimeError, match="must match"):
        block(torch.ones(2, 3), context=torch.ones(2, 5))  # the block's own forward ignores it
    assert block.head_dim == 4


def test_a_rule_may_give_several_sizes() -> None:
    norm = lateinit.lazy(nn.LayerNorm, normalized_shape=size(-2, -1))()
    assert norm.weight.known_shape == (None, None)
    norm(torch.ones(2, 3, 4))
    assert norm.normalized_shape == (3, 4)


def test_a_size_that_is_given_is_not_inferred() -> None:
    layer = lateinit.nn.LazyMultiheadAttention(2, kdim=6, vdim=4)
    x, k, v = torch.ones(1, 2, 8), torch.ones(1, 2, 6), torch.ones(1, 2, 4)
    assert layer.k_proj_weight.known_shape == (None, 6)
    layer(x, k, v)
    assert layer.k_proj_weight.shape == (8, 6)
    assert type(lateinit.nn.LazyLinear(3, in_features=2)) is nn.Linear


@pytest.mark.parametrize("again", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_instances_of_a_lazy_version_survive_copies(again: Any) -> None:
    block = again(lateinit.lazy(Block, dim=size(-1))(4))
    block(torch.ones(2, 8))
    assert type(again(block)) is Block


def test_lazy_versions_of_one_class_by_one_rule_are_one_class() -> None:
    assert lateinit.lazy(Block, dim=size(-1)) is lateinit.lazy(Block, dim=size(-1))


def test_a_subclass_of_a_lazy_layer_keeps_what_it_adds() -> None:
    class Extra(lateinit.nn.LazyLinear):
        def __init__(self, out: int) -> None:
            super().__init__(out)
            self.extra = nn.Parameter(torch.zeros(2))
            self.note = "kept"

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) + self.extra.sum()

    layer = Extra(3)
    layer(torch.ones(2, 4))
    assert type(layer) is Extra  # so that its forward stays its own
    assert layer.note == "kept"
    assert set(dict(layer.named_parameters())) == {"weight", "bias", "extra"}


def test_flags_that_were_changed_before_inference_stay() -> None:
    layer = lateinit.nn.LazyBatchNorm1d().eval()
    layer.momentum = 0.5
    layer.weight.requires_grad_(requires_grad=False)
    layer(torch.ones(2, 3))
    assert (layer.training, layer.momentum) == (False, 0.5)
    assert not layer.weight.requires_grad
    assert layer.bias.requires_grad


def test_tied_placeholders_stay_tied() -> None:
    model = nn.Sequential(lateinit.nn.LazyLinear(3), lateinit.nn.LazyLinear(3))
    model[1].weight = model[0].weight
    model(torch.ones(2, 3))
    assert model[1].weight is model[0].weight
    other = nn.Sequential(lateinit.nn.LazyLinear(3), lateinit.nn.LazyLinear(3))
    other[1].weight = other[0].weight
    with pytest.raises(ShapeError, match=r"weight: a tensor of shape \(3, 4\) .* needs \(3, 3\)"):
        other(torch.ones(2, 4))


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"in_feature": size(-1)}, "has no argument 'in_feature'; there are: in_features"),
        ({"in_features": 3}, "a rule is lateinit.size"),
        ({}, "needs at least one rule"),
    ],
)
def test_rules_that_do_not_fit_their_class_are_refused(rules: Any, message: str) -> None:
    with pytest.raises(RuleError, match=message):
        lateinit.lazy(nn.Linear, **rules)


def test_a_class_that_no_trial_size_suits_is_named() -> None:
    class Seven(nn.Module):
        def __init__(self, dim: int) -> None:
            super().__init__()
            if dim != 7:
                raise ValueError("only seven will do")

    with pytest.raises(RuleError, match=r"Seven cannot be made lazy in dim: .* only seven will do"):
        lateinit.lazy(Seven, dim=size(-1))()


def test_only_modules_can_be_made_lazy() -> None:
    with pytest.raises(TypeError, match=r"subclass of torch\.nn\.Module"):
        lateinit.lazy(dict, x=size(-1))


def test_wrong_arguments_are_refused_as_by_the_class() -> None:
    with pytest.raises(TypeError, match=r"LazyLinear.*missing a required argument: 'out_features'"):
        lateinit.nn.LazyLinear()


class Awkward(nn.Module):
    """Arguments by place only, by name only, and more of both."""

    def __init__(self, out: int, dim: int, /, *more: int, flag: bool = False, **other: int) -> None:
        super().__init__()
        self.layer = nn.Linear(dim, out)
        self.more, self.flag, self.other = more, flag, other

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


def test_arguments_may_be_by_place_only_and_of_any_number() -> None:
    layer = lateinit.lazy(Awkward, dim=size(-1))(4, 7, 8, flag=True, note=9)
    assert layer.layer.weight.known_shape == (4, None)
    layer(torch.ones(2, 3))
    assert layer.layer.in_features == 3
    assert (layer.more, layer.flag, layer.other) == ((7, 8), True, {"note": 9})


def test_a_rule_may_be_for_an_argument_that_is_taken_out_of_any_others() -> None:
    class Open(nn.Module):
        def __init__(self, out: int, **other: int) -> None:
            super().__init__()
            self.layer = nn.Linear(other["dim"], out)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(x)

    assert lateinit.lazy(Open, dim=size(-1))(4)(torch.ones(2, 3)).shape == (2, 4)
    with pytest.raises(RuleError, match=r"Open cannot be made lazy in dimm: .*KeyError: 'dim'"):
        lateinit.lazy(Open, dimm=size(-1))(4)


def test_a_class_that_forwards_all_to_a_plain_layer_has_its_arguments() -> None:
    class Forwards(nn.Linear):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.note = 1

    layer = lateinit.lazy(Forwards, in_features=size(-1))(4, bias=False)
    assert layer(torch.ones(2, 3)).shape == (2, 4)
    with pytest.raises(RuleError, match="no argument 'in_feature'; there are: in_features"):
        lateinit.lazy(Forwards, in_feature=size(-1))
