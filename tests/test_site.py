"""The site: what would lead a reader astray fails its build. `make docs` builds the real one."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import lateinit

pytest.importorskip("mkdocs", reason="needs the extra `docs`")
ROOT = Path(__file__).parents[1]
SOURCE = Path(lateinit.__file__).parents[1]

FAULTS = """
[a page](checkpoint.md), [a heading](lazy.md#difference), [an example](../examples/part.py),
[a name][lateinit.materialise], ![a picture](https://example.org/picture.png)
"""


@pytest.fixture
def pages(tmp_path: Path) -> Path:
    """A copy of all that the site is made from."""
    for folder in ("docs", "examples"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    for path in [ROOT / "mkdocs.yml", *ROOT.glob("*.md")]:
        shutil.copy(path, tmp_path)
    (tmp_path / "src").symlink_to(SOURCE)
    return tmp_path


def test_what_leads_nowhere_or_elsewhere_fails_the_build(pages: Path) -> None:
    with (pages / "docs" / "lazy.md").open("a") as page:
        page.write(FAULTS)
    (pages / "docs" / "forgotten.md").write_text("# In no menu\n")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict"],
        cwd=pages,
        env={**os.environ, "PYTHONPATH": str(SOURCE), "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0
    for warning in (
        'not included in the "nav" configuration:\n  - docs/forgotten.md\n',
        "contains a link 'checkpoint.md', but the target",
        "contains a link 'lazy.md#difference', but there is no such anchor",
        "contains a link '../examples/part.md', but the target",
        "Could not find cross-reference target 'lateinit.materialise'",
        'fetches from another host: <img alt="a picture" src="https://example.org/',
    ):
        assert warning in done.stderr
    assert "Aborted with 6 warnings in strict mode" in done.stdout
