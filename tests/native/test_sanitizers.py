"""The C code reads and writes no byte that is not its own, and has no undefined behaviour."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from lateinit import _native

SOURCE = Path(_native.__file__).parent / "kernels.c"
DRIVER = Path(__file__).parent / "sanitized.py"
COMPILER = shutil.which("gcc")
# As pyproject.toml has them, but for the level of optimisation: the build takes less time.
FLAGS = ("-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-fPIC", "-shared")
WARNINGS = ("-Wall", "-Wextra", "-Werror")
CHECKED = ("-O1", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")

compiled = pytest.mark.skipif(
    COMPILER is None or not (Path(sysconfig.get_path("include")) / "Python.h").exists(),
    reason="needs gcc and Python's headers",
)


def built(source: Path, folder: Path, *flags: str) -> Path:
    library = folder / "_kernels.abi3.so"
    include = f"-I{sysconfig.get_path('include')}"
    command = [str(COMPILER), *FLAGS, *WARNINGS, *flags, include, str(source), "-o", str(library)]
    subprocess.run([*command, "-lm"], check=True)
    return library


def driven(library: Path) -> subprocess.CompletedProcess[str]:
    """The driver's run; the sanitizer's library has to be there before Python is."""
    found = subprocess.run(
        [str(COMPILER), "-print-file-name=libasan.so"], capture_output=True, text=True, check=True
    )
    settings = {
        "LD_PRELOAD": found.stdout.strip(),
        "ASAN_OPTIONS": "detect_leaks=0",  # the interpreter keeps memory to its end
        "PYTHONMALLOC": "malloc",
    }
    return subprocess.run(
        [sys.executable, "-S", str(DRIVER), str(library)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **settings},
    )


@compiled
def test_sanitizers_find_nothing(tmp_path: Path) -> None:
    done = driven(built(SOURCE, tmp_path, *CHECKED))
    assert done.returncode == 0, done.stderr


@compiled
def test_sanitizers_would_find_a_write_past_the_end(tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.c"
    text = SOURCE.read_text()
    assert text.count("out[at + i] = value == high ? low : value;") == 1
    wrong.write_text(text.replace("out[at + i] = value", "out[at + i + 1] = value"))
    done = driven(built(wrong, tmp_path, "-O0", "-fsanitize=address"))
    assert done.returncode != 0
    assert "heap-buffer-overflow" in done.stderr
