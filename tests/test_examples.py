"""Examples run, are short, say what docs/gallery.md shows of them, and draw."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

import lateinit

ROOT = Path(__file__).parents[1]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
PAGE = (ROOT / "docs" / "gallery.md").read_text()
# What peft asks a model of transformers is deprecated there.
QUIET = ["-W", "error", "-W", "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"]
# Rarely a thread of gloo lets go of a tensor while Python ends (pytorch/pytorch#190489).
ABORTED = "terminate called without an active exception"
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]


def said(text: str) -> list[str]:
    """Lines without their numbers: losses and sizes are those of a CPU and of versions."""
    return [re.sub(r"\d[\d.,e-]*", "#", line).strip() for line in text.splitlines()]


def shown(path: Path) -> str:
    """What the page shows as the output of an example."""
    section = PAGE.split(f"(../examples/{path.name})")[1].split("\n## ")[0]
    return section.split("```text\n")[1].split("```")[0]


def run(command: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    source = Path(lateinit.__file__).parents[1]
    return subprocess.run(
        [sys.executable, *command],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(source), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_runs_and_says_and_draws_what_the_gallery_shows(
    path: Path, tmp_path: Path
) -> None:
    text, plot = path.read_text(), tmp_path / "plot.svg"
    assert len(text.splitlines()) < 80
    if "torchtitan" in text:
        pytest.importorskip("torchtitan", reason="torchtitan is not there", exc_type=ImportError)
    command = [*(TORCHRUN if "torchrun" in text else QUIET), str(path)]
    if "--plot" in text:
        command += ["--plot", str(plot)]
        assert f"](gallery/{path.stem}.svg)" in PAGE
    done = run(command, tmp_path)
    if ABORTED in done.stderr:
        done = run(command, tmp_path)
    assert done.returncode == 0, done.stderr
    assert "torchrun" in text or not done.stderr
    assert [line for line in said(shown(path)) if line not in said(done.stdout)] == []
    assert plot.exists() == ("--plot" in text)
    if plot.exists():
        assert ET.parse(plot).getroot().tag.endswith("svg")


def test_an_example_that_is_called_wrongly_says_how_it_is_called() -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "examples" / "mup_sweep.py", "--plto", "x"],
        env={**os.environ, "PYTHONPATH": str(Path(lateinit.__file__).parents[1])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "usage: mup_sweep.py [-h] [--plot PLOT]" in done.stderr


def test_plots_of_the_gallery_are_small() -> None:
    plots = sorted((ROOT / "docs" / "gallery").glob("*.svg"))
    assert plots
    assert [path.name for path in plots if path.stat().st_size > 150_000] == []
