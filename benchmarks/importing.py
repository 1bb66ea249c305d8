"""What ``import lateinit`` adds to ``import torch``, in CPU seconds of fresh processes."""

from __future__ import annotations

import json
from statistics import median

from benchmarks.harness import Goal, Row, Run, printed

# User and system time of the imports alone, not of starting the interpreter.
SCRIPT = """
import json, sys, time
start = time.process_time()
{statements}
print(json.dumps(time.process_time() - start))
"""
TORCH = "import torch"


def seconds(statements: str) -> float:
    return float(json.loads(printed("-c", SCRIPT.format(statements=statements))))


def importing(run: Run) -> list[Row]:
    """The median of the differences of ten pairs of processes, against 0.15 s."""
    pairs = [
        (seconds(f"{TORCH}; import lateinit"), seconds(TORCH)) for _ in range(run.times(few=10))
    ]
    with_names = [
        (seconds(f"{TORCH}; import lateinit; lateinit.deferred"), seconds(TORCH))
        for _ in range(run.times())
    ]

    def row(what: str, found: list[tuple[float, float]], goal: Goal | None) -> Row:
        added = max(median(ours - theirs for ours, theirs in found), 0.0)
        return Row("import", what, [added], "0.15 s of CPU", [0.15], goal=goal)

    return [
        row("import lateinit, beyond import torch", pairs, Goal(1.0)),
        row("and its first name", with_names, None),
    ]
