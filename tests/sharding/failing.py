"""Ranks that go wrong in one way: ``python -m tests.sharding.failing RANK RANKS STORE WAY``."""

from __future__ import annotations

import gc
import os
import sys
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import Shard, distribute_tensor

import lateinit
from lateinit.errors import ShardingError
from tests.sharding.placements import Block, fsdp, line

CULPRIT = 1
TIMEOUT = timedelta(seconds=15)


def main(rank: int, ranks: int, store: str, way: str) -> int:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", store=dist.FileStore(store, ranks), rank=rank, world_size=ranks, timeout=TIMEOUT
    )
    other = rank == CULPRIT
    torch.manual_seed(1 if other and way == "seed" else 0)
    with lateinit.deferred():
        rest = [nn.Linear(3, 3) for _ in range(40)]
        model = Block(width=48 if other and way == "model" else 64)
        model.head = nn.Linear(3, 1)  # on most ranks the shard of its bias is empty
        if other and way == "op":
            nn.init.zeros_(model.up.bias)
    if other and way == "dropped":
        rest.clear()
        gc.collect()
    mesh = line(ranks)
    if way == "placement":
        weight = distribute_tensor(model.up.weight, mesh, [Shard(1 if other else 0)])
        model.up.weight = nn.Parameter(weight)
    else:
        fsdp(model, mesh)
    if other and way == "death":
        os._exit(3)
    try:
        lateinit.materialize(model, seed=rank if way == "asked seed" else None)
    except ShardingError as error:
        sys.stdout.write(f"refused: {error}; deferred still: {lateinit.is_deferred(model)}\n")
        sys.stdout.flush()
        os._exit(0)
    filled = [p.full_tensor().sum().item() for p in model.parameters()]
    sys.stdout.write(f"filled: {filled}\n")
    return 1


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]))
