"""A rank that is lost: ``python -m tests.sharding.faults RANK RANKS STORE WAY FOLDER``.

One rank dies in the middle of a call, or never makes it. Every other rank prints the error.
"""

from __future__ import annotations

import os
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import lateinit
from lateinit._checkpoint.load.assign import Placer
from lateinit._tensors.realize import SharedStorage
from lateinit.errors import ShardingError
from tests.sharding.together import CULPRIT, built

# Seconds; the timeout of the process group, and how long a rank stays away.
TIMEOUT, AWAY = 4, 8
WAYS = {
    "killed filling": (SharedStorage, "give"),
    "killed loading": (Placer, "put"),
    "never arrives": None,
}


def die_in(owner: Any, method: str) -> None:
    """Have this process die when a method is called for the third time."""
    original, calls = getattr(owner, method), 0

    def dying(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 3:
            os._exit(3)
        return original(*args, **kwargs)

    setattr(owner, method, dying)


def main(rank: int, ranks: int, store: str, way: str, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(store, ranks),
        rank=rank,
        world_size=ranks,
        timeout=timedelta(seconds=TIMEOUT),
    )
    model = built()
    place = WAYS[way]
    if rank == CULPRIT and place is not None:
        die_in(*place)
    elif rank == CULPRIT:
        time.sleep(AWAY)
        os._exit(3)
    started = time.monotonic()
    try:
        if way == "killed loading":
            lateinit.load_checkpoint(model, folder / "model.safetensors")
        else:
            lateinit.materialize(model)
    except ShardingError as error:
        waited = time.monotonic() - started
        sys.stdout.write(f"lost: {error}; in time: {waited < TIMEOUT + 10}\n")
        sys.stdout.flush()
        os._exit(0)  # gloo's threads may hang on the broken connection


if __name__ == "__main__":
    rank, ranks, store, way, folder = sys.argv[1:]
    main(int(rank), int(ranks), store, way, Path(folder))
