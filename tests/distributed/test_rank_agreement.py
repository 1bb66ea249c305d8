"""Law 3 by real processes, and what every rank says when one of them goes wrong."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.sharding.launch import launch

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch without torch.distributed")
EQUAL_AT_LEAST = 150


@pytest.mark.parametrize(("ranks", "every"), [(2, 8), (3, 16), (4, 24)])
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
    "placement": r"make different shards: 'up\.weight' is .*Shard\(dim=0\).* on rank 0, 2",
}


def lines_of(output: str) -> dict[str, str]:
    """What a rank printed for each way."""
    return dict(line.split(" | ", 1) for line in output.splitlines() if " | " in line)


def test_ranks_that_differ_all_say_so(tmp_path: Path) -> None:
    """They go on afterwards. A part that is gone takes its ops with it: other ranks have them."""
    ways = [*DIFFERENCES, "dropped"]
    ended = launch("tests.sharding.failing", 3, tmp_path, *ways, seconds=200)
    filled = set()
    for rank in ended:
        assert rank.code == 0, rank.output
        said = lines_of(rank.output)
        for way, message in DIFFERENCES.items():
            assert re.search(message, said[way]), rank.output
            assert "deferred still: True" in said[way]
        assert said["dropped"].startswith("filled: "), rank.output
        filled.add(said["dropped"])
    assert len(filled) == 1, filled


KERNELS = {
    "kernels": r"torch \S+, lateinit \S+, CPU capability \w+ on rank 0; .* DEFAULT on rank 1\. Use",
    "samples": r"a sample of 'normal_ in float32' is \w+ on rank 0; \w+ on rank 1\. Use one kind",
}


@pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() == "DEFAULT", reason="there are no other kernels"
)
def test_ranks_with_other_kernels_say_so(tmp_path: Path) -> None:
    said = torch.backends.cpu.get_cpu_capability()
    settings = {1: {"ATEN_CPU_CAPABILITY": "default", "SAID": said}}
    ended = launch(
        "tests.sharding.failing", 2, tmp_path, *KERNELS, "sent", seconds=120, settings=settings
    )
    for rank in ended:
        assert rank.code == 0, rank.output
        for way, message in KERNELS.items():
            found = lines_of(rank.output)[way]
            assert re.search(f"compute with different kernels.*{message}", found), found
            assert "deferred still: True" in found
        assert lines_of(rank.output)["sent"].startswith("loaded: "), rank.output


def test_a_rank_that_dies_is_missed_by_the_others(tmp_path: Path) -> None:
    ended = launch("tests.sharding.failing", 3, tmp_path, "death", seconds=120)
    assert ended[1].code == 3
    for rank in (ended[0], ended[2]):
        assert rank.code == 0, rank.output
        assert re.search(r"not all of the ranks 0, 1, 2 answered", rank.output), rank.output
