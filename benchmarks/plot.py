"""The rows that have a goal, drawn: how their ratio lies to it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import matplotlib as mpl
from matplotlib.figure import Figure

if TYPE_CHECKING:
    from pathlib import Path

    from benchmarks.harness import Row

_MET, _MISSED = "#2a7f62", "#c1543c"


def draw(rows: list[Row], path: Path) -> None:
    """Leave an SVG in which each row is a bar: how many times better than its goal it is."""
    shown = [row for row in rows if row.goal is not None]
    better = [_better(row) for row in shown]
    figure = Figure(figsize=(10, 1.2 + 0.26 * len(shown)), layout="constrained")
    axes = figure.subplots()
    colors = [_MET if row.met else _MISSED for row in shown]
    # Bars grow from the goal: to the right what is better, to the left what is worse.
    bars = axes.barh(range(len(shown)), [b - 1 for b in better], left=1, color=colors)
    ratios = [f"{row.ratio:.3g} ({row.goal})" for row in shown]
    axes.bar_label(bars, ratios, padding=3, fontsize=7)
    names = [f"{row.case}: {row.what}, against {row.against}" for row in shown]
    axes.set_yticks(range(len(shown)), names, fontsize=8)
    axes.invert_yaxis()
    axes.set_xscale("log", base=2)
    axes.set_xlim(min(better, default=1) / 10, max(better, default=1) * 10)
    axes.margins(y=0.01)
    axes.set_xlabel("times better than the goal; the number is the ratio that was measured")
    axes.axvline(1, color="black", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    # The same rows give the same bytes, so that a change of the file is one of the figures.
    with mpl.rc_context({"svg.hashsalt": "lateinit", "svg.fonttype": "none"}):
        figure.savefig(path, metadata={"Date": None})


def _better(row: Row) -> float:
    assert row.goal is not None
    return row.ratio / row.goal.value if row.goal.faster else row.goal.value / row.ratio
