"""accelerate's ways to fill and to move a model, on one that is deferred."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate import (
    cpu_offload,
    disk_offload,
    dispatch_model,
    load_checkpoint_and_dispatch,
    load_checkpoint_in_model,
)
from accelerate.utils import set_module_tensor_to_device
from accelerate.utils.fsdp_utils import fsdp2_load_full_state_dict
from safetensors.torch import save_file
from torch import nn
from torch.distributed.fsdp import fully_shard

import lateinit
from lateinit.errors import DeferredTensorError
from tests.support.tied import Net, X


def trained() -> Net:
    torch.manual_seed(7)
    return Net()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    state = trained().state_dict()
    state.pop("down.weight")
    save_file(state, tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


LOADS: dict[str, Any] = {
    "in model": lambda model, file: load_checkpoint_in_model(model, str(file)),
    "placed": lambda model, file: load_checkpoint_in_model(
        model, str(file), device_map={"": "cpu"}
    ),
    "dispatched": lambda model, file: load_checkpoint_and_dispatch(
        model, str(file), device_map={"": "cpu"}
    ),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("way", LOADS)
def test_a_checkpoint_is_loaded(way: str, file: Path) -> None:
    model = lateinit.deferred_init(Net)
    LOADS[way](model, file)
    assert model.down.weight is model.up.weight
    assert torch.equal(model(X), trained()(X))


def test_one_tensor_is_set() -> None:
    torch.manual_seed(7)
    model = lateinit.deferred_init(Net)
    bias = torch.full((3,), 2.0)
    set_module_tensor_to_device(model, "up.bias", "cpu", value=bias)
    assert isinstance(model.up.bias, nn.Parameter)
    expected = trained()
    with torch.no_grad():
        expected.up.bias.copy_(bias)
    assert torch.equal(lateinit.materialize(model)(X), expected(X))


MOVES: dict[str, Any] = {
    "set": lambda model, _: set_module_tensor_to_device(model, "up.weight", "cpu"),
    "dispatch": lambda model, _: dispatch_model(model, {"": "cpu"}, force_hooks=True),
    "disk": lambda model, folder: disk_offload(model, folder, torch.device("cpu"))(X),
    "cpu": lambda model, _: cpu_offload(model, torch.device("cpu"))(X),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("way", MOVES)
def test_moving_what_has_no_values_is_refused(way: str, tmp_path: Path) -> None:
    model = lateinit.deferred_init(Net)
    with pytest.raises(DeferredTensorError, match=r"'(up|down)\..*lateinit.materialize"):
        MOVES[way](model, str(tmp_path))


@pytest.mark.parametrize("main", [True, False], ids=["rank 0", "another rank"])
def test_accelerate_is_told_on_every_rank_not_to_send_what_is_deferred(main: bool) -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model = lateinit.deferred_init(lambda: nn.Sequential(nn.Linear(4, 2)))
        state = model.state_dict() if main else {}
        fully_shard(model, mesh=dist.device_mesh.init_device_mesh("cpu", (1,)))
        accelerator = SimpleNamespace(is_main_process=main, device=torch.device("cpu"))
        with pytest.raises(
            DeferredTensorError, match=r"pass cpu_ram_efficient_loading=False .*docs/recipes\.md"
        ):
            fsdp2_load_full_state_dict(accelerator, model, state)
        lateinit.materialize(model)
        full = {name: tensor.full_tensor() for name, tensor in model.state_dict().items()}
        fsdp2_load_full_state_dict(accelerator, model, full)
    finally:
        dist.destroy_process_group()
