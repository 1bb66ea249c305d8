"""What a rehearsal finds out, and how sure it is that the real load does the same."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

import lateinit
from lateinit.errors import CheckpointError, MismatchError
from tests.support.snapshots import assert_same
from tests.support.twins import assert_untouched, twins

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

WEIGHT, BIAS = torch.arange(9.0).view(3, 3), torch.ones(3)


class Around(nn.Module):
    """Hands the state dict on to what it is around."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 3)

    def load_state_dict(self, state: Any, strict: bool = True) -> Any:
        return self.inner.load_state_dict(state, strict)


class AlwaysStrict(Around):
    """Does not let itself be asked to be anything else."""

    def load_state_dict(self, state: Any) -> Any:
        return self.inner.load_state_dict(state)


def saved(folder: Path, **state: Any) -> Path:
    path = folder / "weights.pt"
    torch.save(state, path)
    return path


@pytest.mark.parametrize("kind", [Around, AlwaysStrict])
def test_a_module_that_hands_the_state_dict_on_is_loaded(
    kind: Callable[[], nn.Module], tmp_path: Path
) -> None:
    eager, model = twins(kind)
    lateinit.load_checkpoint(model, saved(tmp_path, weight=WEIGHT, bias=BIAS))
    eager.load_state_dict({"weight": WEIGHT, "bias": BIAS})
    assert_same(eager, model)


@pytest.mark.parametrize("kind", [Around, AlwaysStrict])
@pytest.mark.parametrize(
    ("state", "told"),
    [
        ({"weight": WEIGHT}, "Missing.*bias"),
        ({"weight": WEIGHT, "bias": BIAS, "other": BIAS}, "Unexpected.*other"),
        ({"weight": WEIGHT, "bias": WEIGHT}, "size mismatch for bias"),
    ],
)
def test_a_module_that_hands_the_state_dict_on_is_as_strict(
    kind: Callable[[], nn.Module], state: dict[str, Any], told: str, tmp_path: Path
) -> None:
    eager, model = twins(kind)
    with pytest.raises(RuntimeError, match=told):
        eager.load_state_dict(state)
    with pytest.raises(MismatchError, match=f"(?s){told}"):
        lateinit.load_checkpoint(model, saved(tmp_path, **state))
    assert_untouched(twins(kind)[0], model)


def test_what_is_missing_of_a_module_that_hands_the_state_dict_on_is_initialised(
    tmp_path: Path,
) -> None:
    eager, model = twins(Around)
    report = lateinit.load_checkpoint(
        model, saved(tmp_path, weight=WEIGHT, other=BIAS), strict=False
    )
    eager.load_state_dict({"weight": WEIGHT, "other": BIAS}, strict=False)
    assert_same(eager, model)
    assert [entry.name for entry in report.initialised] == ["inner.bias"]
    assert [entry.name for entry in report.unexpected] == ["other"]


CALLS: list[int] = []


def only_once(_: Any, state: Any, *__: Any) -> None:
    """Keeps what it has done where no rehearsal can undo it."""
    if not CALLS:
        CALLS.append(1)
        state["weight"] = state.pop("old")


def test_a_hook_that_does_something_else_the_second_time_is_no_silent_loss(tmp_path: Path) -> None:
    CALLS.clear()
    model = lateinit.deferred_init(nn.Linear, 3, 3)
    model.register_load_state_dict_pre_hook(only_once)
    with pytest.raises(CheckpointError, match="in another way the second time"):
        lateinit.load_checkpoint(model, saved(tmp_path, old=WEIGHT, bias=BIAS), strict=False)


def test_a_hook_may_remove_itself(tmp_path: Path) -> None:
    def build() -> nn.Module:
        def hook(_: Any, state: Any, *__: Any) -> None:
            handle.remove()
            state["bias"] = state["bias"] * 2

        model = nn.Linear(3, 3)
        handle = model.register_load_state_dict_pre_hook(hook)
        return model

    eager, model = twins(build)
    path = saved(tmp_path, weight=WEIGHT, bias=BIAS)
    for number in (2, 1):
        lateinit.load_checkpoint(model, path)
        eager.load_state_dict(torch.load(path))
        assert_same(eager, model)
        assert model.bias[0] == number


@pytest.mark.parametrize("grad", [True, False])
def test_hooks_run_with_gradients_as_they_would(grad: bool, tmp_path: Path) -> None:
    def after(module: Any, _: Any) -> None:
        module.table = module.weight * 2
        if not torch.is_grad_enabled():
            module.weight.mul_(2)

    eager, model = twins(lambda: nn.Linear(3, 3))
    path = saved(tmp_path, weight=WEIGHT, bias=BIAS)
    for part in (eager, model):
        part.register_load_state_dict_post_hook(after)
    with torch.set_grad_enabled(grad):
        eager.load_state_dict(torch.load(path))
        lateinit.load_checkpoint(model, path)
    assert_same(eager, model)
    assert model.table.requires_grad is grad


def test_an_index_may_start_and_stop_at_what_the_checkpoint_has(tmp_path: Path) -> None:
    def before(_: Any, state: Any, *__: Any) -> None:
        at = state.pop("at")
        state["bias"] = state.pop("all")[at:]
        state["weight"] = state["weight"][:, at:, None][..., 0].expand(3, 3)

    eager, model = twins(lambda: nn.Linear(3, 3))
    path = saved(tmp_path, weight=WEIGHT, all=torch.arange(5.0), at=torch.tensor(2))
    for part in (eager, model):
        part.register_load_state_dict_pre_hook(before)
    eager.load_state_dict(torch.load(path))
    lateinit.load_checkpoint(model, path)
    assert_same(eager, model)


def test_what_an_object_or_a_closure_keeps_of_a_state_dict_has_values(tmp_path: Path) -> None:
    held: list[torch.Tensor] = []

    def before(module: Any, state: Any, *_: Any) -> None:
        module.info.weight = state["weight"]
        held.append(state["bias"].detach())

    def after(module: Any, _: Any) -> None:
        module.weight.data.mul_(2)
        module.bias.data.mul_(2)

    model = lateinit.deferred_init(nn.Linear, 3, 3)
    model.info = SimpleNamespace()
    model.register_load_state_dict_pre_hook(before)
    model.register_load_state_dict_post_hook(after)
    lateinit.load_checkpoint(model, saved(tmp_path, weight=WEIGHT, bias=BIAS))
    assert torch.equal(model.info.weight, WEIGHT)
    assert [tensor.tolist() for tensor in held] == [[1, 1, 1]]
    assert torch.equal(model.weight, WEIGHT * 2)


@pytest.mark.parametrize("version", [None, 1, 2])
def test_a_batch_norm_without_its_counter_loads_if_its_version_had_none(
    version: int | None, tmp_path: Path
) -> None:
    eager, model = twins(lambda: nn.Sequential(nn.BatchNorm1d(2)))
    state = eager.state_dict()
    del state["0.num_batches_tracked"]
    state["0.bias"] += 1
    if version is None:
        del state._metadata
    else:
        state._metadata["0"]["version"] = version
    torch.save(state, tmp_path / "weights.pt")
    if version == 2:
        with pytest.raises(MismatchError, match="num_batches_tracked"):
            lateinit.load_checkpoint(model, tmp_path / "weights.pt")
        return
    eager.load_state_dict(state)
    lateinit.load_checkpoint(model, tmp_path / "weights.pt")
    assert_same(eager, model)
