"""Each rank writes its shards, by real processes."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest
import torch.distributed as dist
from torch import nn

import lateinit
from lateinit.errors import CheckpointError, ShardingError
from tests.sharding import saving
from tests.sharding.launch import launch

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch without torch.distributed")

FULL = r"failed, writing shards, .*on rank 1: .*File too large"
STATES = "from different random states"
# What each rank sees in those cases in which something goes wrong.
SEEN: dict[str, list[str]] = {
    "a_full_disk": [FULL, FULL, FULL],
    "another_seed_on_one_rank": [STATES],
    "one_file": [r"CheckpointError: .*one\.safetensors: shards are written into a folder"],
    "over_an_earlier_one": [r"rows exists: overwrite it with force=True"],
}


@pytest.mark.parametrize("ranks", [2, 4])
def test_shards_are_written_by_their_ranks_and_appear_together(ranks: int, tmp_path: Path) -> None:
    cases = saving.ON_FOUR if ranks == 4 else saving.CASES
    for end in launch("tests.sharding.saving", ranks, tmp_path, str(tmp_path), seconds=200):
        assert end.code == 0, end.output
        lines = [line.split(" | ") for line in end.output.splitlines() if " | " in line]
        assert [line[0] for line in lines] == list(cases)
        for name, *seen, last in lines:
            wanted = SEEN.get(name, [])
            assert len(seen) == len(wanted), end.output
            for message, pattern in zip(seen, wanted, strict=True):
                assert re.search(pattern, message), message
            assert last == "right", (name, end.output)


def test_a_whole_module_is_written_by_dcp_without_a_process_group(tmp_path: Path) -> None:
    model = lateinit.deferred_init(nn.Linear, 4, 2)
    assert lateinit.save_checkpoint(model, tmp_path / "dcp", format="dcp").files[0] == ".metadata"
    other = lateinit.deferred_init(nn.Linear, 4, 2)
    lateinit.load_checkpoint(other, tmp_path / "dcp")
    assert lateinit.materialize(model).weight.equal(other.weight)
    with pytest.raises(ShardingError, match="wait=False: there is no process group"):
        lateinit.save_checkpoint(model, tmp_path / "later", format="dcp", wait=False)
    with pytest.raises(CheckpointError, match="wait=False is for a module with shards"):
        lateinit.save_checkpoint(model, tmp_path / "later", wait=False)
    with pytest.raises(ValueError, match=r"format='pt': 'dcp' or 'safetensors' is meant"):
        lateinit.save_checkpoint(model, tmp_path / "later", format="pt")  # type: ignore[arg-type]


def test_the_group_of_a_save_in_the_background_has_ended_when_its_result_is_known(
    tmp_path: Path,
) -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model = saving.sharded_block()
        groups = list(dist.distributed_c10d._world.pg_map)
        for number in range(5):
            lateinit.save_checkpoint(model, tmp_path / str(number), wait=False).result(60)
            assert list(dist.distributed_c10d._world.pg_map) == groups
    finally:
        dist.destroy_process_group()
