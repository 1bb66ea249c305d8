"""``python -m benchmarks``: run the cases, print one table, leave the results in ``docs/``."""

from __future__ import annotations

import argparse
import fnmatch
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks import loading, materialize, native
from benchmarks.clusters import clusters
from benchmarks.construction import construction
from benchmarks.harness import ROOT, Goal, Row, Run, machine
from benchmarks.importing import importing
from benchmarks.lazy import architectures, inference
from benchmarks.materialize import against_eager
from benchmarks.reading import reading
from benchmarks.report import as_json, cells, table, write
from benchmarks.sharding import sharding
from benchmarks.small_modules import MODELS, growth, small_modules
from lateinit._terminal import Console

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

CASES: dict[str, Callable[[Run], list[Row]]] = {
    "construct-gpt2-xl": construction("gpt2_xl"),
    "construct-llama-70b": construction("llama_70b"),
    "construct-linears": construction("linears"),
    "construct-resnet-152": construction("resnet_152"),
    "infer-resnet-50": inference("resnet-50", None),
    "infer-architectures": architectures,
    "infer-gpt-1.6b": inference("gpt-1.6b", Goal(20, faster=True)),
    "linears": against_eager("linears", 3.0),
    "gpt2-medium": against_eager("gpt2_medium", 7.0),
    "llama-300m": against_eager("llama_300m", 3.0),
    "vit-erfinv": against_eager("vit_erfinv", 2.0),
    "vit-trunc-normal": against_eager("vit_wide", 2.5),
    "vit-trunc-normal-redrawn": against_eager("vit_narrow", 4.0),
    "recording-trunc-normal": materialize.recording,
    "an-eighth": materialize.an_eighth,
    "threads": materialize.threads,
    "fill-rate": materialize.fill_rate,
    "native-warm": native.warm,
    "native-fresh": native.fresh,
    "native-columns": native.columns,
    "native-describing": native.describing,
    "native-bfloat16": native.half,
    "peak-memory": materialize.peak_memory,
    "load": loading.loading,
    "write": loading.writing,
    "tiny-model": materialize.tiny_model,
    "sharding": sharding,
    "reading-shards": reading,
    "clusters": clusters,
    **{f"small-modules-{name}": small_modules(name) for name in MODELS},
    "small-modules-growth": growth,
    "import": importing,
}


def main(argv: Sequence[str] | None = None) -> int:
    options = parsed(argv)
    console = Console(stderr=True)
    names = [name for name in CASES if fnmatch.fnmatchcase(name, options.case)]
    if not names:
        console.print(f"no case is called {options.case}; there are: {', '.join(CASES)}")
        return 2
    rows = []
    for name in names:
        started = time.perf_counter()
        found = CASES[name](Run(tiny=options.quick, rounds=options.rounds))
        rows += found
        for row in found:
            console.print(f"  {' | '.join(cells(row))} {row.note}", highlight=False)
        console.print(f"{name}: {time.perf_counter() - started:.0f} s")
    Console(width=160 if not sys.stdout.isatty() else None).print(table(rows))
    if options.json is not None:
        options.json.write_text(as_json(rows, machine()))
    if len(names) == len(CASES) and not options.quick:
        write(rows, machine(), options.docs)
    return 0


def parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    add = parser.add_argument
    add("--quick", action="store_true", help="tiny models, once: are the values right?")
    add("--case", default="*", metavar="PATTERN", help=f"some of {', '.join(CASES)}")
    add("--rounds", type=int, default=3, help="how often each way is timed")
    add("--json", type=Path, metavar="PATH", help="write the results here as JSON")
    add("--docs", type=Path, default=ROOT / "docs", metavar="FOLDER", help="where a full run goes")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
