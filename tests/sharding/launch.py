"""Starting the ranks of a group as real processes."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True, slots=True)
class Ended:
    """How one rank ended; ``code`` is None where it had to be killed."""

    code: int | None
    output: str


def launch(
    module: str,
    ranks: int,
    folder: Path,
    *arguments: str,
    seconds: float,
    settings: Mapping[int, Mapping[str, str]] | None = None,
) -> list[Ended]:
    """Run ``python -m module RANK RANKS STORE ...`` for every rank; all end within a time.

    ``settings`` are variables of the environment of some ranks.
    """
    store = folder / f"store-{ranks}"
    store.unlink(missing_ok=True)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    started = []
    for rank in range(ranks):
        run = [sys.executable, "-m", "tests.sharding.rank", module]
        command = [*run, str(rank), str(ranks), str(store), *arguments]
        with (folder / f"rank-{rank}").open("w") as output:
            own = {**environment, **(settings or {}).get(rank, {})}
            process = subprocess.Popen(
                command, stdout=output, stderr=subprocess.STDOUT, cwd=ROOT, env=own
            )
        started.append(process)
    until = time.monotonic() + seconds
    ended = []
    for rank, process in enumerate(started):
        try:
            code: int | None = process.wait(max(0.1, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            code = None
        ended.append(Ended(code, (folder / f"rank-{rank}").read_text()))
    return ended
