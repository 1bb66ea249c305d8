"""Law 5: a checkpoint loaded into a deferred model gives what loading into the eager twin gives."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

import lateinit
from tests import laws
from tests.formats import FORMATS, SAFETENSORS
from tests.models import MODELS
from tests.snapshots import assert_same

if TYPE_CHECKING:
    from pathlib import Path

    from tests.cases import Case

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
    state = trained(laws.eager(case))
    expected = laws.eager(case)
    path = FORMATS[format_](state, tmp_path)
    expected.load_state_dict(state)
    model = laws.deferred(case)
    before = torch.get_rng_state()
    lateinit.load_checkpoint(model, path)
    assert torch.equal(before, torch.get_rng_state())
    assert_same(expected, model)
