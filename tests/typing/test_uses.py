"""What type checkers say of the uses in ``uses.py``, and that their view of the layers is true."""

from __future__ import annotations

import ast
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from torch import nn

import lateinit

ROOT = Path(__file__).parents[2]
USES = Path(__file__).with_name("uses.py")
WRONG = {
    number
    for number, line in enumerate(USES.read_text().splitlines(), 1)
    if line.endswith("# wrong")
}
STUBS = {
    node.name: node.body[0]
    for node in ast.parse(Path(lateinit.nn.__file__).with_suffix(".pyi").read_text()).body
    if isinstance(node, ast.ClassDef)
}


def ran(*command: object) -> str:
    environment = {**os.environ, "PYTHONPATH": str(Path(lateinit.__file__).parents[1])}
    done = subprocess.run(
        [*map(str, command), str(USES)],
        check=False,
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**environment, "MYPYPATH": environment["PYTHONPATH"]},
    )
    assert done.returncode == 1, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_mypy_finds_every_wrong_use_and_no_other() -> None:
    pytest.importorskip("mypy")
    shown = ran(sys.executable, "-m", "mypy", "--no-warn-unreachable")
    assert set(map(int, re.findall(r"uses\.py:(\d+): error", shown))) == WRONG, shown


@pytest.mark.slow
def test_pyright_finds_every_wrong_use_and_no_other() -> None:
    checker = shutil.which("basedpyright", path=Path(sys.executable).parent) or shutil.which(
        "basedpyright"
    )
    if checker is None:
        pytest.skip("basedpyright is not installed")
    shown = ran(checker, "--outputjson", "--level", "error", "--pythonpath", sys.executable)
    found = json.loads(shown)["generalDiagnostics"]
    assert {each["range"]["start"]["line"] + 1 for each in found} == WRONG, shown


@pytest.mark.parametrize("name", sorted(STUBS))
def test_a_layer_takes_what_type_checkers_see(name: str) -> None:
    init = STUBS[name]
    assert isinstance(init, ast.FunctionDef)
    seen = [a.arg for a in init.args.args[1:]], [a.arg for a in init.args.kwonlyargs]
    real = inspect.signature(getattr(lateinit.nn, name)).parameters.values()
    assert seen == (
        [p.name for p in real if p.kind is p.POSITIONAL_OR_KEYWORD],
        [p.name for p in real if p.kind is p.KEYWORD_ONLY],
    )
    defaults = [*init.args.defaults, *init.args.kw_defaults]
    given = [p.default for p in real if p.default is not p.empty]
    for default, expected in zip(defaults, given, strict=True):
        assert default is not None
        assert ast.unparse(default) == "..." or ast.literal_eval(default) == expected


def test_every_other_layer_is_torchs_to_type_checkers() -> None:
    layers = {name for name in lateinit.nn.__all__ if name.startswith("Lazy")} - {"LazyModuleMixin"}
    for name in layers - STUBS.keys():
        assert issubclass(getattr(lateinit.nn, name), getattr(nn, name))
    assert layers >= STUBS.keys()
