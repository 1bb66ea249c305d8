"""Results for a person: a table on the terminal and a page; and for a program: JSON."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from benchmarks.plot import draw
from lateinit._terminal import Table

if TYPE_CHECKING:
    from pathlib import Path

    from benchmarks.harness import Row

HEADINGS = ("case", "what", "lateinit", "against", "theirs", "ratio", "goal", "met", "equal")
PAGE = """# Benchmarks

This page compares the time and memory of lateinit with those of other ways to build, load and save
models. Read it to estimate the cost of a model like yours. `make bench` writes it.

Within one run, lateinit and the alternative are measured in turn, each memory in a process of its
own. Times are the shortest of their rounds; `benchmarks.json` has the medians. *Ratio* is the value
of lateinit divided by that of the alternative, or the reverse where the goal is a speedup. *Equal*:
in the same run, every bit was compared with eager construction.

The first access to new memory costs much more on some machines than on others, as a virtual machine
must ask its host for the memory. Here a turn reuses the memory that earlier turns freed.

{machine}

![Each row that has a goal, by how far it is from it](benchmarks.svg)

{table}

{notes}
"""


def cells(row: Row) -> list[str]:
    return [
        row.case,
        row.what,
        quantity(min(row.ours), row.unit),
        row.against,
        quantity(min(row.theirs), row.unit),
        f"{row.ratio:.2f}",
        str(row.goal or ""),
        said(row.met),
        said(row.equal),
    ]


def quantity(value: float, unit: str) -> str:
    if unit == "s" and value < 1:
        return f"{1e3 * value:.3g} ms"
    return f"{value:.3g} {unit}" if value < 1000 else f"{value:.0f} {unit}"


def said(answer: bool | None) -> str:
    return {None: "", True: "yes", False: "no"}[answer]


def table(rows: list[Row]) -> Table:
    """The rows as a table for the terminal."""
    shown = Table(*HEADINGS)
    for row in rows:
        shown.add_row(*cells(row), style="red" if row.met is False else None)
    return shown


def as_json(rows: list[Row], machine: dict[str, Any]) -> str:
    return json.dumps({"machine": machine, "rows": [row.plain() for row in rows]}, indent=1) + "\n"


def page(rows: list[Row], machine: dict[str, Any]) -> str:
    lines = [HEADINGS, ["---"] * len(HEADINGS), *(cells(row) for row in rows)]
    drawn = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    described = ", ".join(f"{key.replace('_', ' ')}: {value}" for key, value in machine.items())
    notes = [f"- {r.case}, {r.what}, against {r.against}: {r.note}." for r in rows if r.note]
    return PAGE.format(machine=described, table=drawn, notes="\n".join(notes))


def write(rows: list[Row], machine: dict[str, Any], folder: Path) -> None:
    """Leave the results as ``benchmarks.json``, ``benchmarks.md`` and ``benchmarks.svg``."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "benchmarks.json").write_text(as_json(rows, machine))
    (folder / "benchmarks.md").write_text(page(rows, machine))
    draw(rows, folder / "benchmarks.svg")
