"""Tensors that become real after another one on their storage, which was cast."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import lateinit
from lateinit.errors import DeferredTensorError


class Kept(nn.Module):
    """A layer and, out of the walk's reach, another tensor on the memory of its weight."""

    def __init__(self, view: Any = torch.Tensor.detach) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 5, bias=False)
        seen = view(self.layer.weight.detach())
        self.seen = lambda: seen


def loaded(model: nn.Module, path: Path) -> None:
    save_file({"layer.weight": torch.arange(15.0).reshape(5, 3)}, path)
    lateinit.load_checkpoint(model, path, dtype=torch.bfloat16)


def materialised(model: nn.Module, _: Path) -> None:
    lateinit.materialize(model, dtype=torch.bfloat16)


@pytest.mark.parametrize("cast", [loaded, materialised])
@pytest.mark.parametrize("view", [torch.Tensor.detach, lambda w: w[1:, 2], lambda w: w.t()])
def test_a_tensor_on_memory_that_was_cast_shows_it_as_it_is_now(
    tmp_path: Path, cast: Any, view: Any
) -> None:
    torch.manual_seed(0)
    with lateinit.deferred():
        model = Kept(view)
    cast(model, tmp_path / "m.safetensors")
    seen = lateinit.materialize(model.seen(), dtype=torch.bfloat16)
    assert seen.dtype is torch.bfloat16
    assert seen.equal(view(model.layer.weight.detach()))
    with torch.no_grad():
        model.layer.weight.zero_()
    assert not seen.any()


@pytest.mark.parametrize("cast", [loaded, materialised])
@pytest.mark.parametrize("use", [lateinit.materialize, torch.clone, lambda t: t.copy_(t + 1)])
def test_bytes_that_a_cast_has_changed_are_not_shown_in_another_dtype(
    tmp_path: Path, cast: Any, use: Any
) -> None:
    with lateinit.deferred():
        model = Kept(lambda w: w.view(torch.int32))
    cast(model, tmp_path / "m.safetensors")
    with pytest.raises(DeferredTensorError, match=r"int32 .*shares its memory .*bfloat16"):
        use(model.seen())
    assert lateinit.is_deferred(model.seen())


@pytest.mark.parametrize("cast", [loaded, materialised])
def test_another_cast_of_memory_that_is_shared_is_refused(tmp_path: Path, cast: Any) -> None:
    with lateinit.deferred():
        model = Kept()
    cast(model, tmp_path / "m.safetensors")
    with pytest.raises(DeferredTensorError, match="ask for the same"):
        lateinit.materialize(model.seen())
    assert lateinit.is_deferred(model.seen())


def test_strides_of_a_kernel_are_kept_for_tensors_that_become_real_later() -> None:
    def computed() -> torch.Tensor:
        return torch.randn(1, 3).t().sort(0).values

    torch.manual_seed(0)
    expected = computed()
    torch.manual_seed(0)
    with lateinit.deferred():
        first = computed()
        second = first.detach()
    lateinit.materialize(first)
    lateinit.materialize(second)
    assert first.stride() == second.stride() == expected.stride()
    assert second.equal(expected)
