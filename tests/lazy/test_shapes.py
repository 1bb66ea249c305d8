"""Errors about shapes, loading by shape, and the short ways to shapes against torch's own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.parameter import is_lazy

import lateinit
from lateinit._lazy.shape_mode import ShapeMode
from lateinit._tensors.walk import is_placeholder
from lateinit.errors import NeedsValuesError, ShapeError, UninitializedError
from tests.support.snapshots import assert_same


@pytest.mark.parametrize(
    ("layer", "shapes", "message"),
    [
        ("LazyConv2d(8, 3)", [(3, 4)], r"in_channels cannot be inferred: .* 3D or 4D, .* \(3, 4\)"),
        ("LazyConv1d(8, 3)", [(1, 2, 3, 4)], "2D or 3D"),
        ("LazyConvTranspose3d(8, 3)", [(2, 3)], "4D or 5D"),
        ("LazyBatchNorm1d()", [(3,)], "2D or 3D"),
        ("LazyBatchNorm2d()", [(2, 3)], "4D"),
        ("LazyInstanceNorm2d()", [(2, 3)], "3D or 4D"),
        ("LazyGroupNorm(2)", [(2,)], "has no dim 1"),
        ("LazyLSTM(4)", [(1, 2, 3, 4)], "2D or 3D"),
        ("LazyGRUCell(4)", [(2, 3, 4)], "1D or 2D"),
        ("LazyConv2d(8, 3, groups=4)", [(1, 3, 6, 6)], "refuses .* in_channels=3: .*by groups"),
        ("LazyGroupNorm(4)", [(1, 6)], "refuses the inferred num_channels=6"),
        ("LazyMultiheadAttention(4)", [(1, 2, 6)] * 3, "refuses the inferred embed_dim=6"),
        ("LazyTransformerDecoderLayer(2)", [(1, 2, 4), (1, 2, 6)], "tgt says 4, memory says 6"),
        ("LazyMultiheadAttention(4)", [(1, 2, 8)], "was called wrongly: missing"),
    ],
)  # fmt: skip
def test_an_input_that_does_not_suit_a_lazy_layer_is_explained(
    layer: str, shapes: Any, message: str
) -> None:
    made = eval(f"lateinit.nn.{layer}")
    with pytest.raises(ShapeError, match=message):
        made(*(torch.ones(shape) for shape in shapes))
    with pytest.raises(ShapeError, match=f"0: .*{message}"):
        lateinit.infer_shapes(_Call(made), *(torch.ones(shape) for shape in shapes))
    assert all(is_lazy(t) for t in made.parameters())


class _Call(nn.Sequential):
    def forward(self, *args: torch.Tensor) -> Any:
        return self[0](*args)


def test_a_rule_about_an_input_that_is_not_there_is_explained() -> None:
    made = lateinit.lazy(nn.Linear, in_features=lateinit.size(-1, of="context"))(3)
    with pytest.raises(ShapeError, match="follows from the input 'context', which was not given"):
        made(torch.ones(2, 3))


def test_an_input_that_is_no_tensor_is_explained() -> None:
    with pytest.raises(ShapeError, match="its input 'input' must be a tensor, not list"):
        lateinit.nn.LazyLinear(3)([1, 2])


def test_packed_sequences_tell_their_size() -> None:
    lstm = lateinit.nn.LazyLSTM(4)
    packed = nn.utils.rnn.pack_sequence([torch.ones(3, 2), torch.ones(2, 2)])
    lstm(packed)
    assert lstm.input_size == 2


LAZY = {
    "linear": lambda: lateinit.nn.LazyLinear(10),
    "conv": lambda: lateinit.nn.LazyConv2d(10, 3),
    "attention": lambda: lateinit.nn.LazyMultiheadAttention(2),
}


@pytest.mark.parametrize(
    ("kind", "state", "message"),
    [
        ("linear", {"weight": (20, 5), "bias": (10,)}, r"weight: .* dim 0 must be 10.*\(10, \?"),
        ("linear", {"weight": (10, 5), "bias": (20,)}, r"bias: .* \(20,\), but dim 0 must be 10"),
        ("linear", {"weight": (10,), "bias": (10,)}, r"expected 2 dims, \(10, \?\), found 1"),
        ("linear", {"bias": (10,)}, "the sizes of a LazyLinear do not follow .*bias"),
        ("conv", {"weight": (10, 4, 5, 5), "bias": (10,)}, "dim 2 must be 3"),
    ],
)  # fmt: skip
def test_a_checkpoint_that_disagrees_with_what_is_known_is_refused_whole(
    kind: str, state: Any, message: str
) -> None:
    model = nn.Sequential(LAZY[kind]())
    given_state = {f"0.{name}": torch.ones(shape) for name, shape in state.items()}
    with pytest.raises(RuntimeError, match=rf"(?s)0.*{message}"):
        model.load_state_dict(given_state, strict=False)
    assert all(is_lazy(t) for t in model.parameters())


def test_a_checkpoint_sets_the_attributes_that_follow_from_it() -> None:
    conv = nn.Conv2d(6, 8, 3, groups=2)
    lazy = lateinit.nn.LazyConv2d(8, 3, groups=2)
    lazy.load_state_dict(conv.state_dict())
    assert (lazy.in_channels, lazy.groups) == (6, 2)
    assert_same(conv, lazy)


@pytest.mark.parametrize("dims", [(8, 8, 8), (8, 6, 4)])
def test_a_checkpoint_of_attention_tells_all_its_sizes(dims: Any) -> None:
    eager = nn.MultiheadAttention(dims[0], 2, kdim=dims[1], vdim=dims[2])
    lazy = lateinit.nn.LazyMultiheadAttention(2)
    lazy.load_state_dict(eager.state_dict())
    assert_same(eager, lazy)


def test_what_a_checkpoint_lacks_has_its_true_initial_value() -> None:
    torch.manual_seed(0)
    with lateinit.deferred():
        model = nn.Sequential(nn.Linear(2, 3), lateinit.nn.LazyLinear(4), nn.Linear(4, 1))
    weight = torch.ones(4, 3)
    model.load_state_dict({"1.weight": weight}, strict=False)
    torch.manual_seed(0)
    twin = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 4), nn.Linear(4, 1))
    with torch.no_grad():
        twin[1].weight.copy_(weight)
    assert_same(twin, lateinit.materialize(model))


def test_a_checkpoint_may_be_assigned() -> None:
    state = nn.Linear(3, 4).state_dict()
    lazy = lateinit.nn.LazyLinear(4)
    lazy.load_state_dict(state, assign=True)
    assert lazy.weight.data_ptr() == state["weight"].data_ptr()


OPS = {
    "relu": F.relu,
    "gelu": F.gelu,
    "mul": lambda x: x * 2,
    "softmax": lambda x: x.softmax(-1),
    "log_softmax": lambda x: x.log_softmax(0),
    "add": lambda x: x + x,
    "add_end": lambda x: x + torch.ones(x.shape[-1], device=x.device),
    "add_other": lambda x: x + x.mean(0, keepdim=True),
    "mul_other": lambda x: x.sum(-1) * torch.ones((), device=x.device),
    "sub_inplace": lambda x: x.clone().sub_(1),
    "where": lambda x: torch.where(x > 0, x, torch.zeros((), device=x.device)),
    "where_row": lambda x: torch.where(torch.ones(x.shape[-1], device=x.device) > 0, x, x),
    "mean": lambda x: x.mean((0, -1)),
    "mean_kept": lambda x: x.mean(1, keepdim=True),
    "tril": lambda x: x.unsqueeze(0).tril(),
    "layer_norm": lambda x: F.layer_norm(x, x.shape[-1:]),
    "batch_norm": lambda x: F.batch_norm(x.unsqueeze(0), None, None, training=True),
    "group_norm": lambda x: F.group_norm(x.unsqueeze(0), 1),
    "linear": lambda x: F.linear(x, torch.ones(5, x.shape[-1], device=x.device)),
    "linear_bias": lambda x: F.linear(
        x, torch.ones(5, x.shape[-1], device=x.device), torch.ones(5, device=x.device)
    ),
    "bmm": lambda x: x.unsqueeze(-1) @ x.unsqueeze(-2),
    "conv1d": lambda x: F.conv1d(
        x.reshape(1, -1, x.shape[-1]),
        torch.ones(4, x.numel() // x.shape[-1], 1, device=x.device),
        stride=2,
        padding=1,
    ),
    "max_pool": lambda x: F.max_pool2d(x.reshape(-1, *x.shape[-2:]), 2, padding=1),
    "max_pool_stride": lambda x: F.max_pool2d(x.reshape(1, 1, -1), (1, 2), (1, 3)),
    "embedding": lambda x: F.embedding(
        torch.zeros(x.shape, dtype=torch.long, device=x.device), torch.ones(4, 3, device=x.device)
    ),
    "arange": lambda x: torch.arange(1, 2 * x.shape[0], 2, device=x.device),
    "sdpa": lambda x: attended(x[None, None].flatten(2, -2)),
}  # fmt: skip


def attended(x: torch.Tensor) -> torch.Tensor:
    return F.scaled_dot_product_attention(x, x, x, is_causal=True)


def laid_out(shape: list[int], order: list[int], cut: int, device: str) -> torch.Tensor:
    """A tensor of a shape whose dims lie in memory in some order, and with gaps if ``cut``."""
    stored = torch.ones([shape[d] + cut for d in order], device=device)
    back = [order.index(d) for d in range(len(shape))]
    view = stored.permute(back)
    return view[tuple(slice(0, side) for side in shape)]


@pytest.mark.parametrize("name", OPS)
@settings(max_examples=20)
@given(data=st.data())
def test_the_short_ways_to_shapes_agree_with_computing(name: str, data: st.DataObject) -> None:
    shape = data.draw(st.lists(st.integers(2, 4), min_size=2, max_size=4))
    order = data.draw(st.permutations(range(len(shape))))
    cut = data.draw(st.integers(0, 1))
    expected = OPS[name](laid_out(shape, order, cut, "cpu"))
    with torch.no_grad(), ShapeMode():
        found = OPS[name](laid_out(shape, order, cut, "meta"))
    assert found.is_meta
    assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
    if name not in ("sdpa", "batch_norm"):  # there torch's own kernels disagree with each other
        assert found.stride() == expected.stride()


@pytest.mark.parametrize(
    "wrong",
    [
        lambda x: x @ x,
        lambda x: x + torch.ones(7, device=x.device),
        lambda x: F.layer_norm(x, (9,)),
        lambda x: F.embedding(x, torch.ones(4, 3, device=x.device)),
        lambda x: F.conv1d(x[None], torch.ones(4, 9, 1, device=x.device)),
        lambda x: F.linear(x, torch.ones(5, 9, device=x.device), torch.ones(5, device=x.device)),
    ],
)
def test_what_does_not_fit_is_refused_by_torch_itself(wrong: Any) -> None:
    with torch.no_grad(), ShapeMode(), pytest.raises(RuntimeError, match=r"."):
        wrong(torch.empty(2, 3, device="meta"))


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        (lambda: lateinit.infer_shapes(torch.ones(2)), TypeError, "takes a module"),
        (
            lambda: lateinit.lazy(nn.Linear(2, 3), in_features=lateinit.size()),
            TypeError,
            "subclass",
        ),
        (lambda: lateinit.size("last"), TypeError, "numbers of dims"),
        (
            lambda: lateinit.infer_shapes(
                lateinit.nn.LazyLinear(3), torch.empty(2, 3, device="meta"), real=True
            ),
            NeedsValuesError,
            r"shape \(2, 3\) is on meta: give real",
        ),
        (
            lambda: lateinit.lazy(nn.Linear, in_features=lambda x: "many")(3)(torch.ones(2, 3)),
            ShapeError,
            "Linear refuses the inferred in_features=many",
        ),
        (
            lambda: nn.Sequential(lateinit.nn.LazyLinear(3)).apply(zeroed),
            UninitializedError,
            r"was given LazyLinear\.weight \(3, \?\).*infer_shapes",
        ),
    ],
)
def test_what_is_plainly_wrong_is_refused_at_once(wrong: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        wrong()


def zeroed(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.zeros_(module.weight)


def test_an_initialiser_that_meets_an_older_placeholder_in_a_block_names_it() -> None:
    def drawn(module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight)

    model = nn.Sequential(lateinit.nn.LazyLinear(3))
    with (
        lateinit.deferred(),
        pytest.raises(UninitializedError, match=r"normal_ was given LazyLinear\.weight \(3, \?\)"),
    ):
        model.apply(drawn)


def test_initialisers_applied_in_a_second_block_are_those_of_the_twin() -> None:
    def drawn(module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.02)
            nn.init.zeros_(module.bias)

    torch.manual_seed(0)
    with lateinit.deferred():
        model = nn.Sequential(lateinit.nn.LazyLinear(3), nn.Linear(3, 2))
    lateinit.infer_shapes(model, torch.empty(1, 4, device="meta"))
    torch.manual_seed(1)
    with lateinit.deferred():
        model.apply(drawn)
    torch.manual_seed(0)
    twin = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    torch.manual_seed(1)
    assert_same(twin.apply(drawn), lateinit.materialize(model))


class Again(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(self.layer(x))


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
@pytest.mark.parametrize("kind", ["ours", "torch", "pfn_extras", "pfn_extras itself", "lazy()"])
@pytest.mark.parametrize("real", [False, True])
def test_two_sizes_of_one_module_of_any_kind_are_named(kind: str, real: bool) -> None:
    make = {
        "ours": lambda: lateinit.nn.LazyLinear(4),
        "torch": lambda: nn.LazyLinear(4),
        "pfn_extras": lambda: lateinit.pfn_extras.LazyLinear(None, 4),
        "pfn_extras itself": lambda: pytest.importorskip("pytorch_pfn_extras").nn.LazyLinear(
            None, 4
        ),
        "lazy()": lambda: lateinit.lazy(nn.Linear, in_features=lateinit.size(-1))(4),
    }
    model = Again(make[kind]())
    with pytest.raises(ShapeError, match=r"layer is called with in_features=3 and again with .*=4"):
        lateinit.infer_shapes(model, torch.ones(2, 3), real=real)
    assert is_placeholder(model.layer.weight)


def test_an_input_that_disagrees_with_what_the_first_inferred_is_refused() -> None:
    layer = lateinit.nn.LazyBilinear(3)
    layer(torch.ones(2, 3), torch.ones(2, 4))
    with pytest.raises(RuntimeError, match="got 5 but expected 4"):
        layer(torch.ones(2, 3), torch.ones(2, 5))
    assert (layer.in1_features, layer.in2_features) == (3, 4)


class Sized(nn.Module):
    """Its layers and its control flow depend on all dims but the first."""

    def __init__(self, lazy: bool) -> None:
        super().__init__()
        self.conv = lateinit.nn.LazyConv1d(4, 2) if lazy else nn.Conv1d(3, 4, 2)
        self.norm = lateinit.nn.LazyBatchNorm1d() if lazy else nn.BatchNorm1d(4)
        self.head = lateinit.nn.LazyLinear(2) if lazy else nn.Linear(16, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch = x.shape[0]
        found = self.norm(self.conv(x)).view(batch, 16)
        return self.head(found)


@pytest.mark.parametrize("batch", [0, 1, 2, 300])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_the_size_of_the_batch_changes_nothing(batch: int, device: str) -> None:
    torch.manual_seed(0)
    twin = Sized(lazy=False)
    torch.manual_seed(0)
    model = lateinit.deferred_init(Sized, True)
    lateinit.infer_shapes(model, torch.ones(batch, 3, 5, device=device))
    assert_same(twin, lateinit.materialize(model))


@pytest.mark.parametrize("batch", [2, 7])
def test_infer_shapes_again_with_another_batch_changes_nothing(batch: int) -> None:
    torch.manual_seed(0)
    twin = Sized(lazy=False)
    torch.manual_seed(0)
    model = lateinit.deferred_init(Sized, True)
    for size in (3, batch):
        assert lateinit.infer_shapes(model, torch.ones(size, 3, 5, device="meta")) == []
    assert_same(twin, lateinit.materialize(model))
    for size in (3, batch):
        assert lateinit.infer_shapes(model, torch.ones(size, 3, 5)) == []
    assert_same(twin, model)


def test_one_layer_may_be_called_with_several_batches_in_one_pass() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = lateinit.nn.LazyLinear(3)

        def forward(self, *inputs: torch.Tensor) -> list[torch.Tensor]:
            return [self.layer(x) for x in inputs]

    model = Twice()
    shapes = [(2, 4), (5, 4), (3, 1, 4), (4,)]
    lateinit.infer_shapes(model, *(torch.empty(shape, device="meta") for shape in shapes))
    assert model.layer.in_features == 4


@pytest.mark.parametrize("block", [True, False])
def test_a_model_of_inferred_shapes_is_exported_with_a_dynamic_batch(block: bool) -> None:
    torch.manual_seed(0)
    twin = Sized(lazy=False).eval()
    torch.manual_seed(0)
    model = lateinit.deferred_init(Sized, True) if block else Sized(lazy=True)
    lateinit.infer_shapes(model.eval(), torch.ones(2, 3, 5, device="meta"))
    lateinit.materialize(model)
    dynamic = ({0: torch.export.Dim("batch", min=1, max=64)},)
    exported = torch.export.export(model, (torch.ones(4, 3, 5),), dynamic_shapes=dynamic)
    if block:
        assert_same(twin, model)
    for size in (1, 9):
        x = torch.randn(size, 3, 5)
        assert torch.equal(exported.module()(x), model(x))


def test_sizes_that_are_symbols_are_not_taken_for_numbers() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    model = lateinit.deferred_init(Sized, True)
    with FakeTensorMode(shape_env=ShapeEnv()) as mode:
        pass
    example = mode.from_tensor(torch.ones(4, 3, 5))
    lateinit.infer_shapes(model, example)
    assert all(type(size) is int for p in model.parameters() for size in p.shape)
