"""``infer_shapes``: laws 4, 7 and 9 on whole models."""

from __future__ import annotations

import copy
import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parameter import is_lazy

import lateinit
from lateinit.errors import NeedsValuesError, ShapeError, UnreachedError
from tests.support.lazy_models import GPT, ResNet50, gpt2_xl
from tests.support.snapshots import assert_same, snapshot
from tests.support.twins import deferred, eager

META = torch.device("meta")


@pytest.mark.quick
def test_a_lazy_resnet_50_equals_its_eager_twin() -> None:
    model = deferred(lambda: ResNet50(lazy=True, width=8))
    lateinit.infer_shapes(model, torch.empty(1, 3, 224, 224, device=META))
    assert_same(eager(lambda: ResNet50(lazy=False, width=8)), lateinit.materialize(model))


@pytest.mark.quick
def test_a_lazy_gpt_equals_its_eager_twin() -> None:
    model = deferred(lambda: GPT(lazy=True))
    lateinit.infer_shapes(model, torch.zeros(2, 9, dtype=torch.long))
    assert_same(eager(lambda: GPT(lazy=False)), lateinit.materialize(model))


def test_a_model_far_larger_than_memory_is_inferred() -> None:
    model = deferred(lambda: gpt2_xl(lazy=True))
    lateinit.infer_shapes(model, torch.zeros(1, 1024, dtype=torch.long, device=META))
    assert sum(p.numel() for p in model.parameters()) == 1_638_022_400
    assert all(p.is_meta for p in model.parameters())


def test_layers_of_ours_of_torch_and_of_pfn_extras_can_be_mixed() -> None:
    def make(lazy: bool) -> nn.Module:
        return nn.Sequential(
            lateinit.nn.LazyConv2d(8, 3) if lazy else nn.Conv2d(3, 8, 3),
            nn.LazyBatchNorm2d() if lazy else nn.BatchNorm2d(8),
            lateinit.pfn_extras.LazyConv2d(None, 4, 3) if lazy else nn.Conv2d(8, 4, 3),
            nn.Flatten(),
            nn.LazyLinear(6) if lazy else nn.Linear(4 * 4 * 4, 6),
            nn.Linear(6, 2),
        )

    model = deferred(lambda: make(True))
    lateinit.infer_shapes(model, torch.empty(2, 3, 8, 8, device=META))
    twin, found = eager(lambda: make(False)).state_dict(), lateinit.materialize(model).state_dict()
    assert twin.keys() == found.keys()
    assert all(torch.equal(twin[name], found[name]) for name in twin)


def test_layers_of_pfn_extras_itself_are_initialised_as_by_a_first_forward() -> None:
    theirs = pytest.importorskip("pytorch_pfn_extras").nn

    def make() -> nn.Module:
        return nn.Sequential(
            theirs.LazyConv2d(None, 4, 3),
            nn.Flatten(),
            theirs.LazyLinear(None, 6),
            nn.LazyLinear(2),
        )

    one, two = make(), make()
    held = list(two.parameters())
    torch.manual_seed(3)
    one(torch.zeros(1, 3, 8, 8))
    torch.manual_seed(3)
    lateinit.infer_shapes(two, torch.empty(1, 3, 8, 8, device=META))
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        assert torch.equal(a, b)
    assert all(any(p is h for h in held) for p in two.parameters())


def test_outside_a_block_it_initialises_as_a_first_forward_does() -> None:
    one, two = (ResNet50(lazy=True, width=4) for _ in range(2))
    torch.manual_seed(5)
    lateinit.infer_shapes(one, torch.empty(1, 3, 64, 64, device=META))
    torch.manual_seed(5)
    with torch.no_grad():
        two.eval()(torch.zeros(1, 3, 64, 64))
    assert_same(two.train(), one)


class Shaped(nn.Module):
    """Inputs in containers, by keyword, and two modules used out of order."""

    def __init__(self) -> None:
        super().__init__()
        self.first = lateinit.nn.LazyLinear(5)
        self.second = lateinit.nn.LazyLinear(4)

    def forward(self, batch: dict[str, Any], *, scale: torch.Tensor) -> torch.Tensor:
        y = self.second(batch["items"][0])
        return self.first(y * scale) + torch.zeros(5)


def test_inputs_may_be_nested_and_given_by_keyword() -> None:
    model = deferred(Shaped)
    batch = {"items": [torch.empty(2, 3, device=META)], "name": "x"}
    lateinit.infer_shapes(model, batch, scale=torch.ones(4))
    lateinit.materialize(model)
    torch.manual_seed(0)
    first, second = nn.Linear(4, 5), nn.Linear(3, 4)
    assert torch.equal(model.first.weight, first.weight)
    assert torch.equal(model.second.weight, second.weight)


class Busy(nn.Module):
    """Leaves traces in all the places where a forward pass can leave them."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3)
        self.drop = nn.Dropout(0.5)
        self.lazy = lateinit.nn.LazyLinear(4)
        self.spectral = nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4))
        self.seen: list[Any] = [torch.zeros(3)]
        self.table = {"last": torch.zeros(1)}
        self.register_buffer("count", torch.zeros(()))
        self.plain = torch.arange(3.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.count += 1
        self.plain.mul_(2)
        self.seen.append(x)
        self.seen[0] += 1
        self.table["last"] = x
        self.cache = x * random.random() * float(np.random.rand())  # noqa: NPY002
        self.eval()
        return self.spectral(self.lazy(self.drop(self.norm(x) + torch.rand(3)))).relu_()


@pytest.mark.quick
@pytest.mark.parametrize("real", [False, True])
def test_only_shapes_change(real: bool) -> None:
    model = Busy()
    model.spectral.weight.sum().backward()
    lazy = model.lazy
    model.lazy = nn.Identity()
    before = snapshot(model)
    grads = [p.grad for p in model.parameters()]
    model.lazy = lazy
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()  # noqa: NPY002
    hole = torch.get_rng_state()
    lateinit.infer_shapes(model, torch.randn(2, 3), real=real)
    assert type(lazy) is nn.Linear
    model.lazy = nn.Identity()
    assert snapshot(model) == before
    assert [p.grad for p in model.parameters()] == grads
    assert random.getstate() == states[1]
    assert (np.random.get_state()[1] == states[2]).all()  # noqa: NPY002
    torch.set_rng_state(hole)
    nn.Linear(3, 4)  # what the lazy layer drew, and nothing else
    expected = torch.get_rng_state()
    torch.set_rng_state(hole)
    model.lazy = lateinit.nn.LazyLinear(4)
    lateinit.infer_shapes(model, torch.randn(2, 3, generator=torch.Generator()), real=real)
    assert torch.equal(torch.get_rng_state(), expected)


def test_a_deferred_model_draws_nothing_from_the_global_generators() -> None:
    model = deferred(
        lambda: nn.Sequential(lateinit.nn.LazyLinear(3), nn.Dropout(), nn.LazyLinear(2))
    )
    before = torch.get_rng_state()
    lateinit.infer_shapes(model, torch.ones(2, 4))
    assert torch.equal(before, torch.get_rng_state())


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = lateinit.nn.LazyLinear(3), nn.LazyLinear(3)

    def forward(self, x: torch.Tensor, *, left: bool | None = None) -> torch.Tensor:
        if left is None:
            left = bool(x.sum() > 0)  # HERE
        return self.left(x) if left else self.right(x)


def test_lazy_modules_that_are_not_reached_are_named_and_nothing_is_initialised() -> None:
    model = nn.Sequential(Branches())
    with pytest.raises(UnreachedError, match=r"did not reach model\.0\.right"):
        lateinit.infer_shapes(_Always(model), torch.ones(2, 3))
    assert is_lazy(model[0].left.weight)
    assert is_lazy(model[0].right.weight)
    assert lateinit.infer_shapes(_Always(model), torch.ones(2, 3), strict=False) == [
        "model.0.right"
    ]
    assert not is_lazy(model[0].left.weight)
    assert lateinit.infer_shapes(model[0], torch.ones(2, 3), left=False) == []


class _Always(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.model[0](x, left=True)


def test_a_forward_that_needs_values_says_where() -> None:
    lines = Path(__file__).read_text().splitlines()
    here = next(i for i, line in enumerate(lines, 1) if line.endswith("  # HERE"))
    model = Branches()
    with pytest.raises(NeedsValuesError, match=rf"test_infer\.py:{here} in forward.*real=True"):
        lateinit.infer_shapes(model, torch.ones(2, 3))
    assert is_lazy(model.left.weight)
    assert lateinit.infer_shapes(model, torch.ones(2, 3), real=True, strict=False) == ["right"]
    assert lateinit.infer_shapes(model, -torch.ones(2, 3), real=True) == []


@pytest.mark.parametrize(
    "read", [torch.Tensor.tolist, torch.Tensor.numpy, torch.nonzero, torch.unique]
)
def test_other_ways_to_need_values_say_where_too(read: Any) -> None:
    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lazy = lateinit.nn.LazyLinear(3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            read(x)
            return self.lazy(x)

    with pytest.raises(NeedsValuesError, match=r"test_infer\.py:\d+ in forward"):
        lateinit.infer_shapes(Reads(), torch.ones(2, 3))
    assert lateinit.infer_shapes(Reads(), torch.ones(2, 3), real=True) == []


def test_real_runs_a_deferred_model_on_its_true_values() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.sign = nn.Parameter(torch.full((1,), -1.0))
            self.lazy = Branches()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.lazy(x * self.sign)

    model = deferred(Scaled)
    left = lateinit.infer_shapes(model, torch.ones(2, 3), real=True, strict=False)
    assert left == ["lazy.left"]
    assert lateinit.is_deferred(model.sign)


def test_small_tensors_that_a_forward_makes_itself_keep_their_values() -> None:
    class Sizes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lazy = lateinit.nn.LazyLinear(2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            count = int(torch.tensor(x.shape[1:]).prod())
            keep = torch.linspace(0, 1, 3).tolist()
            return self.lazy(x.view(-1, count)) * keep[1]

    model = Sizes()
    lateinit.infer_shapes(model, torch.empty(2, 3, 4, device=META))
    assert model.lazy.in_features == 12


def test_a_small_tensor_that_was_written_with_unknown_values_is_not_read() -> None:
    class Writes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lazy = lateinit.nn.LazyLinear(2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            small = torch.zeros(2)
            small[0] = x.sum()
            return self.lazy(x[:, : int(small.sum())])

    with pytest.raises(NeedsValuesError, match="needs the values"):
        lateinit.infer_shapes(Writes(), torch.empty(2, 3, device=META))


def test_real_tensors_of_elsewhere_are_not_written() -> None:
    outside = torch.zeros(3)

    class Writes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lazy = lateinit.nn.LazyLinear(2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            outside.add_(1)
            outside.copy_(x[0])
            return self.lazy(x + outside)

    lateinit.infer_shapes(Writes(), torch.ones(2, 3))
    assert torch.equal(outside, torch.zeros(3))


def test_a_module_that_is_shared_is_initialised_once() -> None:
    def make(lazy: bool) -> nn.Module:
        shared = lateinit.nn.LazyLinear(4) if lazy else nn.Linear(4, 4)
        return nn.Sequential(shared, nn.ReLU(), shared, nn.Linear(4, 2))

    model = deferred(lambda: make(True))
    lateinit.infer_shapes(model, torch.empty(2, 4, device=META))
    assert_same(eager(lambda: make(False)), lateinit.materialize(model))


def test_a_module_that_is_called_with_two_sizes_is_named() -> None:
    for shared in (lateinit.nn.LazyLinear(4), nn.LazyLinear(4)):
        model = nn.Sequential(shared, nn.ReLU(), shared)
        with pytest.raises(
            ShapeError, match="0 is called with in_features=3 and again with in_features=4"
        ):
            lateinit.infer_shapes(model, torch.ones(2, 3))
        assert is_lazy(shared.weight)


class Padded(nn.Module):
    """Gives one more than it takes, whatever it takes."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.pad(x * self.scale.sum(), (0, 1))


def test_a_module_of_a_class_of_ones_own_that_is_called_with_two_sizes_is_named() -> None:
    shared = lateinit.lazy(Padded, width=lateinit.size(-1))()
    with pytest.raises(ShapeError, match="0 is called with width=3 and again with width=4"):
        lateinit.infer_shapes(nn.Sequential(shared, shared), torch.ones(2, 3))
    assert is_lazy(shared.scale)


def test_a_model_without_lazy_modules_is_left_alone() -> None:
    assert lateinit.infer_shapes(nn.Linear(2, 3)) == []


def test_it_works_inside_the_block_too() -> None:
    def make(lazy: bool) -> nn.Module:
        body = nn.Sequential(lateinit.nn.LazyLinear(5) if lazy else nn.Linear(3, 5), nn.Tanh())
        if lazy:
            lateinit.infer_shapes(body, torch.empty(1, 3, device=META))
        return nn.Sequential(body, nn.Linear(body[0].out_features, 2))

    assert_same(eager(lambda: make(False)), lateinit.materialize(deferred(lambda: make(True))))


@pytest.mark.parametrize("source", [lateinit.nn, nn], ids=["ours", "torch"])
def test_a_constructor_that_runs_its_lazy_part_is_recorded(source: Any) -> None:
    class SelfSized(nn.Module):
        def __init__(self, lazy: bool) -> None:
            super().__init__()
            self.body = nn.Sequential(source.LazyConv2d(4, 3) if lazy else nn.Conv2d(3, 4, 3))
            self.between = nn.Linear(2, 2)
            width = self.body(torch.zeros(1, 3, 8, 8)).numel()
            self.head = nn.Linear(width, 2)

    assert_same(
        eager(lambda: SelfSized(False)), lateinit.materialize(deferred(lambda: SelfSized(True)))
    )


def test_copies_of_a_model_are_inferred_each_for_itself() -> None:
    model = deferred(lambda: nn.Sequential(nn.Linear(2, 3), lateinit.nn.LazyLinear(4)))
    other = copy.deepcopy(model)
    lateinit.infer_shapes(model, torch.ones(1, 2))
    assert is_lazy(other[1].weight)
    lateinit.infer_shapes(other, torch.ones(1, 2))
    twin = eager(lambda: nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 4)))
    assert_same(twin, lateinit.materialize(model))
    assert_same(twin, lateinit.materialize(other))


def test_an_optimizer_built_before_inference_trains_every_parameter() -> None:
    model = nn.Sequential(
        lateinit.nn.LazyConv1d(4, 3),
        lateinit.nn.LazyBatchNorm1d(),
        nn.Flatten(),
        lateinit.nn.LazyLinear(5),
        lateinit.lazy(nn.Linear, in_features=lateinit.size(-1))(2),
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    lateinit.infer_shapes(model, torch.ones(2, 3, 6))
    before = copy.deepcopy(list(model.parameters()))
    model(torch.randn(2, 3, 6)).square().sum().backward()
    optimizer.step()
    for old, new in zip(before, model.parameters(), strict=True):
        assert new.grad is not None
        assert torch.equal(new, old - 0.5 * new.grad)
    assert {id(p) for g in optimizer.param_groups for p in g["params"]} >= {
        id(p) for p in model.parameters()
    }


def test_hooks_stay_run_in_their_order_and_leave_no_trace(
    capfd: pytest.CaptureFixture[str],
) -> None:
    noted: list[str] = []

    def note(what: str) -> None:
        noted.append(what)
        os.write(1, f"{what} ".encode())

    layer = lateinit.nn.LazyLinear(3)
    layer.register_forward_pre_hook(lambda *_: note("pre"))
    layer.register_forward_hook(lambda *_: note("forward"))
    layer.weight.register_hook(lambda grad: note("grad"))
    model = nn.Sequential(layer)
    lateinit.infer_shapes(model, torch.ones(2, 4))
    assert (capfd.readouterr().out, noted) == ("pre forward ", [])
    model(torch.ones(2, 4)).sum().backward()
    assert noted == ["pre", "forward", "grad"]


def test_functions_of_a_forward_see_meta_everywhere() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lazy = lateinit.nn.LazyLinear(4)
            self.table = torch.arange(12.0).view(3, 4)
            self.register_buffer("mask", torch.ones(4, dtype=torch.bool), persistent=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            large = torch.zeros(100, 100)
            y = self.lazy(F.pad(x, (0, 1))) + self.table[:2] + large[:2, :4]
            y = torch.where(self.mask, y, torch.zeros_like(y))
            return y.cpu().to("cpu", torch.float32).masked_fill(~self.mask, 0.0)

    model = Mixed()
    lateinit.infer_shapes(model, torch.ones(2, 3))
    assert model.lazy.in_features == 4
    assert not model.table.is_meta


def test_a_forward_may_take_gradients_itself_and_leaves_none() -> None:
    class Sensitive(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(lateinit.nn.LazyLinear(5), nn.Tanh(), nn.Linear(5, 1))
            self.head = lateinit.nn.LazyLinear(2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = x.requires_grad_()
            (slope,) = torch.autograd.grad(self.body(x).sum(), x, create_graph=True)
            slope.sum().backward()
            return self.head(slope)

    for real in (False, True):
        model, x = Sensitive(), torch.ones(4, 3)
        lateinit.infer_shapes(model, x, real=real)
        assert model.head.in_features == 3
        assert all(p.grad is None for p in model.parameters())
        assert not x.requires_grad


@pytest.mark.parametrize("block", [True, False])
def test_a_counter_is_read_as_it_is_and_does_not_count(block: bool) -> None:
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.tensor(3))
            self.register_buffer("ready", torch.tensor(data=False))
            self.norm = lateinit.nn.LazyBatchNorm1d(momentum=None)  # reads how many batches

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if not self.ready:
                self.ready.fill_(value=True)
            self.calls += 1
            return self.norm(x[:, : int(self.calls)])

    model = deferred(Counts) if block else Counts()
    lateinit.infer_shapes(model, torch.empty(2, 9, device=META))
    assert model.norm.num_features == 4
    lateinit.materialize(model)
    assert (model.calls, model.ready, model.norm.num_batches_tracked) == (3, False, 0)


def test_a_counter_that_was_written_from_the_input_is_not_read() -> None:
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.tensor(3))
            self.lazy = lateinit.nn.LazyLinear(2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.calls.copy_(x.sum())
            return self.lazy(x[:, : int(self.calls)])

    with pytest.raises(NeedsValuesError, match="needs the values"):
        lateinit.infer_shapes(Counts(), torch.ones(2, 9))


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = lateinit.nn.LazyLinear(8)
        self.layers = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16), 2)
        self.decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(8, 2, 16), 1)

    def forward(self, x: torch.Tensor, mask: Any = None, pad: Any = None) -> torch.Tensor:
        y = self.layers(self.first(x), mask=mask, src_key_padding_mask=pad)
        return self.decoder(y, y, tgt_mask=mask)


FLOAT_MASK = nn.Transformer.generate_square_subsequent_mask(5)
X = torch.ones(5, 3, 6)
MASKED: dict[str, tuple[Any, tuple[Any, ...], dict[str, Any]]] = {
    "attention": (lambda: lateinit.nn.LazyMultiheadAttention(2), (X, X, X),
                  {"attn_mask": FLOAT_MASK.isinf()}),
    "decoder layer": (lambda: lateinit.nn.LazyTransformerDecoderLayer(2, 4), (X, X),
                      {"tgt_mask": FLOAT_MASK, "memory_mask": FLOAT_MASK.isinf()}),
    "encoder": (Encoder, (X, FLOAT_MASK, torch.zeros(3, 5, dtype=torch.bool)), {}),
    "encoder in eval mode": (lambda: Encoder().eval(), (X, FLOAT_MASK.isinf()),
                             {"pad": torch.zeros(3, 5, dtype=torch.bool)}),
    "encoder layer": (lambda: lateinit.nn.LazyTransformerEncoderLayer(2, 4), (X,),
                      {"src_mask": FLOAT_MASK, "is_causal": True}),
    "transformer": (lambda: lateinit.nn.LazyTransformer(2, 1, 1, 4), (X, X),
                    {"src_mask": FLOAT_MASK, "tgt_mask": FLOAT_MASK}),
    "wide": (Encoder, (torch.ones(300, 1, 6),),
             {"mask": nn.Transformer.generate_square_subsequent_mask(300)}),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True, but:UserWarning")
@pytest.mark.filterwarnings("ignore:Support for mismatched:UserWarning")
@pytest.mark.parametrize("name", sorted(MASKED))
def test_a_real_mask_keeps_its_values_without_being_asked_to(name: str) -> None:
    make, args, kwargs = MASKED[name]
    assert lateinit.infer_shapes(make(), *args, **kwargs) == []


def test_lengths_and_indices_keep_their_values_and_are_not_written_to() -> None:
    class Packs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.head = lateinit.nn.LazyLSTM(3), lateinit.nn.LazyLinear(2)

        def forward(self, x: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
            packed = nn.utils.rnn.pack_padded_sequence(x, lengths, enforce_sorted=False)
            y, _ = nn.utils.rnn.pad_packed_sequence(self.rnn(packed)[0])
            y = self.head(y[: int(lengths.max())])
            lengths += 1
            return y

    model, lengths = Packs(), torch.tensor([2, 5, 1])
    lateinit.infer_shapes(model, torch.empty(5, 3, 6, device=META), lengths)
    assert (model.rnn.input_size, model.head.in_features) == (6, 3)
    assert lengths.tolist() == [2, 5, 1]
    packed = nn.utils.rnn.pack_padded_sequence(torch.ones(5, 3, 6), lengths, enforce_sorted=False)
    lateinit.infer_shapes(rnn := lateinit.nn.LazyGRU(2), packed)
    assert rnn.input_size == 6
