"""Ranks that are given different arguments: ``python -m ... RANK RANKS STORE FOLDER``.

``DIFFERENT`` has, for each public function that fills or writes shards, every keyword that decides
their values or the output, with values that only one rank gets.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

import lateinit
from tests.sharding.placements import Block
from tests.sharding.together import SEED, Run, built, play, right

ZEROS = {"up.weight": "zeros"}
HALF = {"up.weight": torch.bfloat16}
SWAPPED = {"norm.weight": "norm.bias", "norm.bias": "norm.weight"}
DIFFERENT: dict[str, dict[str, list[Any]]] = {
    "load_checkpoint": {
        "dtype": [torch.bfloat16, HALF],
        "init": [{"down.bias": "ones"}],
        "key": ["model"],
        "prefix": ["module."],
        "rename": [SWAPPED, {"up.bias": None}],
    },
    "materialize": {
        "dtype": [torch.bfloat16, HALF],
        "init": [ZEROS],
        "only": ["up.*"],
        "seed": [9],
    },
    "save_checkpoint": {
        "dtype": [torch.bfloat16, HALF],
        "format": ["safetensors"],
        "init": [ZEROS],
        "max_shard_size": [1000],
        "seed": [9],
        "wait": [False],
    },
}
# These may differ: a device, what is seen, who reads, and what only the first rank looks at.
MAY_DIFFER = {
    "load_checkpoint": {
        "check",
        "device",
        "offload_folder",
        "progress",
        "source_rank",
        "strict",
    },
    "materialize": {"check", "device", "offload_folder", "progress", "threads"},
    "save_checkpoint": {"force", "progress", "resume"},
}
USUAL: dict[str, dict[str, Any]] = {
    "key": {"key": "ema"},
    "prefix": {"prefix": "ema.", "key": ""},
    "rename": {"key": "ema"},
    "max_shard_size": {"format": "safetensors"},
}


def checkpoint(folder: Path) -> None:
    """A file with several state dicts that fit; ``down`` is in none of them."""
    state, found = built_eagerly(SEED), {}
    for name, begin, seed in (("ema", "", SEED), ("model", "", 4), ("both", "module.", 5)):
        values = state if seed == SEED else built_eagerly(seed)
        found[name] = {begin + k: v for k, v in values.items() if not k.startswith("down.")}
    torch.save(found, folder / "training.pt")
    flat = {f"{begin}{k}": v for begin in ("ema.", "module.") for k, v in found["ema"].items()}
    flat |= {k: v + 1 for k, v in flat.items() if k.startswith("module.")}
    torch.save(flat, folder / "flat.pt")


def built_eagerly(seed: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    return Block().state_dict()


def called(function: str, keyword: str, value: Any) -> Callable[[Run], str]:
    """Call a function, first with a value on one rank only, and then alike on all."""

    def case(run: Run) -> str:
        model, usual = built(), USUAL.get(keyword, {})
        given = {**usual, keyword: value} if run.other else usual
        run.call(call, function, model, run.folder, keyword, given)
        run.seen.append("" if untouched(model) else "changed")
        lateinit.materialize(model)
        return "right" if right(model) else "wrong"

    return case


def call(function: str, model: nn.Module, folder: Path, keyword: str, given: Any) -> None:
    if function == "materialize":
        lateinit.materialize(model, **given)
    elif function == "save_checkpoint":
        lateinit.save_checkpoint(model, folder / f"saved {keyword}", **given).result()
    else:
        path = folder / ("flat.pt" if keyword == "prefix" else "training.pt")
        given = {"key": "ema", **given}
        lateinit.load_checkpoint(model, path, strict=False, **given)


def untouched(model: nn.Module) -> bool:
    dist.barrier()
    return all(map(lateinit.is_deferred, model.parameters()))


CASES = {
    f"{function} {keyword} {number}": called(function, keyword, value)
    for function, keywords in DIFFERENT.items()
    for keyword, values in keywords.items()
    for number, value in enumerate(values)
}

if __name__ == "__main__":
    sys.exit(play(CASES))
