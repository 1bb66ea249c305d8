"""Llama 405B on up to 4,096 ranks: recorded, sharded and planned, against the same on ``meta``.

As a module of its own it plays the last rank in a fresh process, with a process group that sends
nothing: ``python -m benchmarks.clusters [tiny] CASE ...`` prints the seconds of CPU time that each
step takes, and a digest of how the parameters are sharded, as JSON.
"""

from __future__ import annotations

import gc
import hashlib
import itertools
import json
import math
import sys
import time
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.testing._internal.distributed.fake_pg import FakeStore

import lateinit
from benchmarks.contenders import deferred, meta
from benchmarks.harness import Goal, Row, Run, in_process
from benchmarks.models import llama

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import nn
    from torch.distributed.device_mesh import DeviceMesh

STEPS = ("record", "shard", "plan")
LARGEST = 4096
# The axes of each case. All layers are really sharded: at 4,096 ranks on one axis that takes some
# 15 seconds for either way, so the large ones are timed once.
CASES: dict[str, dict[str, int]] = {
    "fsdp 8": {"fsdp": 8},
    "fsdp 512": {"fsdp": 512},
    "fsdp 4096": {"fsdp": 4096},
    "hsdp 8 x 512": {"replicate": 8, "fsdp": 512},
    "fsdp 512 x tp 8": {"fsdp": 512, "tp": 8},
}
OFTEN, LAST = "fsdp 8", "fsdp 512 x tp 8"
TENSOR_PARALLEL = {
    **{f"self_attn.{name}_proj": ColwiseParallel for name in "qkv"},
    "self_attn.o_proj": RowwiseParallel,
    "mlp.gate_proj": ColwiseParallel,
    "mlp.up_proj": ColwiseParallel,
    "mlp.down_proj": RowwiseParallel,
}


def clusters(run: Run) -> list[Row]:
    """Each case, both ways in turn, in one process of its own."""
    cases = [LAST] if run.tiny else list(CASES)
    found = in_process("benchmarks.clusters", *(["tiny"] if run.tiny else []), *cases)
    return [row for name in cases for row in compared(name, **found[name])]


def compared(name: str, ours: list[dict[str, Any]], meta: list[dict[str, Any]]) -> Iterator[Row]:
    """What sharding takes, and all of it."""
    equal = {r["digest"] for r in ours} == {r["digest"] for r in meta}
    assert equal, f"{name}: sharded otherwise than on meta"
    case, axes = f"llama_405b, {name}", CASES[name]
    shards = [r["shard"] for r in ours], "meta", [r["shard"] for r in meta]
    goal = None if "tp" in axes else Goal(1.2)
    yield Row(case, "shard", *shards, "s", goal, equal, "CPU time")
    all_of_it = [r["record"] + r["shard"] + r["plan"] for r in ours]
    theirs = [r["record"] + r["shard"] for r in meta]
    goal = Goal(1.3) if math.prod(axes.values()) == LARGEST else None
    against = "record, shard on meta"
    yield Row(case, "record, shard, plan", all_of_it, against, theirs, "s", goal, equal, "CPU time")


def llama_405b(*, tiny: bool = False) -> nn.Module:
    return llama(16_384, 53_248, 126, 128, kv_heads=8, words=128_256, tiny=tiny)


def shard(model: nn.Module, mesh: DeviceMesh) -> None:
    names = mesh.mesh_dim_names or ()
    data = mesh[tuple(name for name in names if name != "tp")]
    for layer in model.model.layers:
        if "tp" in names:
            plan = {name: style() for name, style in TENSOR_PARALLEL.items()}
            parallelize_module(layer, mesh["tp"], plan)
        fully_shard(layer, mesh=data)
    fully_shard(model, mesh=data)


def played(way: str, axes: dict[str, int], *, tiny: bool) -> dict[str, Any]:
    """What the last rank of a mesh takes."""
    ranks, clock = math.prod(axes.values()), time.process_time
    dist.init_process_group("fake", rank=ranks - 1, world_size=ranks, store=FakeStore())
    mesh = init_device_mesh("cpu", tuple(axes.values()), mesh_dim_names=tuple(axes))
    gc.collect()
    times = [clock()]
    model = {"ours": deferred, "meta": meta}[way](lambda: llama_405b(tiny=tiny))
    times.append(clock())
    shard(model, mesh)
    times.append(clock())
    if way == "ours":
        lateinit.plan(model)
    times.append(clock())
    digest = hashlib.sha256()
    for name, p in model.named_parameters():
        local = p.to_local()
        digest.update(repr((name, p.placements, local.shape, local.stride())).encode())
    dist.destroy_process_group()
    steps = (after - before for before, after in itertools.pairwise(times))
    return {**dict(zip(STEPS, steps, strict=True)), "digest": digest.hexdigest()}


def main(*names: str) -> None:
    torch.set_num_threads(1)
    tiny, found = names[0] == "tiny", {}
    for way in ("ours", "meta"):  # imports what is imported late
        played(way, CASES[LAST], tiny=True)
    for name in names[tiny:]:
        found[name] = {"ours": [], "meta": []}
        for _ in range(3 if name == OFTEN and not tiny else 1):
            for way, results in found[name].items():
                results.append(played(way, CASES[name], tiny=tiny))
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
