"""What one rank reads of a checkpoint that it loads its shards from, with nothing cached.

As a module of its own it plays the last rank in a fresh process, with a process group that sends
nothing: ``python -m benchmarks.reading CUT RANKS PATH [tiny]`` prints the bytes that were read from
the disk (``/proc/self/io``), the growth of the resident memory, and a digest of the shards, as
JSON.
"""

from __future__ import annotations

import gc
import hashlib
import json
import os
import sys
import tempfile
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_module, distribute_tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

import lateinit
from benchmarks.contenders import deferred
from benchmarks.harness import MB, Goal, Row, Run, bytes_of, in_process
from benchmarks.memory import forget, highest, resident
from benchmarks.models import gpt2
from benchmarks.sharding import shard

if TYPE_CHECKING:
    from torch import nn
    from torch.distributed.device_mesh import DeviceMesh

CASES = (("rows", 2), ("rows", 8), ("columns", 8))
WITHIN = 1.1
WORKING_SET = 64 * MB
COUNTERS = Path("/proc/self/io")


def reading(run: Run) -> list[Row]:
    """The last rank of 2 and 8, from each format, against its share."""
    if not COUNTERS.exists():
        return []
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:  # /tmp may be memory
        for path in written(Path(folder), tiny=run.tiny)[: 1 if run.tiny else None]:
            for cut, ranks in CASES[-1:] if run.tiny else CASES:
                size = ["tiny"] if run.tiny else []
                found = in_process("benchmarks.reading", cut, str(ranks), str(path), *size)
                case = f"gpt2 as {path.suffix or path.name}, {cut}, 1 of {ranks}"
                rows += against_share(case, found)
    return rows


def against_share(case: str, found: dict[str, Any]) -> list[Row]:
    assert found["equal"], "a shard differs from that part of the file"
    share, read, peak = (found[what] / MB for what in ("share", "read", "peak"))
    # Pieces of a row that are shorter than 16 KB are read with the whole row.
    goal = Goal(WITHIN) if "rows" in case else None
    limit = share * WITHIN + WORKING_SET / MB
    memory = Row(case, "peak memory to load", [peak], "its share + 64 MB", [limit], "MB", Goal(1.0))
    return [Row(case, "read", [read], "its share", [share], "MB", goal, equal=True), memory]


def written(folder: Path, *, tiny: bool) -> list[Path]:
    """The same values in each format."""
    torch.manual_seed(0)
    state = {name: t.detach() for name, t in model(tiny=tiny).state_dict().items()}
    paths = [folder / name for name in ("model.safetensors", "model.pt", "dcp")]
    save_file({name: t.clone() for name, t in state.items()}, paths[0])
    torch.save(state, paths[1])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that no process group is there
        dcp.save(state, checkpoint_id=paths[2], no_dist=True)
    return paths


def model(*, tiny: bool) -> nn.Module:
    return gpt2(1024, 10, 16, tiny=tiny)


def cut_columns(model: nn.Module, mesh: DeviceMesh) -> None:
    """Cut the last dim of each parameter."""

    def cut(_: str, module: nn.Module, mesh: DeviceMesh) -> None:
        for name, p in list(module._parameters.items()):
            if p is not None:
                part = distribute_tensor(p, mesh, [Shard(p.dim() - 1)], src_data_rank=None)
                module.register_parameter(name, torch.nn.Parameter(part))

    distribute_module(model, mesh, cut)


def files_of(path: Path) -> list[Path]:
    return [path] if path.is_file() else list(path.iterdir())


def drop(path: Path) -> None:
    """Have the system forget the data of files."""
    for file in files_of(path):
        number = os.open(file, os.O_RDONLY)
        os.fsync(number)
        os.posix_fadvise(number, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(number)


def read_bytes() -> int:
    lines = dict(line.split(": ") for line in COUNTERS.read_text().splitlines())
    return int(lines["read_bytes"])


def main(cut: str, ranks: str, path: str, size: str = "") -> None:
    torch.set_num_threads(1)
    count, tiny = int(ranks), size == "tiny"
    dist.init_process_group("fake", rank=count - 1, world_size=count, store=FakeStore())
    mesh = init_device_mesh("cpu", (count,))
    cuts = {"rows": shard, "columns": cut_columns}[cut]
    late = deferred(lambda: model(tiny=tiny))
    cuts(late, mesh)
    with tempfile.TemporaryDirectory() as folder:  # imports what is imported late
        for warm in written(Path(folder), tiny=True):
            small = deferred(lambda: model(tiny=True))
            cuts(small, mesh)
            lateinit.load_checkpoint(small, warm, check=False)
    drop(Path(path))
    gc.collect()
    forget()
    before, found = read_bytes(), resident()
    lateinit.load_checkpoint(late, path, check=False)
    read, peak = read_bytes() - before, highest() - found
    ours = {name: p.to_local() for name, p in late.named_parameters()}
    right = model(tiny=tiny)
    lateinit.load_checkpoint(right, path)
    cuts(right, mesh)
    theirs = {name: p.to_local() for name, p in right.named_parameters()}
    digests = [
        [hashlib.sha256(bytes_of(p)).hexdigest() for p in found.values()]
        for found in (ours, theirs)
    ]
    # Tied tensors are stored twice in some formats, and compared.
    share = sum(file.stat().st_size for file in files_of(Path(path))) / count
    result = {"read": read, "peak": peak, "share": share, "equal": digests[0] == digests[1]}
    sys.stdout.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
