"""Ranks that load what one of them reads: ``python -m ... RANK RANKS STORE FOLDER``.

Every rank prints a line for each case: the errors that it saw, and what it found at the end.
"""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_optimizer_state_dict
from torch.distributed.tensor import DTensor

import lateinit
from lateinit._checkpoint.load import sending
from tests.sharding.placements import Block, fsdp, line, spread
from tests.sharding.together import SEED, Run, play

SOURCE = 1
# Where files are that no rank but the source may look at.
HIDDEN = "hidden"


class Counting(nn.Linear):
    """Has an extra state, and a hook that computes with a value."""

    epoch: Any = 0

    def __init__(self) -> None:
        super().__init__(6, 5)
        self.register_load_state_dict_pre_hook(self._double)

    def get_extra_state(self) -> Any:
        return {"epoch": self.epoch}

    def set_extra_state(self, state: Any) -> None:
        self.epoch = state["epoch"]

    @staticmethod
    def _double(_: Any, state: Any, prefix: str, *rest: Any) -> None:
        state[f"{prefix}bias"] = state[f"{prefix}bias"] * 2


def place(run: Run, name: str) -> Path:
    return run.folder / (HIDDEN if run.rank == SOURCE else "nowhere") / name


def whole(model: nn.Module) -> dict[str, torch.Tensor]:
    state = model.state_dict()
    return {n: t.full_tensor() if isinstance(t, DTensor) else t for n, t in state.items()}


def same(found: dict[str, Any], expected: dict[str, Any]) -> str:
    equal = found.keys() == expected.keys() and all(
        torch.equal(found[n], expected[n]) for n in found if isinstance(expected[n], torch.Tensor)
    )
    return "right" if equal else "wrong"


def expected_block() -> nn.Module:
    torch.manual_seed(SEED)
    return Block()


def deferred_block() -> nn.Module:
    torch.manual_seed(SEED + 1)
    return lateinit.deferred_init(Block)


def loaded(run: Run, model: nn.Module, name: str, **options: Any) -> str:
    run.call(lateinit.load_checkpoint, model, place(run, name), source_rank=SOURCE, **options)
    return same(whole(model), expected_block().state_dict())


def rows_of_safetensors(run: Run) -> str:
    model = deferred_block()
    fsdp(model, line(dist.get_world_size()))
    return loaded(run, model, "model.safetensors")


def columns_of_a_run(run: Run) -> str:
    model = deferred_block()
    spread(model, line(dist.get_world_size()), None, dims=(1,))
    return loaded(run, model, "run.pt")


def of_a_dcp_folder_by_key(run: Run) -> str:
    model = deferred_block()
    fsdp(model, line(dist.get_world_size()))
    return loaded(run, model, "dcp", key="model", check=False)


def without_shards(run: Run) -> str:
    return loaded(run, deferred_block(), "model.safetensors")


def into_a_real_model_on_one_rank(run: Run) -> str:
    return loaded(run, expected_block() if run.other else deferred_block(), "model.safetensors")


def extra_state_and_a_hook(run: Run) -> str:
    model = lateinit.deferred_init(Counting)
    run.call(lateinit.load_checkpoint, model, place(run, "counting.pt"), source_rank=SOURCE)
    right = model.epoch == 7 and model.weight.eq(3).all() and model.bias.eq(6).all()
    return "right" if right else "wrong"


def a_missing_file(run: Run) -> str:
    model = deferred_block()
    fsdp(model, line(dist.get_world_size()))
    run.call(lateinit.load_checkpoint, model, place(run, "none.pt"), source_rank=SOURCE)
    assert lateinit.is_deferred(model)
    return loaded(run, model, "model.safetensors")


def another_source(run: Run) -> str:
    run.call(lateinit.load_checkpoint, deferred_block(), "x", source_rank=run.rank)
    run.call(lateinit.load_checkpoint, deferred_block(), "x", source_rank=9)
    return "right"


def a_misfit_on_one_rank(run: Run) -> str:
    """An error of one rank leaves no other waiting."""
    model = nn.Linear(2, 2) if run.rank == 0 else deferred_block()
    run.call(lateinit.load_checkpoint, model, place(run, "model.safetensors"), source_rank=SOURCE)
    return loaded(run, deferred_block(), "model.safetensors")


def an_optimizer_over_a_deferred_model(run: Run) -> str:
    """A run of FSDP2 goes on as if it had not ended."""
    mesh = line(dist.get_world_size())
    torch.manual_seed(SEED)
    source = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3))
    fsdp(source, mesh)
    theirs = torch.optim.AdamW(source.parameters())
    _step(source, theirs)
    state, optim = get_state_dict(source, theirs)
    path = run.folder / "training"
    dcp.save({"model": state, "optimizer": optim}, checkpoint_id=path)
    _step(source, theirs)
    torch.manual_seed(SEED + 1)
    model = lateinit.deferred_init(lambda: nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3)))
    fsdp(model, mesh)
    optimizer = torch.optim.AdamW(model.parameters())
    lateinit.load_checkpoint(model, path)
    _, empty = get_state_dict(model, optimizer)
    dcp.load({"optimizer": empty}, checkpoint_id=path)
    set_optimizer_state_dict(model, optimizer, copy.copy(empty))
    _step(model, optimizer)
    return same(whole(model), whole(source))


def _step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    model(torch.arange(12.0).view(2, 6)).square().mean().backward()
    optimizer.step()


CASES = {
    function.__name__: function
    for function in (
        a_misfit_on_one_rank,
        a_missing_file,
        an_optimizer_over_a_deferred_model,
        another_source,
        columns_of_a_run,
        extra_state_and_a_hook,
        into_a_real_model_on_one_rank,
        of_a_dcp_folder_by_key,
        rows_of_safetensors,
        without_shards,
    )
}


if __name__ == "__main__":
    sending._PIECE = 1000  # several for each tensor
    sys.exit(play(CASES))
