"""Law 4 for every lazy layer wherever it may stand, and all else that it has to live through."""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

import lateinit
from tests.support.lazy_cases import CASES, LazyCase
from tests.support.snapshots import assert_same

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = [
    pytest.mark.filterwarnings("ignore:LSTM with projections:UserWarning"),
    pytest.mark.filterwarnings("ignore:Lazy modules are a new feature"),
]
ON_SHAPES = [case for case in CASES if case.layer != "AdaptiveLogSoftmaxWithLoss"]  # reads values
BY_CASE = pytest.mark.parametrize("case", ON_SHAPES, ids=str)


def built(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return make()


def declared(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    with lateinit.deferred():
        return make()


def assert_law_4(case: LazyCase, make: Callable[[Callable[[], nn.Module]], nn.Module]) -> None:
    model = declared(lambda: make(lambda: case.lazy))
    lateinit.infer_shapes(model, *case.inputs())
    assert_same(built(lambda: make(lambda: case.eager)), lateinit.materialize(model))


class Chain(nn.Sequential):
    """A sequence whose members take and give several inputs, the layer in the middle."""

    def forward(self, *inputs: torch.Tensor) -> Any:
        self[0](inputs[0].new_ones(1, 2))
        found = self[1](*inputs)
        self[2](inputs[0].new_ones(1, 3))
        return found


class Shared(nn.Module):
    """One layer under two names, called twice."""

    def __init__(self, make: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.before = nn.Linear(2, 2)
        self.one = make()
        self.two = nn.ModuleDict({"again": self.one, "other": nn.Linear(2, 2)})

    def forward(self, *inputs: torch.Tensor) -> Any:
        return self.one(*inputs), self.two["again"](*inputs)


class Holder(nn.Module):
    """A module that may be lazy itself and holds a layer that may be lazy too."""

    def __init__(self, width: int, make: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.before = nn.Linear(width, 2)
        self.inner = make()
        self.after = nn.Parameter(torch.randn(width))

    def forward(self, *inputs: torch.Tensor) -> Any:
        return self.before(inputs[0] * self.after), self.inner(*inputs)


def plain_dtype(case: LazyCase) -> LazyCase:
    """Without a dtype of its own, for models whose other layers have the default one."""
    arguments = {name: value for name, value in case.arguments.items() if name != "dtype"}
    return replace(case, arguments=arguments)


@BY_CASE
def test_law_4_in_a_sequence(case: LazyCase) -> None:
    assert_law_4(plain_dtype(case), lambda make: Chain(nn.Linear(2, 2), make(), nn.Linear(3, 3)))


@BY_CASE
def test_law_4_for_a_layer_that_is_shared(case: LazyCase) -> None:
    assert_law_4(case, Shared)


@BY_CASE
def test_law_4_nested_in_a_module_that_is_lazy_itself(case: LazyCase) -> None:
    case = plain_dtype(case)
    lazy = lateinit.lazy(Holder, width=lambda *inputs: inputs[0].shape[-1])
    model = declared(lambda: nn.ModuleList([lazy(make=lambda: case.lazy), nn.Linear(2, 2)]))
    lateinit.infer_shapes(model[0], *case.inputs())
    width = case.shapes[0][-1]
    twin = built(
        lambda: nn.ModuleList([Holder(width, make=lambda: case.eager), nn.Linear(2, 2)]),
    )
    assert_same(twin, lateinit.materialize(model))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
@BY_CASE
def test_law_4_in_another_dtype(case: LazyCase, dtype: torch.dtype) -> None:
    case = replace(case, arguments={**case.arguments, "dtype": dtype})
    model = declared(lambda: nn.ModuleList([case.lazy, nn.Linear(2, 2)]))
    lateinit.infer_shapes(model[0], *case.inputs())
    twin = built(lambda: nn.ModuleList([case.eager, nn.Linear(2, 2)]))
    assert_same(twin, lateinit.materialize(model))
    assert all(p.dtype == dtype for p in model[0].parameters())


@BY_CASE
def test_law_4_on_real_inputs_in_eval_mode_without_gradients(case: LazyCase) -> None:
    model = declared(lambda: nn.ModuleList([case.lazy, nn.Linear(2, 2)])).eval()
    with torch.inference_mode():
        lateinit.infer_shapes(model[0], *(x.clone() for x in case.inputs("cpu")))
    twin = built(lambda: nn.ModuleList([case.eager, nn.Linear(2, 2)])).eval()
    assert_same(twin, lateinit.materialize(model))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_nothing_lazy_is_left_on_a_layer_that_is_initialised(case: LazyCase) -> None:
    torch.manual_seed(0)
    eager = case.eager
    eager(*case.inputs("cpu"))
    torch.manual_seed(0)
    layer = case.lazy
    layer(*case.inputs("cpu"))
    assert vars(layer).keys() == vars(eager).keys()
    for name in (
        "_forward_pre_hooks",
        "_forward_pre_hooks_with_kwargs",
        "_load_state_dict_pre_hooks",
    ):
        assert len(getattr(layer, name)) == len(getattr(eager, name))
    for again in (copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))):
        assert_same(eager, again(layer))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_hooks_run_in_their_order_and_see_an_initialised_layer(case: LazyCase) -> None:
    called: list[str] = []
    layer = case.lazy

    def noted(name: str) -> Callable[..., None]:
        return lambda module, *_: called.append(f"{name} {type(module).__name__}")

    layer.register_forward_pre_hook(noted("first"))
    layer.register_forward_hook(noted("third"))
    layer.register_forward_pre_hook(noted("second"))
    layer.register_forward_hook(noted("fourth"), always_call=True)
    kept = {name: list(getattr(layer, name).values())[-2:] for name in HOOKS}
    layer(*case.inputs("cpu"))
    expected = [f"{n} {case.layer}" for n in ("first", "second", "third", "fourth")]
    assert called == expected
    assert {name: list(getattr(layer, name).values()) for name in HOOKS} == kept
    called.clear()
    layer(*case.inputs("cpu"))
    assert called == expected


HOOKS = ("_forward_pre_hooks", "_forward_hooks")
COMPILED = [
    "Linear", "Conv2d", "ConvTranspose1d", "BatchNorm2d", "GroupNorm", "LayerNorm", "RMSNorm",
    "PReLU", "GRUCell", "MultiheadAttention", "TransformerEncoderLayer",
]  # fmt: skip


@pytest.mark.parametrize("lazy", [True, False], ids=["lazy", "inferred"])
@pytest.mark.parametrize("layer", COMPILED)
def test_a_model_is_compiled_lazy_or_inferred(layer: str, lazy: bool) -> None:
    case = next(case for case in CASES if case.layer == layer)
    model = Chain(nn.Linear(2, 2), case.lazy, nn.Linear(3, 3))
    inputs = case.inputs("cpu")
    if not lazy:
        lateinit.infer_shapes(model, *inputs)
    torch.compiler.reset()
    compiled = torch.compile(model, backend="eager")
    found, expected = compiled(*inputs), model(*inputs)
    assert type(model[1]) is type(case.eager)
    for a, b in zip(flat(found), flat(expected), strict=True):
        assert torch.equal(a, b)


def flat(result: Any) -> list[torch.Tensor]:
    return (
        [result] if isinstance(result, torch.Tensor) else [t for part in result for t in flat(part)]
    )


def mixed(lazy: bool) -> nn.Module:
    theirs = pytest.importorskip("pytorch_pfn_extras").nn
    ours, pfn = lateinit.nn, lateinit.pfn_extras
    return nn.Sequential(
        ours.LazyConv2d(6, 3) if lazy else nn.Conv2d(3, 6, 3),
        nn.LazyBatchNorm2d() if lazy else nn.BatchNorm2d(6),
        theirs.LazyConv2d(None, 4, 3) if lazy else nn.Conv2d(6, 4, 3),
        pfn.LazyBatchNorm2d(None) if lazy else nn.BatchNorm2d(4),
        nn.Flatten(),
        nn.LazyLinear(6) if lazy else nn.Linear(64, 6),
        pfn.LazyLinear(None, 5) if lazy else nn.Linear(6, 5),
        lateinit.lazy(nn.Linear, in_features=lateinit.size(-1))(4) if lazy else nn.Linear(5, 4),
        theirs.LazyLinear(None, 3) if lazy else nn.Linear(4, 3),
        nn.Linear(3, 2),
    )


def test_layers_of_all_four_kinds_are_mixed_in_a_block() -> None:
    model = declared(lambda: mixed(True))
    lateinit.infer_shapes(model, torch.empty(2, 3, 8, 8, device="meta"))
    lateinit.materialize(model)
    twin = built(lambda: mixed(False))
    for tensors in (nn.Module.named_parameters, nn.Module.named_buffers):
        found, expected = dict(tensors(model)), dict(tensors(twin))
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(model(x), twin(x))


@pytest.mark.filterwarnings("ignore:(?s).*Use of uninitialized lazy parameter:UserWarning")
@pytest.mark.parametrize("block", [True, False])
@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_an_optimizer_over_lazy_parameters_of_all_kinds_trains_them_as_the_twins(
    block: bool, kind: Any
) -> None:
    model = declared(lambda: mixed(True)) if block else mixed(True)
    optimizer = kind(model.parameters(), lr=0.1)
    torch.manual_seed(0)
    lateinit.infer_shapes(model, torch.empty(2, 3, 8, 8, device="meta"))
    lateinit.materialize(model)
    twin = built(lambda: mixed(False))
    other = kind(twin.parameters(), lr=0.1)
    twin.load_state_dict(model.state_dict())
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for each, steps in ((model, optimizer), (twin, other)):
        each(torch.arange(384.0).view(2, 3, 8, 8).sin()).square().sum().backward()
        steps.step()
    for (name, found), expected in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert torch.equal(found, expected), name
    # A bias before a batch norm has no gradient to speak of.
    still = {n for n, p in model.named_parameters() if torch.equal(p, before[n])}
    assert still <= {"0.bias", "2.bias"}


@pytest.mark.parametrize(
    "change",
    [
        copy.deepcopy,
        nn.Module.half,
        nn.Module.double,
        lambda m: m.to("cpu", torch.bfloat16),
        lambda m: copy.deepcopy(copy.deepcopy(m).double()).float(),
    ],
)
@pytest.mark.parametrize("layer", [lambda: nn.LazyLinear(3), lambda: nn.LazyConv1d(3, 2)])
def test_torch_s_own_lazy_layers_may_be_copied_and_cast_after_the_block(
    layer: Any, change: Any
) -> None:
    def build() -> nn.Module:
        return nn.Sequential(nn.Linear(5, 5), layer(), nn.Linear(3, 2))

    model = change(lateinit.deferred_init(build))
    shape = (2, 5) if isinstance(model[1], nn.Linear) else (2, 7, 5)
    example = torch.empty(shape, device="meta", dtype=model[0].weight.dtype)
    lateinit.infer_shapes(model[1], example)
    lateinit.materialize(model)
    assert all(p.device.type == "cpu" for p in model.parameters())
    assert not lateinit.is_deferred(model)
    dtypes = {p.dtype for p in model.parameters()}
    assert len(dtypes) == 1
    assert all(bool(p.float().std() > 0) for p in model[1].parameters())
