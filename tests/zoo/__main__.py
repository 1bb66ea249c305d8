"""``python -m tests.zoo``: check every architecture and write the table of results."""

from __future__ import annotations

import argparse
import dataclasses
import fnmatch
import hashlib
import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from rich.console import Console

from tests.zoo import catalog, libraries
from tests.zoo.check import DIFFERENT, REFUSED, Outcome
from tests.zoo.pool import CONTEXT, CRASH, TIMEOUT, check_all
from tests.zoo.table import page, totals

if TYPE_CHECKING:
    from collections.abc import Sequence

ROOT = Path(__file__).parents[2]
STATE = ROOT / "build" / "zoo.json"
BAD = (DIFFERENT, REFUSED, TIMEOUT, CRASH)


def main(argv: Sequence[str] | None = None) -> int:
    options = parsed(argv)
    console = Console(stderr=True)
    every = [*catalog.model_types(), *libraries.architectures()]
    chosen = [t for t in every if fnmatch.fnmatchcase(t, options.only)]
    chosen = chosen[: options.limit]
    kept = {} if options.fresh else load(options.state)
    done = {t: kept[t] for t in chosen if t in kept}
    left = [t for t in chosen if t not in done]
    console.print(f"{len(chosen)} architectures, {len(done)} of them checked already")
    CONTEXT.set_forkserver_preload([check_all.__module__, "transformers"])
    started = time.perf_counter()
    for number, found in enumerate(
        check_all(left, options.jobs, options.seconds, options.threads), 1
    ):
        done[found[0].model_type] = found
        report(console, found, number, len(left), started)
        if number % 20 == 0 or number == len(left):
            save(options.state, kept | done)
    results = [outcome for t in chosen for outcome in done[t]]
    write(options, results, complete=len(chosen) == len(every))
    console.print(totals(results))
    return int(any(outcome.status in BAD for outcome in results))


def parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.zoo", description=__doc__)
    add = parser.add_argument
    add("--only", default="*", metavar="PATTERN", help="model types that match")
    add("--jobs", type=int, default=2, help="processes at a time")
    add("--threads", type=int, default=1, help="threads of torch in each process")
    add("--limit", type=int, default=None, metavar="N", help="the first N of them")
    add("--seconds", type=float, default=120.0, help="the most that one class may take")
    add("--fresh", action="store_true", help="check again what an earlier run has checked")
    add("--json", action="store_true", help="print the results as JSON")
    add("--table", type=Path, default=ROOT / "docs" / "zoo.md", metavar="PATH")
    add("--state", type=Path, default=STATE, metavar="PATH", help="where results are kept")
    return parser.parse_args(argv)


def report(console: Console, found: list[Outcome], number: int, total: int, started: float) -> None:
    for outcome in found:
        if outcome.status in BAD:
            console.print(
                f"{outcome.model_type} {outcome.name}: {outcome.status}: {outcome.detail}"
            )
    if number % 50 == 0:
        console.print(f"{number} of {total}, {time.perf_counter() - started:.0f} s")


def write(options: argparse.Namespace, results: list[Outcome], *, complete: bool) -> None:
    if options.json:
        sys.stdout.write(json.dumps([dataclasses.asdict(r) for r in results], indent=1) + "\n")
    if complete:
        options.table.parent.mkdir(parents=True, exist_ok=True)
        options.table.write_text(page(results))


def fingerprint() -> str:
    """What results depend on: an earlier run's are used again only where this is the same."""
    import transformers

    digest = hashlib.sha256(f"{torch.__version__} {transformers.__version__}".encode())
    files = [*(ROOT / "src").rglob("*.py"), *Path(__file__).parent.glob("*.py")]
    for path in sorted(files):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def load(path: Path) -> dict[str, list[Outcome]]:
    if not path.exists():
        return {}
    stored = json.loads(path.read_text())
    if stored["fingerprint"] != fingerprint():
        return {}
    return {t: [Outcome(**row) for row in rows] for t, rows in stored["results"].items()}


def save(path: Path, results: dict[str, list[Outcome]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = {t: [dataclasses.asdict(r) for r in found] for t, found in results.items()}
    text = json.dumps({"fingerprint": fingerprint(), "results": rows})
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text)
    temporary.replace(path)


if __name__ == "__main__":
    sys.exit(main())
