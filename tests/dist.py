"""``python -m tests.dist``: are the wheel and the sdist in dist/ whole, and do they work installed?

The wheel is installed where there is no compiler, the sdist with one and without. Each is tested
outside the checkout, in an environment that has only what it asks for, and pytest and hypothesis.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from rich.console import Console

if TYPE_CHECKING:
    from collections.abc import Sequence

ROOT = Path(__file__).parents[1]
DIST = ROOT / "dist"
CONSTRAINTS = ROOT / "constraints-dev.txt"
SMOKE = (
    *("tests/laws/test_parity.py", "tests/laws/test_load.py", "tests/native/test_kernels.py"),
    "tests/test_public.py",
)
# What only those need who work on the repository.
NOT_SHIPPED = {".ci", ".gitignore"}
console = Console()


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.dist", description=__doc__)
    parser.add_argument(
        "--python", nargs="+", default=[sys.executable], metavar="PATH", help="test with these"
    )
    options = parser.parse_args(argv)
    (wheel,), (sdist,) = sorted(DIST.glob("*.whl")), sorted(DIST.glob("*.tar.gz"))
    check_contents(wheel, sdist)
    check_with_tools(wheel, sdist)
    for python in options.python:
        with tempfile.TemporaryDirectory() as folder:
            check_installed(Environment(Path(folder), python), wheel, sdist)
    console.print(f"{wheel.name} and {sdist.name} are fit to be published")
    return 0


def check_contents(wheel: Path, sdist: Path) -> None:
    """Both hold the files that git has, the wheel its extension, and nothing else."""
    tracked = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout.splitlines()
    code = {name.removeprefix("src/") for name in tracked if name.startswith("src/")}
    expected = {name for name in code if not name.endswith(".c")}
    expected.add("lateinit/_native/_kernels.abi3.so")
    with zipfile.ZipFile(wheel) as file:
        names = {name for name in file.namelist() if not name.endswith("/")}
    about = {name for name in names if PurePosixPath(name).parts[0].endswith(".dist-info")}
    assert {"licenses/LICENSE", "METADATA"} <= {name.partition("/")[2] for name in about}
    compare(wheel, names - about, expected)
    with tarfile.open(sdist) as file:
        members = {member.name.partition("/")[2] for member in file if member.isfile()}
    made = {name for name in members if ".egg-info/" in name} | {"PKG-INFO", "setup.cfg"}
    shipped = {name for name in tracked if name.partition("/")[0] not in NOT_SHIPPED}
    compare(sdist, members - made, shipped)


def compare(path: Path, found: set[str], expected: set[str]) -> None:
    for wrong, names in (("lacks", expected - found), ("should not hold", found - expected)):
        if names:
            raise SystemExit(f"{path.name} {wrong} {', '.join(sorted(names))}")


def check_with_tools(wheel: Path, sdist: Path) -> None:
    """Metadata, the stable ABI, and the usual mistakes in wheels."""
    for tool in (
        ("twine", "check", "--strict", wheel, sdist),
        ("abi3audit", "--strict", wheel),
        ("check-wheel-contents", wheel),
    ):
        subprocess.run([Path(sys.executable).parent / tool[0], *tool[1:]], check=True)


class Environment:
    """A fresh environment in a folder, and a copy of the tests in which no source can be found."""

    def __init__(self, folder: Path, python: str) -> None:
        self.python, self.copy = folder / "env" / "bin" / "python", folder / "copy"
        subprocess.run([python, "-m", "venv", folder / "env"], check=True)
        # Everything that runs here is in the environment, and no compiler is.
        self.alone = {**os.environ, "PATH": str(self.python.parent), "CC": "/bin/false"}
        self.alone.pop("PYTHONPATH", None)
        self.with_compiler = {**self.alone, "PATH": os.environ["PATH"]}
        del self.with_compiler["CC"]
        self.copy.mkdir()
        skipped = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / "tests", self.copy / "tests", ignore=skipped)
        for name in ("pyproject.toml", "benchmarks"):
            copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
            copy(ROOT / name, self.copy / name)

    def run(self, *arguments: str | Path, variables: dict[str, str]) -> str:
        command = [self.python, *arguments]
        done = subprocess.run(
            command, cwd=self.copy, env=variables, capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise SystemExit(f"{command}\n{done.stdout}\n{done.stderr}")
        return done.stdout

    def install(self, *what: str | Path, variables: dict[str, str]) -> None:
        self.run("-m", "pip", "install", "-q", "-c", CONSTRAINTS, *what, variables=variables)

    def smoke(self, what: str, variables: dict[str, str], *, native: bool) -> None:
        """Run the tests, and find the native kernels used or not."""
        info = json.loads(self.run("-m", "lateinit", "info", "--json", variables=variables))
        used = any(kernel["used"] for kernel in info["native"].values())
        if used is not native:
            raise SystemExit(f"{what}: native kernels are {'' if used else 'not '}used: {info}")
        place = self.run("-c", "import lateinit; print(lateinit.__file__)", variables=variables)
        assert Path(place).is_relative_to(self.python.parents[1]), place
        said = self.run("-m", "pytest", "-q", "--quick", *SMOKE, variables=variables)
        versions = f"Python {info['versions']['python']}, torch {info['versions']['torch']}"
        console.print(f"{what}: {versions}: {said.splitlines()[-1]}")


def check_installed(env: Environment, wheel: Path, sdist: Path) -> None:
    env.install(wheel, "pytest", "hypothesis", variables=env.alone)
    env.smoke("wheel, no compiler", env.alone, native=True)
    again = ("--force-reinstall", "--no-deps", sdist)
    env.install(*again, variables=env.with_compiler)
    env.smoke("sdist, with a compiler", env.alone, native=True)
    env.install(*again, variables=env.alone)
    env.smoke("sdist, no compiler", env.alone, native=False)


if __name__ == "__main__":
    sys.exit(main())
