"""Ranks that save the shards of a model: ``python -m ... RANK RANKS STORE FOLDER``.

Every rank prints a line for each case: the errors that it saw, and what it found at the end.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

import lateinit
from lateinit._checkpoint.save import sharded
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
    assert [p.suffix for p in sorted((run.folder / "hub").iterdir())].count(".safetensors") > 1
    return end


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


def a_rank_that_cannot_write(run: Run) -> str:
    """The earlier checkpoint is as it was, and the call can be repeated."""
    model, local = sharded_block(), sharded.ShardedSave._local

    def failing(saving: Any, name: str) -> torch.Tensor:
        if run.other:
            raise OSError(28, "no room")
        return local(saving, name)

    with mock.patch.object(sharded.ShardedSave, "_local", failing):
        run.call(lateinit.save_checkpoint, model, run.folder / "real", force=True)
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
        a_rank_that_cannot_write,
        another_seed_on_one_rank,
        in_safetensors,
        in_the_background,
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
