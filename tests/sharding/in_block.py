"""One rank that shards inside the block: ``python -m tests.sharding.in_block RANK RANKS STORE``.

Prints a line for each model that is not what sharding the eager twin gives.
"""

from __future__ import annotations

import copy
import logging
import sys
import warnings
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_module, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

import lateinit
from lateinit.errors import LateinitError
from tests.sharding.compare import differences

if TYPE_CHECKING:
    from collections.abc import Callable

    Act = Callable[[nn.Module], object]

SEED = 3


class Net(nn.Module):
    """Uneven sizes, a tie, an orthogonal matrix, a convolution, a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(30, 14)
        self.down = nn.Linear(14, 7)
        self.cut = nn.Conv2d(3, 5, 3)
        self.tied = nn.Linear(30, 14, bias=False)
        self.tied.weight = self.up.weight
        self.register_buffer("table", torch.arange(6.0) / 7, persistent=False)
        nn.init.orthogonal_(self.down.weight)


def fsdp(model: nn.Module, mesh: DeviceMesh) -> None:
    fully_shard(model.cut, mesh=mesh["shard"])
    fully_shard(model, mesh=mesh["shard"])


def hsdp(model: nn.Module, mesh: DeviceMesh) -> None:
    fully_shard(model, mesh=mesh)


def tensor_parallel(model: nn.Module, mesh: DeviceMesh) -> None:
    plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
    parallelize_module(model, mesh["shard"], plan)
    model.tied.weight = model.up.weight


def both(model: nn.Module, mesh: DeviceMesh) -> None:
    tensor_parallel(model, mesh)
    fully_shard(model, mesh=mesh["copies"])


def replicated(model: nn.Module, mesh: DeviceMesh) -> None:
    distribute_module(model, mesh)


def distributed(dims: tuple[int | None, int | None], source: int | None) -> Any:
    def way(model: nn.Module, mesh: DeviceMesh) -> None:
        for module in list(model.modules()):
            for name, p in list(module.named_parameters(recurse=False)):
                places = [Replicate() if d is None or d >= p.dim() else Shard(d) for d in dims]
                part = distribute_tensor(p, mesh, places, src_data_rank=source)
                module.register_parameter(name, nn.Parameter(part))

    return way


WAYS: dict[str, Callable[[nn.Module, DeviceMesh], None]] = {
    "fully_shard": fsdp,
    "fully_shard on two axes": hsdp,
    "parallelize_module": tensor_parallel,
    "both": both,
    "distribute_module": replicated,
    "rows": distributed((None, 0), 0),
    "columns, from each rank's own": distributed((None, 1), None),
    "rows and columns": distributed((0, -1), 0),
    "rows twice": distributed((0, 0), None),
}


def zero(model: nn.Module) -> None:
    nn.init.zeros_(model.up.bias)


def double(model: nn.Module) -> None:
    with torch.no_grad():
        model.up.weight.mul_(2)


def freeze(model: nn.Module) -> None:
    model.requires_grad_(False)


def optimize(model: nn.Module) -> None:
    model.optimizer = torch.optim.AdamW(model.parameters())


def copied(model: nn.Module) -> None:
    model.other = copy.deepcopy(model.down.weight)


def draw_on(model: nn.Module) -> None:
    model.late = nn.Linear(5, 3)


def told_devices(model: nn.Module) -> None:
    assert {str(p.device) for p in model.parameters()} == {"cpu"}
    assert not any(p.is_meta for p in model.parameters())


ACTS = (zero, double, freeze, optimize, copied, draw_on, told_devices)


def draw_into(model: nn.Module) -> None:
    nn.init.normal_(model.up.weight)


def cut_by_hand(model: nn.Module) -> None:
    size = 7 * (1 + dist.get_rank())
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    model.up.weight = nn.Parameter(DTensor.from_local(model.up.weight[:size].clone(), mesh))


REFUSED = {
    draw_into: r"is sharded, inside `with lateinit.deferred\(\):`; do this before it is sharded",
    cut_by_hand: r"up.weight: sharded inside `with lateinit.deferred\(\):`.*Shard the model after",
}


def main(rank: str, ranks: str, path: str) -> int:
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    store = dist.FileStore(path, int(ranks))
    dist.init_process_group("gloo", store=store, rank=int(rank), world_size=int(ranks))
    mesh = init_device_mesh("cpu", (int(ranks) // 2, 2), mesh_dim_names=("copies", "shard"))
    checks = [(name, way, None) for name, way in WAYS.items()]
    checks += [(name, WAYS[name], act) for name in ("fully_shard", "rows") for act in ACTS]
    wrong = 0
    for name, way, act in checks:
        try:
            found = check(way, mesh, act)
        except Exception as error:  # noqa: BLE001 - the others are to be seen too
            found = [f"{type(error).__name__}: {error}"]
        wrong += len(found)
        for text in found:
            say(f"WRONG {name}, {act}: {text[:400]}")
    for act in REFUSED:
        say(f"{act.__name__}: {refusal(act, mesh)}")
    say(f"{len(checks)} checks, {wrong} wrong")
    dist.barrier()
    dist.destroy_process_group()
    return 1 if wrong else 0


def check(way: Callable[..., None], mesh: DeviceMesh, act: Act | None) -> list[str]:
    """How a model that was sharded in the block differs from its sharded eager twin."""

    def build() -> nn.Module:
        model = Net()
        way(model, mesh)
        if act is not None:
            act(model)
        return model

    torch.manual_seed(SEED)
    expected = build()
    state = torch.get_rng_state()
    torch.manual_seed(SEED)
    with lateinit.deferred():
        found = build()
    wrong = [] if torch.equal(state, torch.get_rng_state()) else ["another random state"]
    lateinit.materialize(found)
    return wrong + differences(expected, found)


def refusal(act: Act, mesh: DeviceMesh) -> str:
    try:
        with lateinit.deferred():
            model = Net()
            if act is draw_into:
                fsdp(model, mesh)
            act(model)
        lateinit.materialize(model)
    except LateinitError as error:
        return str(error)
    return "not refused"


def say(text: str) -> None:
    sys.stdout.write(f"{text}\n")


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
