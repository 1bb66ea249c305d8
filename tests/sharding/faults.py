"""Ranks that are lost: ``python -m tests.sharding.faults FOLDER``.

In each way one of three ranks dies in the middle of a call, or never makes it. The others write
what they see into files ``WAY RANK`` in the folder; a line for each way says how all of them ended,
and which checkpoint is in ``FOLDER/saved`` then.

Ranks are copies of one process, which has imported all that they need. Importing takes longer than
all else.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist

import lateinit
from lateinit._checkpoint.load.assign import Placer
from lateinit._checkpoint.save.atomic_output import Stage
from lateinit._checkpoint.save.shard_writers import Blocks
from lateinit._tensors.realize import SharedStorage
from lateinit.errors import LateinitError
from tests.sharding.placements import Block
from tests.sharding.resuming import deferred_block, same
from tests.sharding.together import CULPRIT, SEED, built

if TYPE_CHECKING:
    from collections.abc import Callable

RANKS = 3
# Seconds: the timeout of the process group, how long a rank stays away, and the most for a rank.
TIMEOUT, AWAY, LONGEST = 4, 6, 60
# The seed of the checkpoint that is there before.
EARLIER = 4


class Way(NamedTuple):
    """What is called, and where a rank dies in it; with no place it never makes the call.

    Attributes:
        call: is given the model and the folder.
        place: the class and the method in which it dies.
        after: how many calls of that method it survives.
        culprit: the rank.
    """

    call: Callable[[Any, Path], object]
    place: tuple[type, str] | None = None
    after: int = 2
    culprit: int = CULPRIT


def load(model: Any, folder: Path) -> None:
    lateinit.load_checkpoint(model, folder / "model.safetensors")


def materialize(model: Any, _: Path) -> None:
    lateinit.materialize(model)


def save(model: Any, folder: Path) -> None:
    lateinit.save_checkpoint(model, folder / "saved", force=True)


def save_later(model: Any, folder: Path) -> None:
    lateinit.save_checkpoint(model, folder / "saved", force=True, wait=False).result()


def save_whole_files(model: Any, folder: Path) -> None:
    lateinit.save_checkpoint(model, folder / "saved", force=True, format="safetensors")


WAYS = {
    "killed filling": Way(materialize, (SharedStorage, "give")),
    "killed loading": Way(load, (Placer, "put")),
    "killed publishing": Way(save, (Stage, "publish"), after=0, culprit=0),
    "killed saving": Way(save, (Blocks, "_block")),
    "killed saving later": Way(save_later, (Blocks, "_block")),
    "killed saving whole files": Way(save_whole_files, (Blocks, "_block")),
    "never arrives": Way(materialize),
    "never arrives to save": Way(save),
}


def die_in(owner: Any, method: str, after: int) -> None:
    """Have this process die when a method has been called some times."""
    original, calls = getattr(owner, method), 0

    def dying(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > after:
            os._exit(3)
        return original(*args, **kwargs)

    setattr(owner, method, dying)


def play(rank: int, store: Path, way: Way, folder: Path) -> None:
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(str(store), RANKS),
        rank=rank,
        world_size=RANKS,
        timeout=timedelta(seconds=TIMEOUT),
    )
    model = built()
    if rank == way.culprit and way.place is not None:
        die_in(*way.place, way.after)
    elif rank == way.culprit:
        time.sleep(AWAY)
        os._exit(3)
    started = time.monotonic()
    try:
        way.call(model, folder)
    except LateinitError as error:
        waited = time.monotonic() - started
        sys.stderr.write(f"lost: {error}; in time: {waited < TIMEOUT + 10}\n")
        os._exit(0)  # gloo's threads may hang on the broken connection


def forked(rank: int, name: str, folder: Path) -> int:
    """The number of a process that plays one rank."""
    process = os.fork()
    if process:
        return process
    output = os.open(folder / f"{name} {rank}", os.O_CREAT | os.O_WRONLY)
    os.dup2(output, 2)
    signal.alarm(LONGEST)
    try:
        play(rank, folder / f"store of {name}", WAYS[name], folder)
    finally:
        os._exit(1)


def found(folder: Path) -> str:
    """Which of the two checkpoints is there."""
    model = deferred_block()
    lateinit.load_checkpoint(model, folder / "saved")
    for name, seed in (("earlier", EARLIER), ("new", SEED)):
        torch.manual_seed(seed)
        if same(model.state_dict(), Block().state_dict()) == "right":
            return name
    return "broken"


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(EARLIER)
    earlier = lateinit.deferred_init(Block)
    lateinit.save_checkpoint(earlier, folder / "saved", format="dcp")
    for name in WAYS:
        ranks = [forked(rank, name, folder) for rank in range(RANKS)]
        codes = [os.waitstatus_to_exitcode(os.waitpid(rank, 0)[1]) for rank in ranks]
        sys.stdout.write(f"{name} | {' '.join(map(str, codes))} | {found(folder)}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
