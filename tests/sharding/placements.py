"""The ways to shard a model: each a function of a model and a mesh.

``source`` is what ``distribute_tensor`` calls ``src_data_rank``: None has each rank cut its part
from its own copy, which is what a real model needs where there is only one process.
"""

from __future__ import annotations

from collections import Counter
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_module, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    Place = Callable[..., None]

EVEN = 2


def line(ranks: int) -> DeviceMesh:
    return init_device_mesh("cpu", (ranks,), mesh_dim_names=("dp",))


def grid(ranks: int) -> DeviceMesh:
    return init_device_mesh("cpu", (ranks // EVEN, EVEN), mesh_dim_names=("dp", "tp"))


def fsdp(model: nn.Module, mesh: DeviceMesh, _: int | None = 0, **options: Any) -> None:
    """Each child as a unit, if all its parameters are its own, and what is left as another."""
    children = list(units(model))
    owners = Counter(id(p) for child in children for p in set(child.parameters()))
    for child in children:
        parameters = list(child.parameters())
        if parameters and all(owners[id(p)] == 1 for p in parameters):
            fully_shard(child, mesh=mesh, **options)
    fully_shard(model, mesh=mesh, **options)


def units(model: nn.Module) -> Iterator[nn.Module]:
    """The children of a model; those of a container, which cannot be called, one by one."""
    for child in model.children():
        if isinstance(child, (nn.ModuleList, nn.ModuleDict)):
            yield from units(child)
        else:
            yield child


def spread(model: nn.Module, mesh: DeviceMesh, source: int | None, *, dims: Any) -> None:
    """Distribute every parameter along some of its dims; None replicates it."""
    done: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                if id(parameter) not in done:
                    placements = [placement(dim, parameter) for dim in dims]
                    shards = distribute_tensor(parameter, mesh, placements, src_data_rank=source)
                    done[id(parameter)] = nn.Parameter(shards, parameter.requires_grad)
                module.register_parameter(name, done[id(parameter)])


def placement(dim: int | None, parameter: torch.Tensor) -> Any:
    if dim is None or parameter.dim() == 0:
        return Replicate()
    return Shard(min(dim, parameter.dim() - 1))


def replicated(model: nn.Module, mesh: DeviceMesh, _: int | None) -> None:
    distribute_module(model, mesh)


PLACEMENTS: dict[str, Place] = {
    "fsdp": fsdp,
    "fsdp kept gathered": partial(fsdp, reshard_after_forward=False),
    "fsdp in bfloat16": partial(fsdp, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16)),
    "fsdp offloaded": partial(fsdp, offload_policy=CPUOffloadPolicy(pin_memory=False)),
    "rows": partial(spread, dims=[0]),
    "columns": partial(spread, dims=[1]),
    "last of three": partial(spread, dims=[2]),
    "replicated": replicated,
}
ON_A_GRID: dict[str, Place] = {
    "hsdp": fsdp,
    "rows of rows": partial(spread, dims=[0, 0]),
    "columns and rows": partial(spread, dims=[1, 0]),
    "rows and copies": partial(spread, dims=[0, None]),
}


class Block(nn.Module):
    """What tensor parallelism is for: an embedding, a norm, two layers, and a tied head."""

    def __init__(self, width: int = 64, vocabulary: int = 101) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)
        self.register_buffer("scale", torch.rand(width), persistent=False)
        nn.init.normal_(self.up.weight, std=0.02)
        nn.init.trunc_normal_(self.down.weight, std=0.02)
        nn.init.orthogonal_(self.down.weight)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.embed(tokens))
        return self.down(torch.relu(self.up(x))) * self.scale


def tensor_parallel(model: nn.Module, mesh: DeviceMesh) -> None:
    """Column-wise, row-wise and sequence parallel."""
    plan = {
        "embed": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1)),
        "norm": SequenceParallel(),
        "up": ColwiseParallel(input_layouts=Shard(1)),
        "down": RowwiseParallel(),
    }
    parallelize_module(model, mesh, plan)


def on_both_axes(model: nn.Module, mesh: DeviceMesh) -> None:
    tensor_parallel(model, mesh["tp"])
    for layer in model.children():
        fully_shard(layer, mesh=mesh["dp"])
    fully_shard(model, mesh=mesh["dp"])
