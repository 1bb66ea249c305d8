"""Loading a checkpoint and writing one, against the other ways to do it."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file

import lateinit
from benchmarks.contenders import deferred, materialized
from benchmarks.harness import MB, Goal, Row, Run, alternate, in_process
from benchmarks.load_once import WAYS, bits
from benchmarks.models import MODELS

if TYPE_CHECKING:
    from collections.abc import Callable

MODEL = "llama_1b"
SAVED_SEED = 1
OURS, EAGER, *REST = WAYS


def loading(run: Run) -> list[Row]:
    """All ways in turn, each in a process of its own; the file is in the page cache for all."""
    size = ["tiny"] if run.tiny else []
    found: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        torch.manual_seed(SAVED_SEED)
        model = lateinit.deferred_init(lambda: MODELS[MODEL](tiny=run.tiny))
        lateinit.save_checkpoint(model, path)
        path.read_bytes()  # into the page cache, for all
        for _ in range(run.times(1)):
            for way, results in found.items():
                results.append(in_process("benchmarks.load_once", way, MODEL, str(path), *size))
    expected = found[EAGER][0]["bits"]
    rows = [row for way in (EAGER, *REST) for row in compared(way, found, expected, run)]
    assert rows[0].equal, "what was loaded differs from what the eager twin loads"
    return rows


def compared(
    way: str, found: dict[str, list[dict[str, Any]]], expected: dict[str, str], run: Run
) -> list[Row]:
    """Three rows: until there is a model, until all of it has been read, and the memory."""
    equal = all(result["bits"] == expected for result in found[OURS])
    faster = Goal(5.0, faster=True) if way == EAGER else Goal(1.0)
    wrong = differing(found[way][0]["bits"], expected)
    note = f"theirs: {wrong}" if wrong else "theirs: all right"
    rows = []
    for what, key, unit, scale, goal in (
        ("load", "usable", "s", 1.0, faster),
        ("load and read all", "read", "s", 1.0, None),
        ("peak memory to load", "peak", "MB", MB, None),
    ):
        ours, theirs = ([r[key] / scale for r in found[name]] for name in (OURS, way))
        tiny_goal = None if run.tiny else goal
        rows.append(Row(MODEL, what, ours, way, theirs, unit, tiny_goal, equal, note))
    return rows


def differing(sums: dict[str, str], expected: dict[str, str]) -> str:
    wrong = [name for name in expected if sums.get(name) != expected[name]]
    on_meta = [name for name in wrong if sums.get(name) == "on meta"]
    shown = ", ".join(wrong[:2])
    return f"{len(wrong)} wrong ({len(on_meta)} still on meta): {shown}" if wrong else ""


def writing(run: Run) -> list[Row]:
    """Writing a deferred model, against the disk and against the generator."""

    def make() -> torch.nn.Module:
        return MODELS[MODEL](tiny=run.tiny)

    with tempfile.TemporaryDirectory() as folder:
        path, zeros = Path(folder) / "model.safetensors", Path(folder) / "zeros"

        def write() -> None:
            lateinit.save_checkpoint(deferred(make), path, force=True)

        write()
        count = path.stat().st_size
        ways: dict[str, Callable[[], object]] = {
            "ours": write,
            "dd": lambda: disk(zeros, count),
            "generator": lambda: materialized(make),
        }
        seconds = alternate(ways, run.times())
        found, expected = load_file(path), materialized(make).state_dict()
        equal = found.keys() <= expected.keys() and all(
            bits(tensor) == bits(expected[name]) for name, tensor in found.items()
        )
        assert equal, "what was written differs"
        shutil.rmtree(path, ignore_errors=True)
    slower = max(("dd", "generator"), key=lambda name: min(seconds[name]))
    rate = f"{count / MB / min(seconds['ours']):.0f} MB a second"
    return [
        Row(
            MODEL,
            "write",
            seconds["ours"],
            f"{name}{' (the slower)' if name == slower else ''}",
            seconds[name],
            "s",
            Goal(1 / 0.8) if name == slower else None,
            equal,
            rate,
        )
        for name in ("dd", "generator")
    ]


def disk(path: Path, count: int) -> None:
    """Plain writing of zeros, synced as ours is."""
    block = 1 << 24
    command = ["dd", "if=/dev/zero", f"of={path}", f"bs={block}", f"count={-(-count // block)}"]
    subprocess.run([*command, "conv=fsync"], check=True, capture_output=True)
