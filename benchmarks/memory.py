"""The memory that building a model takes, in a process of its own.

``python -m benchmarks.memory CONTENDER MODEL [tiny]`` prints the growth of the resident memory
while the model is built (the highest, and what is left), in bytes, as JSON.
"""

from __future__ import annotations

import gc
import json
import resource
import sys
from contextlib import suppress
from pathlib import Path

import psutil

from benchmarks.contenders import CONTENDERS
from benchmarks.harness import tensors
from benchmarks.models import MODELS

STATUS = Path("/proc/self/status")
CLEAR = Path("/proc/self/clear_refs")


def resident() -> int:
    return int(psutil.Process().memory_info().rss)


def highest() -> int:
    """The most that was resident since `forget`, or ever where the system cannot forget."""
    if STATUS.exists():
        for line in STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return 1024 * int(line.split()[1])
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def forget() -> None:
    with suppress(OSError):
        CLEAR.write_text("5")


def main(contender: str, model: str, size: str = "") -> None:
    build, make = CONTENDERS[contender], MODELS[model]
    build(lambda: make(tiny=True))  # imports what is imported late
    gc.collect()
    forget()
    before = resident()
    built = build(lambda: make(tiny=size == "tiny"))
    peak, after = highest(), resident()
    nbytes = sum(t.numel() * t.element_size() for _, t in tensors(built))
    growth = {"peak": max(peak, after) - before, "left": after - before, "model": nbytes}
    print(json.dumps(growth))


if __name__ == "__main__":
    main(*sys.argv[1:])
