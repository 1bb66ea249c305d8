"""Law 5: a checkpoint loaded into a deferred model gives what loading into the eager twin gives."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import lateinit
from lateinit._checkpoint.formats.open import open_checkpoint
from lateinit._checkpoint.load.dry_run import Rehearsal, plain_state, rehearse
from lateinit._checkpoint.load.plan import plan_load
from lateinit._tensors import AS_IT_IS, find_tensors
from tests.support import building
from tests.support.formats import FORMATS, SAFETENSORS
from tests.support.models import MODELS
from tests.support.snapshots import assert_same

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.support.cases import Case

UNSAVABLE = {"complex_draws"}  # safetensors has no complex128


def trained(model: nn.Module) -> dict[str, Any]:
    """A state dict in which no tensor has the value that it was initialised to."""
    return {name: changed(value) for name, value in model.state_dict().items()}


def changed(value: torch.Tensor) -> torch.Tensor:
    if value.dtype is torch.bool:
        return ~value
    return value * 3 + 1 if value.is_complex() else (value.double() * 3 + 1).to(value.dtype)


LOADED = [
    pytest.param(case, format_, id=f"{case}-{format_}")
    for case in MODELS
    for format_ in FORMATS
    if case.loads
    and not (case.name in UNSAVABLE and format_ in SAFETENSORS)
    and not (case.name == "many_dtypes" and format_ == "old pt")  # torch cannot read it back
]


@pytest.mark.parametrize(("case", "format_"), LOADED)
def test_a_deferred_model_loads_as_its_eager_twin_does(
    case: Case, format_: str, tmp_path: Path
) -> None:
    state = trained(building.eager(case))
    expected = building.eager(case)
    path = FORMATS[format_](state, tmp_path)
    expected.load_state_dict(state)
    model = building.deferred(case)
    before = torch.get_rng_state()
    lateinit.load_checkpoint(model, path)
    assert torch.equal(before, torch.get_rng_state())
    assert_same(expected, model)


# -- what is known without trying ------------------------------------------------------------------


def known_and_tried(model: nn.Module, path: Path) -> tuple[Rehearsal, Rehearsal]:
    reader = open_checkpoint(path)
    cast = AS_IT_IS.over(model, find_tensors(model))
    return rehearse(model, reader, cast, plain_state(model)), rehearse(model, reader, cast)


def told(rehearsal: Rehearsal) -> tuple[Any, ...]:
    copies = sorted((str(source), id(target)) for target, source in rehearsal.copies)
    return copies, rehearsal.missing, rehearsal.unexpected, rehearsal.wrong, rehearsal.replaced


def is_plain(model: nn.Module) -> bool:
    state = plain_state(model)
    return state is not None and {type(t) for t in state.values()} <= {torch.Tensor, nn.Parameter}


@pytest.mark.parametrize("left_out", [0, 1])
@pytest.mark.parametrize("case", [case for case in MODELS if case.loads], ids=str)
def test_what_is_known_of_plain_models_is_what_torch_does(
    case: Case, left_out: int, tmp_path: Path
) -> None:
    eager, model = building.eager(case), building.deferred(case)
    path = FORMATS["pt"](dict(list(trained(eager).items())[left_out:]), tmp_path)
    known, tried = known_and_tried(model, path)
    assert known.plain == is_plain(eager)
    assert told(known) == told(tried)


def test_linear_layers_are_plain() -> None:
    assert is_plain(nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2), nn.Embedding(2, 2)))


def with_hook(model: nn.Module) -> None:
    model[1].register_load_state_dict_pre_hook(lambda *_: None)


def with_later_hook(model: nn.Module) -> None:
    model[1].register_load_state_dict_post_hook(lambda *_: None)


def with_own_method(model: nn.Module) -> None:
    model[1]._load_from_state_dict = lambda *_: None


def with_extra_state(model: nn.Module) -> None:
    model[1] = type("Extra", (nn.Linear,), {"set_extra_state": lambda *_: None})(2, 2)


def with_own_class(model: nn.Module) -> None:
    model[1] = type("Own", (nn.Linear,), {"_load_from_state_dict": lambda *_: None})(2, 2)


def with_own_load(model: nn.Module) -> None:
    model.load_state_dict = lambda *_, **__: None


def with_lazy_part(model: nn.Module) -> None:
    model[1] = lateinit.nn.LazyLinear(2)


def with_instance_norm(model: nn.Module) -> None:
    model.append(nn.InstanceNorm1d(2))


@pytest.mark.parametrize(
    "change",
    [
        with_hook,
        with_later_hook,
        with_own_method,
        with_extra_state,
        with_own_class,
        with_own_load,
        with_lazy_part,
        with_instance_norm,
    ],
)
def test_a_model_that_loads_in_its_own_way_is_not_plain(
    change: Callable[[nn.Module], None],
) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    assert plain_state(model) is not None
    change(model)
    assert plain_state(model) is None


def test_what_does_not_fit_is_left_to_torch(tmp_path: Path) -> None:
    model = nn.Linear(2, 3)
    state = model.state_dict()
    wrong = (
        state | {"weight": torch.ones(2, 2)},
        state | {"more": torch.ones(1)},
        state | {"more": 3},
    )
    for number, entries in enumerate(wrong):
        torch.save(entries, tmp_path / f"{number}.pt")
        known, _ = known_and_tried(model, tmp_path / f"{number}.pt")
        assert not known.plain


def test_a_parameter_of_a_class_of_its_own_is_left_to_torch(tmp_path: Path) -> None:
    class Loud(nn.Parameter):
        pass

    model = nn.Linear(2, 3)
    torch.save(model.state_dict(), tmp_path / "a.pt")
    assert known_and_tried(model, tmp_path / "a.pt")[0].plain
    model.weight = Loud(torch.ones(3, 2))
    assert not known_and_tried(model, tmp_path / "a.pt")[0].plain


def test_a_name_that_a_file_calls_tied_is_known_too(tmp_path: Path) -> None:
    tied = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    tied[1].weight = tied[0].weight
    lateinit.save_checkpoint(tied, tmp_path / "a.safetensors")
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    known, tried = known_and_tried(model, tmp_path / "a.safetensors")
    assert known.plain
    assert told(known) == told(tried)
    lateinit.load_checkpoint(model, tmp_path / "a.safetensors")
    assert torch.equal(model[1].weight, tied[0].weight)


def test_a_checkpoint_may_lack_a_lazy_batch_norm(tmp_path: Path) -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(5))
            self.norm = lateinit.nn.LazyBatchNorm1d()

    model = lateinit.deferred_init(Scaled)
    path = FORMATS["safetensors"]({"scale": torch.full((5,), 4.0)}, tmp_path)
    lateinit.load_checkpoint(model, path, strict=False)
    lateinit.infer_shapes(model.norm, torch.empty(2, 5, device="meta"))
    lateinit.materialize(model)
    assert torch.equal(model.scale, torch.full((5,), 4.0))
    assert_same(nn.BatchNorm1d(5), model.norm)


# -- the plan --------------------------------------------------------------------------------------


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 3, bias=False), nn.Linear(3, 3)
        self.second.weight = self.first.weight
        self.register_buffer("table", torch.arange(3).float(), persistent=False)


def test_a_plan_of_a_load_can_be_read_and_has_changed_nothing(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    weight = torch.randn(3, 3)
    save_file({"first.weight": weight, "second.weight": weight.clone()}, path)
    model = lateinit.deferred_init(Tied)
    plan = plan_load(model, open_checkpoint(path), AS_IT_IS, strict=False)
    lines = str(plan).splitlines()
    assert lines[:4] == [
        f"{path}: 2 copies, 72 B",
        "  first.weight <- first.weight",
        "  first.weight <- second.weight, read already",
        "2 steps, 3 of 5 recorded ops, 24 bytes",
    ]
    assert [line for line in lines if "->" in line] == [
        "         -> second.bias",
        "         -> table",
    ]
    assert all(found.deferred for found in find_tensors(model))


def test_a_plan_of_a_load_with_hooks_says_so(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"weight": torch.randn(3, 3), "bias": torch.randn(3)}, path)
    model = lateinit.deferred_init(nn.Linear, 3, 3)
    model.register_load_state_dict_pre_hook(
        lambda _, state, *__: state.update(bias=state["bias"] * 2)
    )
    lines = str(plan_load(model, open_checkpoint(path), AS_IT_IS, strict=True)).splitlines()
    assert lines[0].endswith("2 copies, 36 B, by load_state_dict and its hooks")
    assert lines[1:3] == ["  weight <- weight", "  bias <- a value that a hook computes"]
