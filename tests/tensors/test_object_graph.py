"""What a rehearsal may write to, and what it must leave as it was for the real load."""

from __future__ import annotations

import random
import warnings
from collections import Counter, deque
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import nn

import lateinit
from lateinit.errors import CheckpointError, MismatchError
from tests.support.snapshots import assert_same, snapshot
from tests.support.twins import twins

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


class Kept:
    """An object of any class, with a tensor and a count."""

    def __init__(self) -> None:
        self.count, self.table = 0, torch.ones(3)

    def hook(self, _: Any, state: Any, *__: Any) -> None:
        self.count += 1
        self.table.add_(1)
        state["bias"] = state["bias"] * self.count + self.table


class Tagged(nn.Parameter):
    """A parameter of a class of its own."""


class Model(nn.Module):
    """Has one of everything that a hook may write to."""

    def __init__(self, hook: Any = None) -> None:
        super().__init__()
        self.weight, self.bias = Tagged(torch.randn(3)), nn.Parameter(torch.randn(3))
        self.weight.scale, self.weight.table = 3.0, torch.ones(3)
        self.kept, self.listed, self.nested = Kept(), [nn.Linear(3, 3)], ((1, torch.ones(3)),)
        object.__setattr__(self, "hidden", nn.Linear(3, 3))
        self.array, self.raw, self.queue = np.zeros(3), bytearray(3), deque([1])
        self.numbers, self.seen = Counter(), set()
        self.torch_rng = torch.Generator().manual_seed(1)
        self.numpy_rng, self.old_rng = np.random.default_rng(2), np.random.RandomState(3)
        self.rng = random.Random(4)
        if hook is not None:
            self.register_load_state_dict_pre_hook(hook)


def an_object(m: Any, state: Any, *_: Any) -> None:
    if not m.kept.count:
        state["bias"] = state["bias"] * 2
    m.kept.count += 1
    m.kept.table.mul_(3)


def modules_in_lists(m: Any, state: Any, *_: Any) -> None:
    m.listed[0].load_state_dict({"weight": torch.eye(3), "bias": state["bias"]})
    with torch.no_grad():
        m.hidden.weight.mul_(2).add_(state["bias"])


def a_nested_tuple(m: Any, *_: Any) -> None:
    m.nested[0][1].add_(1)


def plain_data(m: Any, *_: Any) -> None:
    m.array += 1
    m.raw[0] += 1
    m.queue.append(1)
    m.numbers["a"] += 1
    m.seen.add(len(m.seen))


def generators(m: Any, state: Any, *_: Any) -> None:
    state["bias"] = torch.randn(3, generator=m.torch_rng)
    state["bias"] += torch.from_numpy(m.numpy_rng.normal(size=3) + m.old_rng.normal(size=3))
    state["bias"] += m.rng.random()


def attributes_of_a_parameter(m: Any, state: Any, *_: Any) -> None:
    assert isinstance(m.weight, Tagged)
    state["weight"] = state["weight"] * m.weight.scale
    m.weight.table.copy_(state["bias"])
    m.weight.scale += 1


def what_is_no_tensor(_: Any, state: Any, __: str, versions: Any, *___: Any) -> None:
    if state.pop("note").pop("double", False):
        state["bias"] = state["bias"] * 2
    if versions.setdefault("version", 1) == 1:
        versions["version"] = 2
        state["bias"] = state["bias"] + 1
    state["bias"] = state.pop("sparse").mul_(2).to_dense() + state["bias"]


def closure() -> Callable[..., None]:
    count, table = 0, torch.ones(3)

    def hook(_: Any, state: Any, *__: Any) -> None:
        nonlocal count
        count += 1
        table.add_(1)
        state["bias"] = state["bias"] * count + table

    return hook


def counted(calls: list[int], _: Any, state: Any, *__: Any) -> None:
    calls.append(1)
    state["bias"] = state["bias"] * len(calls)


HOOKS: dict[str, Callable[[], Any]] = {
    **{
        hook.__name__: (lambda hook=hook: hook)
        for hook in (
            an_object,
            modules_in_lists,
            a_nested_tuple,
            plain_data,
            generators,
            attributes_of_a_parameter,
            what_is_no_tensor,
        )
    },
    "a closure": closure,
    "a method of an object": lambda: Kept().hook,
    "a partial": lambda: partial(counted, []),
}
STATE = {"weight": torch.arange(3.0), "bias": torch.ones(3)}
OBJECTS = {"note": {"double": True}, "sparse": torch.eye(3)[0].to_sparse()}


def seen(model: Any) -> Any:
    """What a snapshot does not show."""
    rngs = model.torch_rng.get_state().tolist(), model.numpy_rng.normal(), model.rng.random()
    weight = model.weight.scale, lateinit.materialize(model.weight.table).tolist()
    kept = model.kept.count, lateinit.materialize(model.kept.table).tolist()
    return rngs, weight, kept, model.raw, model.queue, model.old_rng.normal()


@pytest.mark.parametrize("name", HOOKS)
def test_what_a_hook_writes_to_is_written_once(name: str, tmp_path: Path) -> None:
    state = STATE | (OBJECTS if name == "what_is_no_tensor" else {})
    torch.save(state, tmp_path / "weights.pt")
    eager, model = twins(lambda: Model(HOOKS[name]()))
    real, _ = twins(lambda: Model(HOOKS[name]()))
    eager.load_state_dict(torch.load(tmp_path / "weights.pt"))
    expected = seen(eager)
    for loaded in (model, real):
        lateinit.load_checkpoint(loaded, tmp_path / "weights.pt")
        assert_same(eager, loaded)
        assert seen(loaded) == expected


@pytest.mark.parametrize("name", HOOKS)
def test_what_a_hook_writes_to_is_as_it_was_after_an_error(name: str, tmp_path: Path) -> None:
    state = STATE | (OBJECTS if name == "what_is_no_tensor" else {})
    torch.save(
        {k: v for k, v in state.items() if k != "weight"} | {"no": STATE["bias"]},
        tmp_path / "weights.pt",
    )
    eager, model = twins(lambda: Model(HOOKS[name]()))
    real, _ = twins(lambda: Model(HOOKS[name]()))
    expected = seen(eager)
    for loaded in (model, real):
        with pytest.raises((MismatchError, CheckpointError), match=r"weight"):
            lateinit.load_checkpoint(loaded, tmp_path / "weights.pt")
        assert_same(eager, lateinit.materialize(loaded))
        assert seen(loaded) == expected


class Slotted:
    """An object without a dict."""

    __slots__ = ("count", "table", "unset")

    def __init__(self) -> None:
        self.count, self.table = 1, torch.ones(3)


class Hidden:
    """Shows its attributes to nobody."""

    @property
    def __dict__(self) -> Any:
        raise RuntimeError("no")


class Pair(NamedTuple):
    one: torch.Tensor
    two: int


class Wide(nn.Linear):
    """Holds its tensors in places of many kinds."""

    calls, table = 1, torch.ones(3)

    def __init__(self) -> None:
        super().__init__(3, 3)
        self.slotted, self.pair, self.shy = Slotted(), Pair(torch.ones(3), 2), Hidden()
        self.keys = {parameter: n for n, parameter in enumerate(self.parameters(), 2)}
        self.set, self.queue = set(self.parameters()), deque(self.parameters())
        self.optimizer = torch.optim.Adam(self.parameters())
        self.register_load_state_dict_post_hook(self._after)

    @staticmethod
    @torch.no_grad()
    def _after(module: Any, _: Any) -> None:
        for parameter, factor in module.keys.items():
            parameter.mul_(factor)
        for parameter in (*module.set, *module.queue):
            parameter.add_(1)
        module.slotted.count += 1
        module.slotted.table.add_(module.pair.one.mul_(2))
        type(module).calls += 1
        type(module).table.mul_(2)
        module.bias.mul_(module.slotted.count).add_(module.slotted.table)
        module.bias.mul_(module.calls).add_(module.table)
        with torch.enable_grad():
            module(torch.ones(1, 3)).sum().backward()
        module.optimizer.step()
        module.optimizer.zero_grad()


@pytest.mark.parametrize("part", [None, "weight", "bias"])
def test_tensors_are_exchanged_wherever_they_are(part: str | None, tmp_path: Path) -> None:
    def fresh() -> None:
        Wide.calls, Wide.table = 1, torch.ones(3)

    eager, model = twins(Wide)
    real, _ = twins(Wide)
    path = tmp_path / "weights.pt"
    torch.save({"weight": torch.eye(3), "bias": torch.ones(3)}, path)
    if part is not None:
        lateinit.materialize(model, only=part)
    fresh()
    eager.load_state_dict(torch.load(path))
    held = Wide.calls, Wide.table
    for loaded in (model, real):
        fresh()
        lateinit.load_checkpoint(loaded, path)
        assert torch.equal(eager.weight, loaded.weight)
        assert torch.equal(eager.bias, loaded.bias)
        assert Wide.calls == held[0]
        assert torch.equal(Wide.table, held[1])
        assert set(loaded.keys) == loaded.set == set(loaded.parameters())
        assert set(loaded.optimizer.state) == loaded.set


def test_hooks_of_what_was_made_in_inference_mode_are_loaded(tmp_path: Path) -> None:
    def double(_: Any, state: Any, *__: Any) -> None:
        state["bias"] = state["bias"] * 2

    with torch.inference_mode():
        model = lateinit.deferred_init(nn.Linear, 3, 3)
    model.register_load_state_dict_pre_hook(double)
    torch.save({"weight": torch.eye(3), "bias": torch.ones(3)}, tmp_path / "weights.pt")
    lateinit.load_checkpoint(model, tmp_path / "weights.pt")
    assert model.bias.is_inference()
    assert model.bias.tolist() == [2, 2, 2]


class Extra(nn.Module):
    """Has a state of its own, of a version that it may not know."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.mode = nn.Parameter(torch.randn(3)), 0
        self.register_load_state_dict_post_hook(self._after)

    def get_extra_state(self) -> Any:
        return {"mode": [2]}

    def set_extra_state(self, state: Any) -> None:
        self.mode = state["mode"].pop()
        if self.mode == 3:
            raise ValueError("a mode from the future")

    @staticmethod
    def _after(module: Any, _: Any) -> None:
        module.weight.data.mul_(module.mode)


def test_extra_state_steers_what_comes_after(tmp_path: Path) -> None:
    eager, model = twins(lambda: nn.Sequential(Extra(), Extra()))
    torch.save(eager.state_dict(), tmp_path / "weights.pt")
    lateinit.load_checkpoint(model, tmp_path / "weights.pt")
    eager.load_state_dict(torch.load(tmp_path / "weights.pt"))
    assert_same(eager, model)


def test_extra_state_that_is_refused_is_told_before_anything_changes(tmp_path: Path) -> None:
    eager, model = twins(lambda: nn.Sequential(Extra(), Extra()))
    before = snapshot(eager)
    state = {k: v + 1 if isinstance(v, torch.Tensor) else v for k, v in eager.state_dict().items()}
    torch.save(state | {"1._extra_state": {"mode": [3]}}, tmp_path / "weights.pt")
    for loaded in (model, eager):
        with pytest.raises(CheckpointError, match="a mode from the future"):
            lateinit.load_checkpoint(loaded, tmp_path / "weights.pt")
        assert_same(before, lateinit.materialize(loaded))


def test_a_warning_that_is_an_error_is_told_before_anything_changes(tmp_path: Path) -> None:
    def warn(*_: Any) -> None:
        warnings.warn("of an old version", stacklevel=1)

    eager, model = twins(lambda: nn.Linear(2, 2))
    model.register_load_state_dict_post_hook(warn)
    torch.save({"weight": torch.ones(2, 2), "bias": torch.ones(2)}, tmp_path / "weights.pt")
    with pytest.raises(CheckpointError, match="of an old version"):
        lateinit.load_checkpoint(model, tmp_path / "weights.pt")
    assert_same(eager, lateinit.materialize(model))
    with pytest.warns(UserWarning, match="of an old version") as told:
        lateinit.load_checkpoint(model, tmp_path / "weights.pt")
    assert len(told) == 1
