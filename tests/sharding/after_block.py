"""What is done to a sharded model after its block: ``python -m ... RANK RANKS STORE FOLDER``.

Each act is done to a model that was sharded while deferred, and to its eager twin. Every rank
prints a line for each that was neither equal nor refused by lateinit, and how many were.
"""

from __future__ import annotations

import argparse
import copy
import logging
import sys
import warnings
from collections import Counter
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate

import lateinit
from lateinit.errors import LateinitError
from tests.sharding.compare import differences
from tests.sharding.placements import fsdp, line, replicated, spread

SIZES = (5, 7)  # no multiples of the ranks, so that shards are uneven
Way = Callable[[nn.Module, DeviceMesh], object]
Act = Callable[[nn.Module, Callable[[], nn.Module], Path], object]


class Tied(nn.Module):
    """Two layers on one weight, and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(SIZES[0], SIZES[1])
        self.down = nn.Linear(SIZES[1], SIZES[0])
        self.again = nn.Linear(SIZES[0], SIZES[1])
        self.again.weight = self.up.weight
        self.register_buffer("places", torch.arange(3.0))


WAYS: dict[str, Way] = {
    "fully_shard": fsdp,
    "rows": lambda model, mesh: spread(model, mesh, 0, dims=(0,)),
    "columns": lambda model, mesh: spread(model, mesh, 0, dims=(1,)),
    "replicated": lambda model, mesh: replicated(model, mesh, 0),
}


def whole(model: nn.Module) -> dict[str, torch.Tensor]:
    state = model.state_dict()
    full = {k: v.full_tensor() if isinstance(v, DTensor) else v for k, v in state.items()}
    return {key: value.detach().clone() for key, value in full.items()}


def set_whole(model: nn.Module, state: dict[str, torch.Tensor], **options: bool) -> None:
    set_model_state_dict(model, state, options=StateDictOptions(full_state_dict=True, **options))


def broadcast(model: nn.Module, other: Callable[[], nn.Module], _: Path) -> None:
    state = whole(other())
    set_whole(model, state if dist.get_rank() == 0 else {}, broadcast_from_rank0=True)


def resume(model: nn.Module, other: Callable[[], nn.Module], folder: Path) -> None:
    dcp.save({"model": other().state_dict()}, checkpoint_id=folder)
    state = get_model_state_dict(model)
    dcp.load({"model": state}, checkpoint_id=folder)
    set_model_state_dict(model, state)


def load_in_place(model: nn.Module, other: Callable[[], nn.Module], folder: Path) -> None:
    dcp.save({"model": other().state_dict()}, checkpoint_id=folder)
    dcp.load({"model": model.state_dict()}, checkpoint_id=folder)


def part(weight: Any) -> torch.Tensor:
    return weight.to_local() if isinstance(weight, DTensor) else weight


@torch.no_grad()
def copy_weight(model: Any, other: Callable[[], Any], _: Path) -> None:
    model.down.weight.copy_(other().down.weight)


@torch.no_grad()
def copy_local(model: Any, other: Callable[[], Any], _: Path) -> None:
    part(model.down.weight).copy_(part(other().down.weight))


@torch.no_grad()
def compute(model: Any, *_: Any) -> None:
    model.down.weight.fill_(3.0)
    model.down.bias.mul_(2).add_(1)


def zero_in_a_block(model: Any, *_: Any) -> None:
    with lateinit.deferred():
        nn.init.zeros_(model.down.weight)


def step(model: nn.Module, other: Callable[[], nn.Module], _: Path) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model.load_state_dict(other().state_dict())
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()


def replace(model: Any, *_: Any) -> None:
    weight = model.down.weight
    if isinstance(weight, DTensor):
        model.down.weight = nn.Parameter(weight.redistribute(placements=[Replicate()]))


# What loads a model whole leaves nothing to materialise.
LOADS: dict[str, Act] = {
    "load_state_dict": lambda m, other, _: m.load_state_dict(other().state_dict()),
    "assign": lambda m, other, _: m.load_state_dict(other().state_dict(), assign=True),
    "set_model_state_dict": lambda m, other, _: set_model_state_dict(m, other().state_dict()),
    "full_state_dict": lambda m, other, _: set_whole(m, whole(other())),
    "broadcast_from_rank0": broadcast,
    "resume from DCP": resume,
    "dcp.load in place": load_in_place,
    "load and step": step,
}
ACTS: dict[str, Act] = LOADS | {
    "copy_": copy_weight,
    "copy_ to the local part": copy_local,
    "arithmetic in place": compute,
    "another block": zero_in_a_block,
    "redistribute": replace,
    "half": lambda m, *_: m.half(),
    "cpu": lambda m, *_: m.cpu().to("cpu"),
    "deepcopy": lambda m, *_: setattr(m, "again", copy.deepcopy(m.get_submodule("down"))),
    "constant_": lambda m, *_: nn.init.constant_(m.get_parameter("down.weight"), 2.0),
    "normal_": lambda m, *_: nn.init.normal_(m.get_parameter("down.weight")),
    "trunc_normal_": lambda m, *_: nn.init.trunc_normal_(m.get_parameter("down.weight")),
    "sparse_": lambda m, *_: nn.init.sparse_(m.get_parameter("down.weight"), 0.5),
    "to_empty": lambda m, *_: m.to_empty(device="cpu"),
    "data": lambda m, other, _: setattr(m.get_parameter("up.bias"), "data", torch.ones(2)),
    "broadcast": lambda m, *_: dist.broadcast(part(m.get_buffer("places")).data, 0),
    "dcp.save": lambda m, _, folder: dcp.save({"m": m.state_dict()}, checkpoint_id=folder),
}
MAY_BE_REFUSED = frozenset(
    {"arithmetic in place", "constant_", "normal_", "trunc_normal_", "sparse_", "to_empty", "data"}
    | {"broadcast", "dcp.save", "redistribute"}
)


def tried(way: Way, act: Act, folder: Path, *, deferred: bool, loads: bool) -> nn.Module:
    mesh = line(dist.get_world_size())

    def other() -> nn.Module:
        torch.manual_seed(7)
        model = Tied()
        way(model, mesh)
        return model

    torch.manual_seed(3)
    model: nn.Module = lateinit.deferred_init(Tied) if deferred else Tied()
    way(model, mesh)
    before = {id(p) for p in model.parameters()}
    act(model, other, folder)
    if deferred and not loads:
        lateinit.materialize(model)
    model.same = before == {id(p) for p in model.parameters()}  # type: ignore[assignment]
    return model


def outcome(way: Way, name: str, folder: Path) -> str:
    act, loads = ACTS[name], name in LOADS
    try:
        expected = tried(way, act, folder, deferred=False, loads=loads)
    except (Exception, CheckpointException):  # noqa: BLE001 - eager fails too
        return "eager fails"
    try:
        found = tried(way, act, folder, deferred=True, loads=loads)
    except (Exception, CheckpointException) as error:  # noqa: BLE001
        ours = isinstance(error, LateinitError) or "DeferredTensorError" in str(error)
        told = ours and name in MAY_BE_REFUSED and "lateinit.materialize" in str(error)
        return "refused" if told else f"{type(error).__name__}: {error}"
    if found.same != expected.same:
        return "other objects"
    return "; ".join(differences(expected, found)) or "equal"


def main(options: argparse.Namespace) -> int:
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", module="torch.distributed.checkpoint")
    logging.disable(logging.ERROR)
    torch.set_num_threads(1)
    store = dist.FileStore(options.store, options.ranks)
    minute = timedelta(seconds=60)
    dist.init_process_group(
        "gloo", store=store, rank=options.rank, world_size=options.ranks, timeout=minute
    )
    counts: Counter[str] = Counter()
    for number, (place, way) in enumerate(WAYS.items()):
        for name in ACTS:
            found = outcome(way, name, Path(options.folder) / f"{number}-{name}")
            counts[found] += 1
            if found not in ("equal", "refused", "eager fails"):
                sys.stdout.write(f"WRONG {place}, {name}: {found[:400]}\n")
    sys.stdout.write(f"{dict(counts)}\n")
    dist.barrier()
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("rank", type=int)
    parser.add_argument("ranks", type=int)
    parser.add_argument("store")
    parser.add_argument("folder")
    sys.exit(main(parser.parse_args()))
