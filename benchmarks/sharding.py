"""What one rank of many takes to fill its shards of a model of 1.5 billion parameters.

As a module of its own it plays one rank in a fresh process, with a process group that sends
nothing: ``python -m benchmarks.sharding WAY RANK RANKS [tiny]`` prints the seconds, the growth of
the resident memory, and a digest of the shards, as JSON.
"""

from __future__ import annotations

import gc
import hashlib
import json
import sys
import time
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

import lateinit
from benchmarks.contenders import deferred, meta
from benchmarks.harness import MB, Goal, Row, Run, bytes_of, in_process
from benchmarks.memory import forget, highest, resident
from benchmarks.models import gpt2_xl

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch.distributed.device_mesh import DeviceMesh

RANKS = (1, 2, 4, 8)
COMPARED = (2, 8)
OTHERS = {"slice": "materialise, slice", "reset": "to_empty, reset"}
WITHIN = 1.25
WORKING_SET = 64 * MB
SEED = 0


def sharding(run: Run) -> list[Row]:
    """The last rank of 1, 2, 4 and 8, against its share of the whole and against other ways."""
    rows: list[Row] = []
    whole: dict[str, Any] = {}
    for ranks in RANKS[:2] if run.tiny else RANKS:
        ours = played("ours", ranks, run)
        whole = whole or ours
        rows += against_share(ours, whole, ranks)
        if ranks in COMPARED:
            rows += against_others(ours, ranks, run)
    return rows


def against_share(ours: dict[str, Any], whole: dict[str, Any], ranks: int) -> list[Row]:
    """What a rank takes, against its part of what one alone takes."""
    case, goal = f"gpt2_xl, 1 of {ranks}", Goal(WITHIN)
    share, limit = whole["seconds"] / ranks, ours["model"] / ranks * WITHIN + WORKING_SET
    peak, wanted = [ours["peak"] / MB], "1.25 x its share + 64 MB"
    memory = Row(case, "peak memory to fill", peak, wanted, [limit / MB], "MB", Goal(1.0))
    return [Row(case, "fill", [ours["seconds"]], "its share", [share], "s", goal), memory]


def against_others(ours: dict[str, Any], ranks: int, run: Run) -> list[Row]:
    """The other ways; the part that each rank cuts from the whole tells what is right."""
    theirs = {name: played(way, ranks, run) for way, name in OTHERS.items()}
    equal = ours["digest"] == theirs[OTHERS["slice"]]["digest"]
    assert equal, "a shard differs from that part of the whole"
    rows = []
    for name, other in theirs.items():
        case = f"gpt2_xl, 1 of {ranks}"
        note = "" if other["digest"] == ours["digest"] else "its values are others"
        peaks = [ours["peak"] / MB], name, [other["peak"] / MB]
        seconds = [ours["seconds"]], name, [other["seconds"]]
        rows.append(Row(case, "fill", *seconds, equal=equal, note=note))
        rows.append(Row(case, "peak memory to fill", *peaks, "MB"))
    return rows


def played(way: str, ranks: int, run: Run) -> dict[str, Any]:
    size = ["tiny"] if run.tiny else []
    return in_process("benchmarks.sharding", way, str(ranks - 1), str(ranks), *size)


def shard(model: nn.Module, mesh: DeviceMesh) -> None:
    for block in model.transformer.h:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def ours(model: nn.Module, mesh: DeviceMesh) -> None:
    shard(model, mesh)
    lateinit.materialize(model)


def by_slicing(model: nn.Module, mesh: DeviceMesh) -> None:
    """Every rank materialises all of it, and keeps its part."""
    lateinit.materialize(model)
    parts: dict[nn.Parameter, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                if parameter not in parts:
                    part = distribute_tensor(parameter, mesh, [Shard(0)], src_data_rank=None)
                    parts[parameter] = nn.Parameter(part)
                module.register_parameter(name, parts[parameter])


def by_reset(model: nn.Module, mesh: DeviceMesh) -> None:
    """Memory without values, then each module's own initialisation, on the shards."""
    shard(model, mesh)
    model.to_empty(device="cpu")
    torch.manual_seed(SEED)
    with torch.no_grad():
        model.apply(model._init_weights)


WAYS: dict[str, tuple[Callable[..., nn.Module], Callable[..., None]]] = {
    "ours": (deferred, ours),
    "slice": (deferred, by_slicing),
    "reset": (meta, by_reset),
}


def main(way: str, rank: str, ranks: str, size: str = "") -> None:
    torch.set_num_threads(1)  # a rank has its own cores: it is not to be timed on all of these
    dist.init_process_group("fake", rank=int(rank), world_size=int(ranks), store=FakeStore())
    mesh = init_device_mesh("cpu", (int(ranks),))
    build, fill = WAYS[way]
    fill(build(lambda: gpt2_xl(tiny=True)), mesh)  # imports what is imported late
    torch.manual_seed(SEED)
    model = build(lambda: gpt2_xl(tiny=size == "tiny"))
    nbytes = sum(p.numel() * p.element_size() for p in model.parameters())
    gc.collect()
    forget()
    before, started = resident(), time.perf_counter()
    fill(model, mesh)
    seconds = time.perf_counter() - started
    growth = highest() - before
    digest = hashlib.sha256()
    for _, parameter in sorted(model.named_parameters()):
        digest.update(bytes_of(parameter.to_local()))
    found = {"seconds": seconds, "peak": growth, "model": nbytes, "digest": digest.hexdigest()}
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
