"""``python -m tests.matrix``: run `make quick` under several torch versions and CPU settings.

A CPU setting is an environment variable that makes torch, oneDNN or MKL use the kernels of another
CPU.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from xml.etree import ElementTree as ET

from rich.console import Console

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "compatibility.md"
TORCHES = ("2.13.0", "2.14.1", "2.15.0")
SETTINGS = (
    "",
    "ATEN_CPU_CAPABILITY=default",
    "ATEN_CPU_CAPABILITY=avx2",
    "ONEDNN_MAX_CPU_ISA=AVX2",
    "MKL_ENABLE_INSTRUCTIONS=AVX2",
    "MKL_CBWR=COMPATIBLE",
)
EXTENSIONS = re.compile(r"(?:sse4_|avx|fma|amx|f16c|asimd|sve)\w*")

INTRODUCTION = """# Compatibility

This page says under which torch versions and CPU settings the tests pass. Read it to see whether
your combination is tested. `make matrix` writes it (`python -m tests.matrix --help` for parts of
it).

Each cell is a run of `make quick`, which checks every law on a dozen representative models, and
every export of `lateinit._torch`. A CPU setting is an environment variable that makes torch, oneDNN
or MKL use the kernels of another CPU. The eager twin, the model built without lateinit, uses the
same setting.
"""


@dataclass(frozen=True, slots=True)
class Cell:
    """One run of the tests: how many passed, and the names of those that did not."""

    torch: str
    setting: str
    passed: int
    skipped: int
    failed: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.passed} passed, {len(self.failed)} failed"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.matrix", description=__doc__)
    parser.add_argument("--torch", nargs="+", default=TORCHES, metavar="VERSION")
    parser.add_argument("--setting", nargs="+", default=SETTINGS, metavar="NAME=VALUE")
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time")
    parser.add_argument("--table", type=Path, default=None, metavar="PATH")
    options = parser.parse_args(argv)
    console = Console(stderr=True)
    cells = []
    for version in options.torch:
        for setting in options.setting:
            cells.append(run(version, setting, options.jobs))
            console.print(f"torch {version}, {setting or 'as it is'}: {cells[-1]}")
            for name in cells[-1].failed:
                console.print(f"  {name}", markup=False)
    whole = set(options.torch) >= set(TORCHES) and set(options.setting) >= set(SETTINGS)
    table = options.table or (PAGE if whole else None)
    if table is not None:
        table.write_text(page(cells))
    return int(any(cell.failed or not cell.passed for cell in cells))


def run(version: str, setting: str, jobs: int) -> Cell:
    """Run the tests in the environment of a torch version, which `make matrix` has made."""
    python = ROOT / f".venv-torch-{version}" / "bin" / "python"
    variables = dict([setting.split("=", 1)]) if setting else {}
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        done = subprocess.run(
            [
                *(python, "-m", "pytest", "--quick", "-q", "-n", str(jobs)),
                *("-p", "no:cacheprovider", f"--junitxml={report}"),
            ],
            cwd=ROOT,
            env=os.environ | variables,
            capture_output=True,
            text=True,
            check=False,
        )
        if not report.exists():
            return Cell(version, setting, 0, 0, (done.stdout[-2000:] + done.stderr[-2000:],))
        return counted(version, setting, ET.parse(report))


def counted(version: str, setting: str, report: ET.ElementTree[ET.Element]) -> Cell:
    failed, skipped, passed = [], 0, 0
    for case in report.iter("testcase"):
        wrong = case.find("failure") if case.find("failure") is not None else case.find("error")
        if wrong is not None:
            said = (wrong.get("message") or "").split("\n")[0][:200].replace(str(ROOT), "")
            failed.append(f"{case.get('classname')}::{case.get('name')}: {said}")
        elif case.find("skipped") is not None:
            skipped += 1
        else:
            passed += 1
    return Cell(version, setting, passed, skipped, tuple(failed))


def page(cells: list[Cell]) -> str:
    versions = list(dict.fromkeys(cell.torch for cell in cells))
    by_place = {(cell.setting, cell.torch): cell for cell in cells}
    lines = [
        INTRODUCTION,
        f"On {platform.machine()} with {', '.join(extensions()) or 'unknown extensions'}.\n",
        row("", *(f"torch {version}" for version in versions)),
        row(*("---" for _ in range(len(versions) + 1))),
    ]
    for setting in dict.fromkeys(cell.setting for cell in cells):
        found = [by_place.get((setting, version)) for version in versions]
        lines.append(row(f"`{setting}`" if setting else "as it is", *(str(c or "") for c in found)))
    red = [cell for cell in cells if cell.failed]
    lines.append("\n## What fails\n")
    lines += [
        f"- torch {cell.torch}, {cell.setting or 'as it is'}: `{name}`"
        for cell in red
        for name in cell.failed
    ] or ["Nothing."]
    return "\n".join(lines) + "\n"


def row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def extensions() -> Iterable[str]:
    """The vector extensions that this CPU has, where the system tells."""
    about = Path("/proc/cpuinfo")
    text = about.read_text() if about.exists() else ""
    line = next((line for line in text.splitlines() if line.startswith(("flags", "Features"))), "")
    return sorted(word for word in line.split() if EXTENSIONS.fullmatch(word))


if __name__ == "__main__":
    sys.exit(main())
