"""accelerate's device maps, ``"auto"`` and ``"disk"``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import dispatch_model, infer_auto_device_map
from torch import nn

import lateinit
from lateinit.errors import DeviceError
from tests.support.snapshots import assert_same

X = torch.arange(10).view(2, 5)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.drop = nn.Dropout(0.0)
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))
        self.norm = nn.LayerNorm(6)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("scale", torch.rand(6), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.drop(self.embed(x))
        for layer in self.layers:
            y = layer(y).tanh()
        return self.head(self.norm(y) * self.scale)


def eager() -> Net:
    torch.manual_seed(3)
    return Net()


def net() -> Net:
    torch.manual_seed(3)
    return lateinit.deferred_init(Net)


MAP = {"embed": "cpu", "layers.0": "cpu", "layers.1": "disk", "layers.2": "disk"}
MAP |= {"drop": "cpu", "norm": "cpu", "head": "cpu", "scale": "cpu"}


def test_auto_is_the_map_of_accelerate() -> None:
    assert_same(eager(), lateinit.materialize(net(), device="auto"))
    given = infer_auto_device_map(net())
    assert_same(eager(), lateinit.materialize(net(), device=given))
    dispatched = dispatch_model(lateinit.materialize(net(), device=given), given)
    assert torch.equal(dispatched(X), eager()(X))
    with pytest.raises(DeviceError, match="device='auto' is for a module"):
        lateinit.materialize([net()], device="auto")


def test_auto_tells_that_accelerate_can_make_no_map(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise IndexError("list index out of range")  # as of accelerate 1 with some tied weights

    monkeypatch.setattr("accelerate.infer_auto_device_map", fail)
    model = net()
    with pytest.raises(DeviceError, match=r"no map for Net \(IndexError: .*: give a map"):
        lateinit.materialize(model, device="auto")
    assert lateinit.is_deferred(model)


def test_parameters_without_elements_go_to_disk_too(tmp_path: Any) -> None:
    def build() -> nn.Module:
        model = nn.Linear(3, 2)
        model.empty = nn.Parameter(torch.zeros(0, 3))
        return model

    torch.manual_seed(0)
    expected = build()
    torch.manual_seed(0)
    model = lateinit.deferred_init(build)
    lateinit.materialize(model, device="disk", offload_folder=tmp_path)
    x = torch.rand(4, 3)
    assert torch.equal(model(x), expected(x))


@pytest.mark.parametrize("given", ["disk", MAP, {"*": "disk", "embed": "disk"}])
def test_what_is_on_disk_is_loaded_in_each_forward(given: Any, tmp_path: Path) -> None:
    expected, model = eager(), net()
    lateinit.materialize(model, device=given, offload_folder=tmp_path / "weights")
    assert not lateinit.is_deferred(model)
    assert model.layers[1].weight.is_meta
    assert not model.scale.is_meta
    assert model.layers[0].weight.is_meta == (given is not MAP)
    for _ in range(2):
        assert torch.equal(model(X), expected(X))
        assert model.layers[1].weight.is_meta


def test_other_dtypes_rules_and_loads_go_to_disk(tmp_path: Path) -> None:
    rules = {"layers": "normal"}
    expected = lateinit.materialize(net(), dtype=torch.bfloat16, init=rules)
    model = net()
    lateinit.materialize(
        model, device=MAP, dtype=torch.bfloat16, init=rules, offload_folder=str(tmp_path / "a")
    )
    expected.scale = expected.scale.bfloat16()
    model.scale = model.scale.bfloat16()
    assert torch.equal(model(X), expected(X))
    source = lateinit.materialize(net(), seed=8)
    lateinit.save_checkpoint(source, tmp_path / "saved.safetensors")
    loaded = net()
    lateinit.load_checkpoint(
        loaded, tmp_path / "saved.safetensors", device=MAP, offload_folder=tmp_path / "b"
    )
    assert loaded.layers[2].bias.is_meta
    loaded.scale = source.scale
    assert torch.equal(loaded(X), source(X))


@pytest.mark.filterwarnings("ignore")
def test_a_map_with_disk_can_be_dispatched_again(tmp_path: Path) -> None:
    model = lateinit.materialize(net(), device=MAP, offload_folder=tmp_path)
    assert torch.equal(dispatch_model(model, MAP, offload_dir=tmp_path)(X), eager()(X))


WRONG: dict[str, Any] = {
    "no folder": ({"device": "disk"}, "say where, by offload_folder="),
    "a part": ({"device": "disk", "offload_folder": "f", "only": "norm*"}, "leave only= out"),
    "half a module": (
        {"device": {"": "cpu", "norm.weight": "disk"}, "offload_folder": "f"},
        "of the parameters of 'norm' itself some are on disk",
    ),
}


@pytest.mark.parametrize("case", sorted(WRONG))
def test_disk_that_cannot_be_honoured_is_refused(case: str) -> None:
    options, message = WRONG[case]
    model = net()
    with pytest.raises(DeviceError, match=message):
        lateinit.materialize(model, **options)
    assert_same(eager(), lateinit.materialize(model))


def test_shared_memory_cannot_go_to_disk(tmp_path: Path) -> None:
    def build() -> nn.Module:
        module = nn.Module()
        whole = torch.randn(6)
        module.low, module.high = nn.Parameter(whole[:4]), nn.Parameter(whole[2:])
        return module

    with pytest.raises(DeviceError, match="'low', 'high' share one storage, which files cannot"):
        lateinit.materialize(lateinit.deferred_init(build), device="disk", offload_folder=tmp_path)
