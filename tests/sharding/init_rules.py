"""Rules on shards: ``python -m tests.sharding.init_rules RANK RANKS STORE FOLDER``."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

import lateinit
from lateinit.errors import ShardingError
from tests.sharding.together import Run, play

if TYPE_CHECKING:
    from collections.abc import Callable


def doubled(tensor: Tensor) -> None:
    tensor.mul_(2)


RULES: dict[str, Any] = {
    "0.weight": lateinit.init.trunc_normal(std=0.02),
    "*.bias": "normal",
    "1.weight": nn.init.orthogonal_,
    "2.weight": doubled,
    "3.weight": "uniform",
}


def build() -> nn.Module:
    parts = nn.Linear(300, 1001), nn.Linear(1001, 3, bias=False), nn.Linear(3, 1), nn.LayerNorm(7)
    return nn.Sequential(*parts)


def late(cast: bool = False) -> nn.Module:
    torch.manual_seed(1)
    model = lateinit.deferred_init(build)
    return model.bfloat16() if cast else model


def fsdp(model: nn.Module) -> None:
    fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))


def each(model: nn.Module) -> None:
    for layer in model.children():
        fsdp(layer)


def tensor_parallel(model: nn.Module) -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    parallelize_module(model, mesh, {"0": ColwiseParallel(), "1": RowwiseParallel()})


def compared(shard: Callable[[nn.Module], None], cast: bool = False) -> Callable[[Run], str]:
    def case(_: Run) -> str:
        rules = {k: v for k, v in RULES.items() if not (cast and k == "1.weight")}
        whole = lateinit.materialize(late(cast), init=rules)
        model = late(cast)
        shard(model)
        lateinit.materialize(model, init=rules)
        for (name, found), expected in zip(
            model.named_parameters(), whole.parameters(), strict=True
        ):
            value = expected.detach()
            if isinstance(found, DTensor):
                placed = found.device_mesh, found.placements
                value = distribute_tensor(value, *placed, src_data_rank=None).to_local()
                found = found.to_local()  # noqa: PLW2901 - what is compared
            if not torch.equal(value, found.detach()):
                return f"WRONG {name}"
        return "equal"

    return case


def cast_after(_: Run) -> str:
    model = late()
    fsdp(model)
    model.bfloat16()
    try:
        lateinit.materialize(model, init=RULES)
    except ShardingError as error:
        return "refused" if "was cast" in str(error) else f"WRONG {error}"
    return "WRONG"


def other_rules(run: Run) -> str:
    model = late()
    fsdp(model)
    try:
        lateinit.materialize(model, init={"0.weight": "ones" if run.rank else "zeros"})
    except ShardingError as error:
        return "refused" if "different constructions" in str(error) else f"WRONG {error}"
    return "WRONG"


CASES = {
    "fsdp": compared(fsdp),
    "each": compared(each),
    "tp": compared(tensor_parallel),
    "cast": compared(fsdp, cast=True),
    "cast after": cast_after,
    "other rules": other_rules,
}


if __name__ == "__main__":
    sys.exit(play(CASES))
