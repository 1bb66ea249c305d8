"""What the documents show is what happens: every snippet and docstring is run."""

from __future__ import annotations

import doctest
import importlib
import inspect
import pkgutil
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import lateinit

ROOT = Path(__file__).parents[1]
DOCUMENTS = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
MODULES = [
    name
    for _, name, _ in pkgutil.walk_packages(lateinit.__path__, "lateinit.")
    if not name.endswith("__main__")
]
FENCE = re.compile(r"^```python\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]]+\]\((?!https?:)(?P<target>[^)#]+)")
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


def run_doctest(test: doctest.DocTest) -> None:
    report: list[str] = []
    doctest.DocTestRunner(optionflags=FLAGS).run(test, out=report.append, clear_globs=False)
    assert not report, "".join(report)


def run_block(code: str, names: dict[str, Any], path: Path, line: int) -> None:
    if ">>>" not in code:
        exec(compile("\n" * line + code, path, "exec"), names)
        return
    title = f"{path.name}:{line}"
    test = doctest.DocTestParser().get_doctest(code, names, title, str(path), line)
    run_doctest(test)
    names.update(test.globs)


# Recipes are run by tests/test_recipes.py, each alone.
SHOWN = [path for path in DOCUMENTS if path.name != "recipes.md"]


@pytest.mark.parametrize("path", SHOWN, ids=lambda path: path.name)
def test_every_python_block_of_a_document_does_what_it_shows(path: Path) -> None:
    text = path.read_text()
    names: dict[str, Any] = {"__name__": path.stem}
    assert text.count("```python") == len(FENCE.findall(text))
    with torch.random.fork_rng():
        for block in FENCE.finditer(text):
            run_block(block["code"], names, path, text.count("\n", 0, block.start("code")))


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_every_link_of_a_document_leads_somewhere(path: Path) -> None:
    missing = [
        link["target"]
        for link in LINK.finditer(path.read_text())
        if not (path.parent / link["target"]).exists()
    ]
    assert not missing


def test_a_wrong_snippet_would_be_noticed() -> None:
    with pytest.raises(AssertionError, match=r"Expected:\s+2\s+Got:\s+1"):
        run_block(">>> 1\n2\n", {}, Path("wrong.md"), 0)
    with pytest.raises(ZeroDivisionError, match="division by zero"):
        run_block("1 / 0\n", {}, Path("wrong.md"), 0)


@pytest.mark.parametrize("name", MODULES)
def test_docstrings_of_a_module_do_what_they_show(name: str, tmp_path: Path) -> None:
    module = importlib.import_module(name)
    finder = doctest.DocTestFinder(exclude_empty=True)
    names = {**vars(module), "lateinit": lateinit, "torch": torch, "tmp_path": tmp_path}
    with torch.random.fork_rng():
        for test in finder.find(module, globs=names):
            run_doctest(test)


def test_readme_is_short_and_shows_code_early() -> None:
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) < 120
    shown = [number for number, line in enumerate(lines, 1) if line.startswith(">>>")]
    first = shown[0]
    output = next(
        number
        for number, line in enumerate(lines, 1)
        if number > first and line and not line.startswith((">>>", "...", "```"))
    )
    assert first <= 30
    assert output <= 30
    assert not any("badge" in line for line in lines)


def test_readme_names_the_commands_that_set_everything_up() -> None:
    makefile = (ROOT / "Makefile").read_text()
    readme = (ROOT / "README.md").read_text()
    for target in ("demo", "test"):
        assert f"make {target}" in readme
        assert re.search(rf"^{target}:", makefile, re.MULTILINE)


def test_every_error_has_an_entry_in_failure_patterns() -> None:
    text = (ROOT / "docs" / "failure-patterns.md").read_text()
    errors = [
        name
        for name, thing in vars(lateinit.errors).items()
        if inspect.isclass(thing) and issubclass(thing, lateinit.errors.LateinitError)
    ]
    assert [name for name in errors if name not in text] == []
