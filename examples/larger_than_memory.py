"""A checkpoint of a model larger than memory: written, and proven bit for bit, by the command.

Each process may ask the system for 500 MB (``RLIMIT_DATA``; Python and torch take part of it). The
model has 805 MB.
"""

import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

from torch import nn

LIMIT = 500_000_000


def build() -> nn.Module:
    """The model, for the command: 48 layers of 16.8 MB."""
    return nn.Sequential(*(nn.Linear(2048, 2048) for _ in range(48)))


def limited(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Python with no more memory than LIMIT."""
    return subprocess.run(  # noqa: S603 - the commands are those below
        [sys.executable, *arguments],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_DATA, (LIMIT, LIMIT)),
        env={**os.environ, "OMP_NUM_THREADS": "1"},  # the stack of each thread would count too
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )


def main() -> None:
    """Fail eagerly, write deferred, and compare what was written with the seed."""
    eager = limited("-c", f"import {Path(__file__).stem} as example; example.build()")
    assert "can't allocate memory" in eager.stderr, eager.stderr
    print(f"limit {LIMIT / 1e6:.0f} MB; eager construction:", eager.stderr.splitlines()[-1])
    spec = f"{Path(__file__).name}:build"
    with tempfile.TemporaryDirectory() as folder:
        output = str(Path(folder, "checkpoint"))
        for options in (
            ["init", spec, "--seed", "0", "--output", output, "--max-shard-size", "200MB"],
            ["check", spec, "--seed", "0", "--checkpoint", output],
        ):
            done = limited("-m", "lateinit", *options)
            assert done.returncode == 0, done.stderr
            shown = f"$ lateinit {' '.join(options)}\n{done.stdout}"
            print(shown.replace(f"{folder}/", ""), end="")
        size = sum(path.stat().st_size for path in Path(output).iterdir())
        assert size > 1.5 * LIMIT
    print(f"equal to eager: a checkpoint of {size / 1e6:.0f} MB, by processes of {LIMIT / 1e6:.0f}")


if __name__ == "__main__":
    main()
