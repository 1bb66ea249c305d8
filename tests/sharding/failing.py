"""Ranks that differ in some ways: ``python -m tests.sharding.failing RANK RANKS STORE WAY ...``.

Each rank prints a line for each way.
"""

from __future__ import annotations

import gc
import os
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import Shard, distribute_tensor

import lateinit
from lateinit.errors import ShardingError
from tests.sharding.placements import Block, fsdp, line

CULPRIT = 1
TIMEOUT = timedelta(seconds=15)


def main(rank: int, ranks: int, store: str, ways: list[str]) -> int:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", store=dist.FileStore(store, ranks), rank=rank, world_size=ranks, timeout=TIMEOUT
    )
    for way in ways:
        found = sent(ranks, Path(store)) if way == "sent" else tried(way, rank, ranks)
        sys.stdout.write(f"{way} | {found}\n")
        sys.stdout.flush()
    os._exit(0)  # another rank may be dead


def tried(way: str, rank: int, ranks: int) -> str:
    """What ``materialize`` does if one rank differs in a way."""
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
    if other and way == "samples":
        # Whoever says the same of itself may still compute other bits.
        torch.backends.cpu.get_cpu_capability = lambda: os.environ["SAID"]
    if other and way == "death":
        os._exit(3)
    try:
        lateinit.materialize(model, seed=rank if way == "asked seed" else None)
    except ShardingError as error:
        return f"refused: {error}; deferred still: {lateinit.is_deferred(model)}"
    return f"filled: {[p.full_tensor().sum().item() for p in model.parameters()]}"


def sent(ranks: int, store: Path) -> str:
    """Compute on one host, and send: what ranks with other kernels can do."""
    torch.manual_seed(0)
    model, path = lateinit.deferred_init(Block), store.with_suffix(".safetensors")
    if dist.get_rank() == 0:
        lateinit.save_checkpoint(model, path)
    dist.barrier()
    fsdp(model, line(ranks))
    lateinit.load_checkpoint(model, path)
    return f"loaded: {[p.full_tensor().sum().item() for p in model.parameters()]}"


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4:]))
