"""Maps of dtypes for shards that a load hook replaces, as ``fully_shard``'s does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

import lateinit
from tests.sharding.alone import alone_as
from tests.sharding.placements import line

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch without torch.distributed")


@pytest.mark.parametrize("lacking", ["", "0.weight", "0.bias", "1.weight", "1.bias"])
def test_a_loaded_shard_has_the_dtype_of_its_own_name(lacking: str, tmp_path: Path) -> None:
    asked = {"": torch.bfloat16, "0.weight": torch.float64, "1.bias": torch.float32}

    def build() -> nn.Module:
        torch.manual_seed(3)
        return nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3))

    state = {name: value + 1 for name, value in build().state_dict().items() if name != lacking}
    lateinit.save_checkpoint(state, tmp_path / "part.safetensors")
    model = lateinit.deferred_init(build)
    with alone_as(0, 3):
        for layer in model:
            fully_shard(layer, mesh=line(3))
        lateinit.load_checkpoint(model, tmp_path / "part.safetensors", strict=False, dtype=asked)
        expected = build().state_dict() | state
        for name, shard in model.named_parameters():
            local = shard.to_local()
            assert local.dtype is asked.get(name, torch.bfloat16)
            assert torch.equal(local, expected[name][: len(local)].to(local.dtype)), name
