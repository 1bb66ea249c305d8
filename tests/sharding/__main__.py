"""``python -m tests.sharding``: real processes, every model, every way to shard it."""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

from tests.sharding.launch import launch


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.sharding", description=__doc__)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 3, 4, 8])
    parser.add_argument("--architectures", type=int, default=20)
    parser.add_argument("--every", type=int, default=1)
    options = parser.parse_args()
    failed = 0
    for ranks in options.ranks:
        started = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            arguments = f"--every {options.every} --architectures {options.architectures}".split()
            worker = "tests.sharding.worker"
            ended = launch(worker, ranks, Path(folder), *arguments, seconds=3600)
        failed += sum(rank.code != 0 for rank in ended)
        for rank in ended:
            if rank.code != 0:
                sys.stdout.write(rank.output)
        last = ended[0].output.strip().splitlines()[-1:]
        sys.stdout.write(f"{ranks} ranks: {time.monotonic() - started:.0f} s; {''.join(last)}\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
