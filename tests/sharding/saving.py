"""Ranks that save the shards of a model: ``python -m ... RANK RANKS STORE FOLDER``.

Every rank prints a line for each case: the errors that it saw, and what it found at the end.
"""

from __future__ import annotations

import contextlib
import resource
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.placement_types import _StridedShard

import lateinit
from tests.sharding.placements import Block, fsdp, line, on_both_axes, spread
from tests.sharding.resuming import deferred_block, expected_block, same, whole
from tests.sharding.together import Run, play


def sharded_block(place: Any = fsdp, mesh: Any = None, **options: Any) -> nn.Module:
    torch.manual_seed(3)
    model = lateinit.deferred_init(Block)
    place(model, mesh or line(dist.get_world_size()), **options)
    return model


def back(path: Path) -> str:
    """Whether a checkpoint holds the values of the eager twin, as a whole and in shards."""
    model = deferred_block()
    lateinit.load_checkpoint(model, path)
    shards = deferred_block()
    spread(shards, line(dist.get_world_size()), None, dims=(1,))
    lateinit.load_checkpoint(shards, path)
    expected = expected_block().state_dict()
    ends = {same(model.state_dict(), expected), same(whole(shards), expected)}
    return "right" if ends == {"right"} else "wrong"


def saved(run: Run, model: nn.Module, name: str, **options: Any) -> str:
    path = run.folder / name
    run.call(lateinit.save_checkpoint, model, path, **options)
    assert sorted(run.folder.glob(f".{name}*")) == []
    return back(path)


def deferred_rows(run: Run) -> str:
    model = sharded_block()
    end = saved(run, model, "rows")
    assert all(map(lateinit.is_deferred, model.parameters()))
    return end


def deferred_columns_in_half(run: Run) -> str:
    model = sharded_block(spread, source=None, dims=(1,))
    path = run.folder / "columns"
    report = lateinit.save_checkpoint(model, path, dtype=torch.bfloat16)
    assert sorted(path.name for path in path.iterdir()) == list(report.files)
    found = deferred_block()
    lateinit.load_checkpoint(found, path)
    expected = {n: t.bfloat16().float() for n, t in expected_block().state_dict().items()}
    return same(found.state_dict(), expected)


def real_shards_by_torch_too(run: Run) -> str:
    model = lateinit.materialize(sharded_block())
    end = saved(run, model, "real")
    state = {n: torch.zeros(t.shape) for n, t in expected_block().state_dict().items()}
    dcp.load(state, checkpoint_id=run.folder / "real")
    return f"{end}" if same(state, expected_block().state_dict()) == "right" else "wrong"


def in_safetensors(run: Run) -> str:
    model = sharded_block()
    end = saved(run, model, "hub", format="safetensors", max_shard_size="60kB")
    files = [path.name for path in sorted((run.folder / "hub").iterdir())]
    assert files.count("model.safetensors.index.json") == 1
    assert len(files) > 2
    return end


def columns_in_safetensors(run: Run) -> str:
    model = sharded_block(spread, source=None, dims=(1,))
    return saved(run, model, "columns of the hub", format="safetensors")


class Odd(nn.Module):
    """Tensors without dims and elements, of integers and truth values, tied, and of many dims."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.rand(()))
        self.none = nn.Parameter(torch.empty(0, 3))
        self.cube = nn.Parameter(torch.rand(5, 3, 7, 2))
        self.low = nn.Parameter(torch.rand(3, 9, dtype=torch.bfloat16))
        self.same = self.low
        self.count = nn.Buffer(torch.tensor(7))
        self.mask = nn.Buffer(torch.rand(4) > 0.5)


def odd_tensors(run: Run) -> str:
    mesh, ends = line(dist.get_world_size()), set()
    torch.manual_seed(3)
    expected = Odd().state_dict()
    for dim in (0, 1, 2, None):
        for form in ("dcp", "safetensors"):
            torch.manual_seed(3)
            model = lateinit.deferred_init(Odd)
            spread(model, mesh, 0, dims=(dim,))
            run.call(lateinit.save_checkpoint, model, run.folder / "odd", format=form, force=True)
            found = lateinit.deferred_init(Odd)
            lateinit.load_checkpoint(found, run.folder / "odd")
            ends.add(same(found.state_dict(), expected))
            dist.barrier()
    return "right" if ends == {"right"} else "wrong"


def several_blocks_in_safetensors(run: Run) -> str:
    """A rank holds two boxes of the parameter, which lie apart."""
    mesh = line(dist.get_world_size())
    model = lateinit.deferred_init(nn.Linear, 3, 16, bias=False)
    lateinit.materialize(model)
    full = torch.arange(48.0).view(16, 3)
    halves = full.view(2, 2, 4, 3)[:, run.rank].reshape(8, 3)
    placed = DTensor.from_local(halves, mesh, [_StridedShard(0, split_factor=2)])
    model.weight = nn.Parameter(placed)
    run.call(lateinit.save_checkpoint, model, run.folder / "apart", format="safetensors")
    found = lateinit.deferred_init(nn.Linear, 3, 16, bias=False)
    lateinit.load_checkpoint(found, run.folder / "apart")
    return same(found.state_dict(), {"weight": full})


def in_the_background(run: Run) -> str:
    """What is written is what the model was when the call returned."""
    model = lateinit.materialize(sharded_block())
    saving = lateinit.save_checkpoint(model, run.folder / "later", wait=False)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert saving.result(60).files == saving.result().files != ()
    dist.barrier()
    return back(run.folder / "later")


def over_an_earlier_one(run: Run) -> str:
    model = lateinit.materialize(sharded_block())
    run.call(lateinit.save_checkpoint, model, run.folder / "rows")
    with torch.no_grad():
        model.up.bias.zero_()
    run.call(lateinit.save_checkpoint, model, run.folder / "rows", force=True)
    found = deferred_block()
    lateinit.load_checkpoint(found, run.folder / "rows")
    return "wrong" if found.up.bias.any() else "right"


@contextlib.contextmanager
def files_of(nbytes: int) -> Iterator[None]:
    """A disk on which files have at most so many bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def a_full_disk(run: Run) -> str:
    """The earlier checkpoint is as it was, and the call can be repeated."""
    model = sharded_block()
    for options in ({}, {"format": "safetensors"}):
        with files_of(5000) if run.other else contextlib.nullcontext():
            run.call(lateinit.save_checkpoint, model, run.folder / "real", force=True, **options)
        assert back(run.folder / "real") == "right"
    later = lateinit.save_checkpoint(model, run.folder / "real", force=True, wait=False)
    with files_of(5000) if run.other else contextlib.nullcontext():
        run.call(later.result)
    dist.barrier()
    assert back(run.folder / "real") == "right"
    return saved(run, model, "real", force=True)


def another_seed_on_one_rank(run: Run) -> str:
    model = sharded_block()
    options = {"seed": 9} if run.other else {}
    run.call(lateinit.save_checkpoint, model, run.folder / "never", **options)
    assert not (run.folder / "never").exists()
    return "right"


def one_file(run: Run) -> str:
    run.call(lateinit.save_checkpoint, sharded_block(), run.folder / "one.safetensors")
    return "right"


CASES = {
    function.__name__: function
    for function in (
        deferred_columns_in_half,
        deferred_rows,
        real_shards_by_torch_too,
        a_full_disk,
        another_seed_on_one_rank,
        in_safetensors,
        in_the_background,
        columns_in_safetensors,
        several_blocks_in_safetensors,
        odd_tensors,
        one_file,
        over_an_earlier_one,
    )
}


def two_axes(run: Run) -> str:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    model = sharded_block(on_both_axes, mesh)
    assert any(len(p.placements) == 2 for p in model.parameters() if isinstance(p, DTensor))
    return saved(run, model, "grid")


ON_FOUR = {"two_axes": two_axes}


if __name__ == "__main__":
    sys.exit(play(ON_FOUR if int(sys.argv[2]) == 4 else CASES))
