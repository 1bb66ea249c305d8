"""Starting the ranks of a group as real processes."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tests.support import processes

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path


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
    waits = []
    for rank in range(ranks):
        command = ["-m", module, str(rank), str(ranks), str(store), *arguments]
        own = (settings or {}).get(rank)
        start = forked if own is None else fresh
        waits.append(start(command, folder / f"rank-{rank}", {**environment, **(own or {})}))
    until = time.monotonic() + seconds
    codes = [wait(max(0.1, until - time.monotonic())) for wait in waits]
    told = [(folder / f"rank-{rank}").read_text() for rank in range(ranks)]
    return [Ended(code, output) for code, output in zip(codes, told, strict=True)]


def forked(
    command: list[str], output: Path, environment: dict[str, str]
) -> Callable[[float], int | None]:
    """Start a rank; returns what waits for its end, and kills it after a time."""
    process = processes.start(command, output, output, env=environment)

    def wait(seconds: float) -> int | None:
        process.join(seconds)
        if process.is_alive():
            process.kill()
            process.join()
            return None
        return process.exitcode

    return wait


def fresh(
    command: list[str], output: Path, environment: dict[str, str]
) -> Callable[[float], int | None]:
    """Likewise in a new interpreter, for an environment that counts when torch is imported."""
    run = [sys.executable, "-m", processes.__name__, *command]
    with output.open("w") as file:
        process = subprocess.Popen(
            run, stdout=file, stderr=subprocess.STDOUT, cwd=processes.ROOT, env=environment
        )

    def wait(seconds: float) -> int | None:
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            return None

    return wait
