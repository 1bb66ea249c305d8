"""Which part of a tensor a rank holds, for every placement, loaded from every format."""

from __future__ import annotations

import itertools
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import (
    DTensor,
    Partial,
    Placement,
    Replicate,
    Shard,
    distribute_tensor,
)
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.distributed.tensor.placement_types import _MaskPartial, _StridedShard

import lateinit
from lateinit._distributed import parts_of
from lateinit._distributed.placement import _ranges
from lateinit.errors import ShardingError
from tests.sharding.alone import alone_as

if TYPE_CHECKING:
    from collections.abc import Iterator

SHAPES = ((12, 10, 8), (7, 5, 3), (1, 13, 2), (3, 0, 2), (2, 300, 1))
STRIDED = partial(_StridedShard, split_factor=2)
ONE_AXIS: list[tuple[Placement, ...]] = [
    *((Shard(dim),) for dim in range(3)),
    *((STRIDED(dim),) for dim in range(3)),
    (_StridedShard(1, split_factor=4),),
    (_StridedShard(1, split_factor=7),),
    (Replicate(),),
]
CHOICES = (Shard(0), Shard(1), STRIDED(0), STRIDED(1), Replicate())
TWO_AXES: list[tuple[Placement, ...]] = list(itertools.product(CHOICES, repeat=2))
THREE_AXES: list[tuple[Placement, ...]] = [
    (Shard(0), Shard(0), Shard(0)),
    (STRIDED(0), Shard(1), Shard(0)),
    (Shard(1), STRIDED(1), STRIDED(1)),
    (STRIDED(1), STRIDED(0), STRIDED(1)),
    (Replicate(), STRIDED(2), Shard(2)),
]
MESHES = {1: ((3,), (8,)), 2: ((2, 2), (3, 2)), 3: ((2, 2, 2),)}


def ways(*groups: list[tuple[Placement, ...]]) -> Iterator[tuple[tuple[Placement, ...], Any]]:
    for placements in itertools.chain(*groups):
        yield from ((placements, mesh) for mesh in MESHES[len(placements)])


WAYS = list(ways(ONE_AXIS, TWO_AXES, THREE_AXES))


def on_each_rank(mesh: tuple[int, ...]) -> Iterator[Any]:
    ranks = torch.Size(mesh).numel()
    for rank in range(ranks):
        # torch caches what it knows of equal meshes, and takes no notice of the rank.
        names = tuple(f"axis {axis} of rank {rank}" for axis in range(len(mesh)))
        with alone_as(rank, ranks):
            yield init_device_mesh("cpu", mesh, mesh_dim_names=names)


@pytest.mark.parametrize(("placements", "mesh"), WAYS, ids=str)
def test_the_parts_of_a_shard_are_what_it_was_given(
    placements: tuple[Placement, ...], mesh: tuple[int, ...]
) -> None:
    for shape in SHAPES:
        full = torch.arange(torch.Size(shape).numel()).view(shape)
        covered = torch.zeros(shape, dtype=torch.bool)
        for axes in on_each_rank(mesh):
            shard = distribute_tensor(full, axes, placements, src_data_rank=None)
            found = torch.full_like(shard.to_local(), -1)
            for local, whole in parts_of(shard, "weight"):
                into, place = (
                    tuple(slice(s, s + n) for s, n in zip(*box, strict=True))
                    for box in (local, whole)
                )
                found[into] = full[place]
                covered[place] = True
            assert torch.equal(found, shard.to_local())
        assert covered.all()


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(12, 10, 3))
        self.bias = nn.Parameter(torch.rand(7, 5, 2))
        self.after = nn.Parameter(torch.rand(3))


def shard_all(model: Layer, mesh: Any, placements: tuple[Placement, ...]) -> Layer:
    for name in ("weight", "bias"):
        shard = distribute_tensor(getattr(model, name), mesh, placements, src_data_rank=None)
        setattr(model, name, nn.Parameter(shard))
    return model


def saved(model: nn.Module, path: Path) -> Path:
    if path.suffix == ".pt":
        torch.save(model.state_dict(), path)
    elif path.suffix == ".safetensors":
        lateinit.save_checkpoint(model, path)
    else:
        dcp.save(model.state_dict(), checkpoint_id=path, no_dist=True)
    return path


def local(model: Layer) -> list[torch.Tensor]:
    return [p.to_local() if isinstance(p, DTensor) else p for p in model.parameters()]


def assert_equal(found: Layer, expected: Layer) -> None:
    for ours, theirs in zip(local(found), local(expected), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("file", ["folder", "model.pt", "model.safetensors"])
@pytest.mark.parametrize(
    "placements", [*ONE_AXIS, (STRIDED(0), Shard(0)), (STRIDED(1), STRIDED(0))], ids=str
)
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_shards_are_loaded_as_they_lie(
    file: str, placements: tuple[Placement, ...], tmp_path: Path
) -> None:
    torch.manual_seed(1)
    source = Layer()
    path = saved(source, tmp_path / file)
    for mesh in on_each_rank(MESHES[len(placements)][0]):
        torch.manual_seed(1)
        expected = shard_all(Layer(), mesh, placements)
        for model in (Layer(), lateinit.deferred_init(Layer)):
            found = shard_all(model, mesh, placements)
            lateinit.load_checkpoint(found, path)
            assert_equal(found, expected)


@pytest.mark.parametrize(("placements", "mesh"), WAYS[::3], ids=str)
def test_shards_are_materialised_as_they_lie(
    placements: tuple[Placement, ...], mesh: tuple[int, ...]
) -> None:
    for axes in on_each_rank(mesh):
        torch.manual_seed(1)
        expected = shard_all(Layer(), axes, placements)
        torch.manual_seed(1)
        found = shard_all(lateinit.deferred_init(Layer), axes, placements)
        assert_equal(lateinit.materialize(found, check=False), expected)


def fused(model: nn.Module, mesh: Any) -> None:
    """What makes a ``_StridedShard`` without being asked: FSDP2 over tensor parallelism."""
    plan = {"0": ColwiseParallel(), "1": RowwiseParallel()}
    dp, tp = mesh.mesh_dim_names
    parallelize_module(model, mesh[tp], plan)
    fully_shard(model, mesh=mesh[dp])


@pytest.mark.parametrize("ranks", [4, 6])
def test_fsdp_over_tensor_parallelism_is_loaded_as_it_is_materialised(
    ranks: int, tmp_path: Path
) -> None:
    def build() -> nn.Module:
        return nn.Sequential(nn.Linear(10, 12), nn.Linear(12, 10))

    torch.manual_seed(2)
    path = saved(build(), tmp_path / "model.safetensors")
    for rank in range(ranks):
        with alone_as(rank, ranks):
            names = f"dp of {rank}", f"tp of {rank}"
            mesh = init_device_mesh("cpu", (ranks // 2, 2), mesh_dim_names=names)
            models = []
            for seed in (2, 3):
                torch.manual_seed(seed)
                models.append(lateinit.deferred_init(build))
                fused(models[-1], mesh)
            lateinit.materialize(models[0], check=False)
            lateinit.load_checkpoint(models[1], path)
            assert any(isinstance(p, _StridedShard) for p in models[0][0].weight.placements)
            for ours, theirs in zip(*(local(m) for m in models), strict=True):
                assert torch.equal(ours, theirs)


def test_an_order_of_axes_is_followed() -> None:
    full = torch.arange(8)
    for rank in range(4):
        with alone_as(rank, 4):
            mesh = init_device_mesh("cpu", (2, 2))
            shard = distribute_tensor(full, mesh, [Shard(0), Shard(0)], src_data_rank=None)
            if not hasattr(shard._spec, "shard_order"):
                pytest.skip("before torch 2.10")
            (entry,) = shard._spec.shard_order
            shard._spec.shard_order = (entry._replace(mesh_dims=(1, 0)),)
            ((_, (start, _)),) = parts_of(shard, "weight")
            assert start == (4 * (rank % 2) + 2 * (rank // 2),)


def test_a_rank_outside_of_a_mesh_has_no_part() -> None:
    with alone_as(3, 4):
        mesh = DeviceMesh("cpu", [0, 1])
        shard = distribute_tensor(torch.arange(8), mesh, [Shard(0)], src_data_rank=None)
        assert parts_of(shard, "weight") == []


def summed(tensor: torch.Tensor, mesh: Any) -> DTensor:
    return DTensor.from_local(tensor, mesh, [Partial()], run_check=False)


def cut_by_hand(tensor: torch.Tensor, mesh: Any) -> DTensor:
    size, stride = tensor.shape, tensor.stride()
    return DTensor.from_local(tensor[:5], mesh, [Shard(0)], shape=size, stride=stride)


NO_PART = {
    "by hand": (cut_by_hand, r"weight: the local part .* is \(6, 10, 3\) on this rank, .* is \(5"),
    "summed": (summed, "weight: a Partial placement holds terms of a sum"),
}


@pytest.mark.parametrize("way", NO_PART)
def test_what_is_no_part_is_refused_before_anything_is_loaded(way: str, tmp_path: Path) -> None:
    distribute, message = NO_PART[way]
    path = saved(Layer(), tmp_path / "model.safetensors")
    with alone_as(0, 2):
        layer, mesh = Layer(), init_device_mesh("cpu", (2,))
        layer.weight = nn.Parameter(distribute(layer.weight.detach(), mesh))
        before = [tensor.clone() for tensor in local(layer)]
        with pytest.raises(ShardingError, match=message):
            lateinit.load_checkpoint(layer, path)
        assert all(map(torch.equal, local(layer), before))


def test_placements_of_which_nothing_is_known_are_refused() -> None:
    masked = _MaskPartial(offset_shape=None)
    with alone_as(0, 2):
        mesh = init_device_mesh("cpu", (2,))
        shard = distribute_tensor(torch.arange(8), mesh, [Shard(0)], src_data_rank=None)
        for placement, message in ((Placement(), "is not known which"), (masked, "terms of a sum")):
            shard._spec.placements = (placement,)
            with pytest.raises(ShardingError, match=f"weight: .*{message}"):
                parts_of(shard, "weight")


def test_neighbouring_indices_are_one_range() -> None:
    assert list(_ranges([3, 4, 5, 9, 1, 2])) == [(0, 3, 3), (3, 9, 1), (4, 1, 2)]
    assert list(_ranges(range(2, 2))) == list(_ranges([])) == []
    assert list(_ranges(range(2, 7))) == [(0, 2, 5)]
