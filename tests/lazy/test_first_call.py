"""Modules that initialise themselves in their first call: in ``forward``, or in a hook."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter, is_lazy

import lateinit
from lateinit.errors import MismatchError, NeedsValuesError, UninitializedError, UnreachedError
from lateinit.pfn_extras import LazyInitializationMixin

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

pytestmark = pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")


def original() -> type:
    made: type = pytest.importorskip("pytorch_pfn_extras").nn.modules.lazy.LazyInitializationMixin
    return made


MIXINS = {"ours": lambda: LazyInitializationMixin, "original": original}
BY_MIXIN = pytest.mark.parametrize("mixin", sorted(MIXINS))
BY_BLOCK = pytest.mark.parametrize("block", [True, False])
CONSTS: dict[str, Callable[[Any, int], torch.Tensor]] = {
    "from itself": lambda module, n: module.const.new_full((n,), 1),
    "from nothing": lambda module, n: torch.ones(n),
}
MEANS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "new_zeros": lambda x: x.new_zeros(x.shape[-1]),
    "zeros_like": lambda x: torch.zeros_like(x[0]),
    "device": lambda x: torch.zeros(x.shape[-1], device=x.device, dtype=x.dtype),
}


def norm(mixin: str, const: str, mean: str) -> type[Any]:
    """A class that uses its input before, within and after its initialisation."""

    class Norm(MIXINS[mixin](), nn.Module):  # type: ignore[misc]
        lazy_parameter_names = ("weight",)
        lazy_buffer_names = ("mean", "const")

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.tensor(0))
            self.before, self.after = nn.BatchNorm1d(3), nn.LazyLinear(4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            x = self.before(x)
            if not self.lazy_parmeters_determined:
                self.weight = nn.Parameter(torch.empty(x.shape[-1]))
                self.mean = MEANS[mean](x)
                self.const = CONSTS[const](self, x.shape[-1])
                (x * self.weight).relu()
                nn.init.trunc_normal_(self.weight, std=2.0, a=-0.5, b=0.5)
                with torch.no_grad():
                    self.weight[0] = 7
            y = (x - self.mean) * self.weight + torch.rand(3)
            return self.after(y.sum(0, keepdim=True))

    return Norm


@pytest.mark.parametrize("real", [False, True])
@pytest.mark.parametrize("mean", sorted(MEANS))
@pytest.mark.parametrize("const", sorted(CONSTS))
@BY_BLOCK
@BY_MIXIN
def test_the_whole_initialisation_in_forward_runs_and_nothing_else(
    mixin: str, block: bool, const: str, mean: str, real: bool
) -> None:
    def build() -> nn.Module:
        return nn.Sequential(norm(mixin, const, mean)(), nn.Linear(4, 2))

    torch.manual_seed(0)
    model = lateinit.deferred_init(build) if block else build()
    held = model[0].weight
    torch.manual_seed(0)
    x = torch.ones(5, 3)
    assert lateinit.infer_shapes(model, x, real=real) == []
    found = lateinit.materialize(model)[0]
    torch.manual_seed(0)
    weight = nn.init.trunc_normal_(torch.empty(3), std=2.0, a=-0.5, b=0.5)
    weight[0] = 7
    assert torch.equal(found.weight, weight)
    assert torch.equal(found.after.weight, nn.Linear(3, 4).weight)
    assert torch.equal(found.mean, torch.zeros(3))
    assert torch.equal(found.const, torch.ones(3))
    assert found.weight is held
    assert (found.calls, found.before.num_batches_tracked) == (0, 0)
    assert found.before.training
    model(x)


def reads_mean(module: Any, x: torch.Tensor) -> None:
    module.mean = x.mean(0)


def writes_mean(module: Any, x: torch.Tensor) -> None:
    module.mean = torch.zeros(x.shape[-1])
    module.mean.copy_(x.mean(0))


def asks(module: Any, x: torch.Tensor) -> None:
    if (x > 0).any():
        nn.init.ones_(module.weight)


def sets_data(module: Any, x: torch.Tensor) -> None:
    module.weight.data = x[0].clone()


@BY_BLOCK
@pytest.mark.parametrize("init", [asks, reads_mean, sets_data, writes_mean])
def test_an_initialisation_with_values_of_the_input_is_refused_and_undone(
    init: Callable[..., None], block: bool
) -> None:
    class Fitted(LazyInitializationMixin, nn.Module):
        lazy_parameter_names = ("weight",)
        lazy_buffer_names = ("mean",)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if not self.lazy_parameters_determined:
                self.weight = nn.Parameter(torch.empty(x.shape[-1]))
                init(self, x)
            return x * self.weight

    def build() -> nn.Module:
        return nn.Sequential(nn.LazyLinear(3), Fitted())

    model = lateinit.deferred_init(build) if block else build()
    with pytest.raises(NeedsValuesError, match=r"Fitted initialises itself with values of its"):
        lateinit.infer_shapes(model, torch.ones(2, 5))
    assert is_lazy(model[0].weight)
    assert is_lazy(model[1].weight)


class Graph(nn.Module):
    """As libraries of graph networks do it: torch's placeholders, and a hook of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = UninitializedParameter(), UninitializedParameter()
        self.register_buffer("seen", UninitializedBuffer())
        self._h = self.register_forward_pre_hook(self.first)

    @torch.no_grad()
    def first(self, module: nn.Module, args: Any) -> None:
        width = args[0].size(-1)
        self.weight.materialize((3, width))
        self.bias.materialize((3,))
        self.seen.materialize((width,))
        nn.init.kaiming_uniform_(self.weight, a=5**0.5)
        self.bias.data.fill_(2.0)
        self.seen.zero_()
        self.weight.data.uniform_(-1, 1)
        self._h.remove()
        del self._h

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.dropout(x @ self.weight.t() + self.bias + self.seen.sum(), 0.5, train=True)


class InForward(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = UninitializedParameter()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if is_lazy(self.scale):
            self.scale.materialize(x.shape[-1:])
            nn.init.normal_(self.scale)
        return x * self.scale


@pytest.mark.parametrize("real", [False, True])
@BY_BLOCK
def test_lazy_modules_of_other_libraries_are_initialised_by_their_own_code(
    block: bool, real: bool
) -> None:
    def build() -> nn.Module:
        return nn.Sequential(Graph(), InForward(), nn.LazyLinear(2))

    torch.manual_seed(0)
    model = lateinit.deferred_init(build) if block else build()
    held = model[0].weight
    torch.manual_seed(0)
    assert lateinit.infer_shapes(model, torch.ones(4, 5), real=real) == []
    lateinit.materialize(model)
    torch.manual_seed(0)
    weight = nn.init.kaiming_uniform_(torch.empty(3, 5), a=5**0.5)
    assert torch.equal(model[0].weight, weight.uniform_(-1, 1))
    assert torch.equal(model[1].scale, torch.empty(3).normal_())
    assert torch.equal(model[2].weight, nn.Linear(3, 2).weight)
    assert torch.equal(model[0].bias, torch.full((3,), 2.0))
    assert torch.equal(model[0].seen, torch.zeros(5))
    assert model[0].weight is held
    assert not hasattr(model[0], "_h")
    model(torch.ones(4, 5))


class Never(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = UninitializedParameter()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x if is_lazy(self.scale) else x * self.scale


def test_a_module_that_never_initialises_itself_is_named() -> None:
    model = nn.Sequential(Never())
    with pytest.raises(UnreachedError, match="did not reach 0"):
        lateinit.infer_shapes(model, torch.ones(2, 3))
    assert lateinit.infer_shapes(model, torch.ones(2, 3), strict=False) == ["0"]
    model = nn.Sequential(nn.Linear(3, 3))
    model[0].weight = UninitializedParameter()
    with pytest.raises(UninitializedError, match="Linear holds tensors without a shape"):
        lateinit.infer_shapes(model, torch.ones(2, 3))


def test_what_a_module_that_is_not_lazy_does_to_another_one_is_named() -> None:
    model = nn.Sequential(Never())

    def initialise(module: Any, args: Any) -> None:
        if is_lazy(module[0].scale):
            module[0].scale.materialize(args[0].shape[-1:])

    model.register_forward_pre_hook(initialise)
    assert lateinit.infer_shapes(model, torch.ones(2, 3), strict=False) == ["0"]
    assert is_lazy(model[0].scale)


@BY_BLOCK
def test_loading_into_a_module_that_adopts_no_shapes_names_its_tensors(
    block: bool, tmp_path: Path
) -> None:
    full = nn.Sequential(Graph(), nn.Linear(3, 2))
    full(torch.ones(4, 5))
    lateinit.save_checkpoint(full, tmp_path / "full.safetensors")

    def build() -> nn.Module:
        return nn.Sequential(Graph(), nn.Linear(3, 2))

    model = lateinit.deferred_init(build) if block else build()
    with pytest.raises(MismatchError, match=r"0\.weight has no shape yet.*infer_shapes"):
        lateinit.load_checkpoint(model, tmp_path / "full.safetensors")
    lateinit.infer_shapes(model, torch.ones(4, 5))
    lateinit.load_checkpoint(model, tmp_path / "full.safetensors")
    assert torch.equal(model[0].weight, full[0].weight)


class WithDevice(lateinit.nn.LazyModuleMixin, nn.Module):
    """Makes its tensors like its input, as for a first forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = lateinit.nn.UninitializedParameter()
        self.register_buffer("mean", torch.zeros(0))

    def initialize_parameters(self, x: torch.Tensor) -> None:
        self.weight.materialize(x.shape[-1:], device=x.device, dtype=x.dtype)
        self.mean = torch.full_like(x[0], 3 if x.is_cpu and not x.is_meta else 4)
        nn.init.ones_(self.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.weight + self.mean


@BY_BLOCK
def test_an_input_says_the_device_that_a_real_one_would_say(block: bool) -> None:
    model = lateinit.deferred_init(WithDevice) if block else WithDevice()
    lateinit.infer_shapes(model, torch.empty(2, 3, device="meta"))
    lateinit.materialize(model)
    assert torch.equal(model.weight, torch.ones(3))
    assert torch.equal(model.mean, torch.full((3,), 3.0))
