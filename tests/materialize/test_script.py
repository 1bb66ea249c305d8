"""A module that a constructor scripts or traces is materialised with all that C++ holds of it."""

from __future__ import annotations

import copy
import io
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lateinit
from lateinit.errors import DeferredTensorError, MaterializeError

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit")


class Full(nn.Module):
    """Parameters, buffers, and attributes that are tensors or hold some."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("kept", torch.randn(4))
        self.register_buffer("left", torch.randn(4), persistent=False)
        self.plain = torch.randn(4)
        self.several = [torch.randn(4), torch.ones(4)]
        self.named = {"a": torch.randn(4)}

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x) * self.kept + self.left - self.plain
        return y * self.several[0] + self.several[1] + self.named["a"]


with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of the deprecation, whose class varies

    class Old(torch.jit.ScriptModule):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 4))
            self.linear = nn.Linear(4, 4)
            self.register_buffer("shift", torch.randn(4))

        @torch.jit.script_method
        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x @ self.weight) + self.shift


class Tied(nn.Module):
    """A module and its scripted self hold the same parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.scripted = torch.jit.script(self.linear)

    def forward(self, x: Tensor) -> Tensor:
        return self.scripted(self.linear(x))


BUILT: dict[str, Callable[[], nn.Module]] = {
    "scripted": lambda: torch.jit.script(nn.Linear(4, 4)),
    "full": lambda: torch.jit.script(Full()),
    "traced": lambda: torch.jit.trace(nn.Linear(4, 4), torch.ones(2, 4)),
    "old": Old,
    "nested": lambda: nn.Sequential(torch.jit.script(Full()), nn.Linear(4, 4)),
    "tied": Tied,
}
X = torch.ones(2, 4)
NOT_SAVED = r"torch\.jit\.save needs the values of the deferred tensor .*lateinit\.materialize"


def twins(name: str) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(6)
    eager = BUILT[name]()
    torch.manual_seed(6)
    return eager, lateinit.deferred_init(BUILT[name])


@pytest.mark.parametrize("name", BUILT)
def test_a_scripted_module_computes_with_its_values(name: str) -> None:
    eager, late = twins(name)
    assert lateinit.is_deferred(late)
    with pytest.raises(RuntimeError):
        late(X)
    held = list(late.parameters())
    lateinit.materialize(late)
    assert not lateinit.is_deferred(late)
    assert late(X).equal(eager(X))
    assert all(a is b for a, b in zip(held, late.parameters(), strict=True))
    for (key, ours), (_, theirs) in zip(
        late.state_dict().items(), eager.state_dict().items(), strict=True
    ):
        assert ours.equal(theirs), key
    late(X).sum().backward()
    with torch.no_grad():
        for module in (eager, late):
            for parameter in module.parameters():
                parameter.mul_(2)
    assert late(X).equal(eager(X))


@pytest.mark.parametrize("name", BUILT)
def test_a_scripted_module_is_materialised_in_parts(name: str) -> None:
    eager, late = twins(name)
    optimizer = torch.optim.SGD(late.parameters(), lr=0.5)
    lateinit.materialize(late, only="*weight")
    assert lateinit.is_deferred(late)
    lateinit.materialize(late)
    assert late(X).equal(eager(X))
    late(X).sum().backward()
    optimizer.step()
    assert not late(X).equal(eager(X))


@pytest.mark.parametrize("name", BUILT)
def test_a_scripted_module_loads_a_state_dict(name: str) -> None:
    eager, late = twins(name)
    state = {key: torch.full_like(value, 0.5) for key, value in eager.state_dict().items()}
    eager.load_state_dict(state)
    late.load_state_dict(state)
    lateinit.materialize(late)
    assert late(X).equal(eager(X))


def test_a_scripted_module_is_saved_and_copied_as_eagerly(tmp_path: Any) -> None:
    eager, late = twins("full")
    lateinit.materialize(late)
    torch.jit.save(late, tmp_path / "late.pt")
    assert torch.jit.load(tmp_path / "late.pt")(X).equal(eager(X))
    assert late.plain.equal(eager.plain)


@pytest.mark.parametrize("name", sorted(BUILT.keys() - {"nested", "tied"}))
def test_a_scripted_module_is_not_saved_without_its_parameters(name: str, tmp_path: Any) -> None:
    eager, late = twins(name)
    for save in (torch.jit.save, type(late).save):
        with pytest.raises(DeferredTensorError, match=NOT_SAVED):
            save(late, str(tmp_path / "late.pt"))
    with pytest.raises(DeferredTensorError, match=NOT_SAVED):
        torch.jit.save(late, io.BytesIO())
    assert not list(tmp_path.iterdir())
    lateinit.materialize(late)
    torch.jit.save(late, str(tmp_path / "late.pt"))
    assert torch.jit.load(tmp_path / "late.pt")(X).equal(eager(X))


class Tables(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("kept", torch.randn(4))
        self.plain = torch.randn(4)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.kept + self.plain


def test_a_scripted_module_is_saved_if_it_has_no_parameters(tmp_path: Any) -> None:
    torch.manual_seed(6)
    eager = Tables()
    torch.manual_seed(6)
    late = lateinit.deferred_init(lambda: torch.jit.script(Tables()))
    state = torch.get_rng_state()
    torch.jit.save(late, tmp_path / "late.pt")
    assert state.equal(torch.get_rng_state())
    assert torch.jit.load(tmp_path / "late.pt")(X).equal(eager(X))
    assert late(X).equal(eager(X))


def test_a_module_that_is_scripted_after_the_block_is_not_saved_without_values() -> None:
    late = torch.jit.script(lateinit.deferred_init(nn.Linear, 4, 4))
    with pytest.raises(DeferredTensorError, match=NOT_SAVED):
        torch.jit.save(late, io.BytesIO())


def test_a_scripted_module_with_a_deferred_constant_is_not_saved() -> None:
    late = lateinit.deferred_init(
        lambda: torch.jit.freeze(torch.jit.script(nn.Linear(4, 4)).eval())
    )
    with pytest.raises(DeferredTensorError, match=NOT_SAVED):
        torch.jit.save(late, io.BytesIO())


@pytest.mark.parametrize("outer", [lambda m: m, nn.Sequential])
def test_a_frozen_module_says_what_its_graph_holds(outer: Any) -> None:
    def build() -> nn.Module:
        return outer(torch.jit.freeze(torch.jit.script(nn.Linear(4, 4)).eval()))

    late = lateinit.deferred_init(build)
    with pytest.raises(MaterializeError, match=r"'(weight|bias)' .* freeze or trace the module"):
        lateinit.materialize(late)


def _load(model: nn.Module) -> None:
    model.load_state_dict({name: torch.randn(t.shape) for name, t in model.state_dict().items()})


def _realise(model: nn.Module) -> None:
    assert model[1].running_var.sum() == 3
    lateinit.materialize(model)


@pytest.mark.parametrize("give", [lateinit.materialize, _load, _realise])
@pytest.mark.parametrize("inner", [False, True], ids=["whole", "a child"])
def test_a_module_that_was_scripted_while_deferred_stays_one_with_the_scripted_one(
    inner: bool, give: Callable[[nn.Module], Any]
) -> None:
    with lateinit.deferred():
        model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    if inner:
        scripted: Any = nn.Sequential(*map(torch.jit.script, model))
    else:
        scripted = torch.jit.script(model)
    give(model)
    before = copy.deepcopy(model.state_dict())
    scripted(torch.randn(4, 2)).square().sum().backward()
    optimizer.step()
    for ours, theirs in zip(model.parameters(), scripted.parameters(), strict=True):
        assert ours is theirs
    assert not torch.equal(model[0].weight, before["0.weight"])
    assert torch.equal(dict(scripted.named_buffers())["1.running_mean"], model[1].running_mean)
    model.requires_grad_(False)
    assert not any(parameter.requires_grad for parameter in scripted.parameters())
