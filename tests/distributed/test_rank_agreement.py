"""Law 3 by real processes, and what every rank says when one of them goes wrong."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

from tests.sharding.launch import ROOT, launch

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch without torch.distributed")
EQUAL_AT_LEAST = 150


@pytest.mark.parametrize(("ranks", "every"), [(2, 4), (3, 8), (4, 12)])
def test_models_sharded_by_real_processes(ranks: int, every: int, tmp_path: Path) -> None:
    options = ("--every", str(every), "--architectures", "4" if ranks == 2 else "0")
    ended = launch("tests.sharding.worker", ranks, tmp_path, *options, seconds=400)
    for rank in ended:
        assert rank.code == 0, rank.output
        equal = re.search(r"(\d+) equal", rank.output)
        assert equal is not None
        assert int(equal[1]) > EQUAL_AT_LEAST // ranks


DIFFERENCES = {
    "seed": r"from different random states: seed 0 on rank 0, 2; seed 1 on rank 1\. Call",
    "asked seed": r"random states: seed=0 on rank 0; seed=1 on rank 1; seed=2 on rank 2",
    "op": r"different constructions, first at op \d+: .* on rank 0, 2; zero_\(.*\) on rank 1",
    "model": r"different constructions, first at op \d+: .*x64.* on rank 0, 2; .*x48",
    "placement": r"shard the model differently: 'up\.weight' is .*Shard\(dim=0\).* on rank 0, 2",
}


@pytest.mark.parametrize("way", DIFFERENCES)
def test_ranks_that_differ_all_say_so(way: str, tmp_path: Path) -> None:
    for rank in launch("tests.sharding.failing", 3, tmp_path, way, seconds=120):
        assert rank.code == 0, rank.output
        assert re.search(DIFFERENCES[way], rank.output), rank.output
        assert "deferred still: True" in rank.output


def test_ranks_may_drop_other_parts_of_one_construction(tmp_path: Path) -> None:
    """A part that is gone takes its ops with it, and the other ranks still have them."""
    ended = launch("tests.sharding.failing", 3, tmp_path, "dropped", seconds=120)
    filled = {re.findall(r"filled: .*", rank.output)[0] for rank in ended}
    assert len(filled) == 1, filled


def test_a_rank_that_dies_is_missed_by_the_others(tmp_path: Path) -> None:
    ended = launch("tests.sharding.failing", 3, tmp_path, "death", seconds=120)
    assert ended[1].code == 3
    for rank in (ended[0], ended[2]):
        assert rank.code == 0, rank.output
        assert re.search(r"not all of the ranks 0, 1, 2 answered", rank.output), rank.output


def test_the_example_trains() -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "examples/fsdp_gpt.py"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "step 1: loss" in done.stdout
