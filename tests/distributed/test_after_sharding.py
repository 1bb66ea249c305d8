"""Law 9 for shards, by real processes: what is done to them after the block is done or refused."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch.distributed as dist

from tests.sharding.launch import launch

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch without torch.distributed")


@pytest.mark.parametrize("ranks", [1, 2])
def test_what_is_done_to_shards_is_done_or_refused(ranks: int, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    ended = launch("tests.sharding.after_block", ranks, tmp_path, str(folder), seconds=200)
    for rank in ended:
        assert rank.code == 0, rank.output
        assert "WRONG" not in rank.output, rank.output
        counted = re.search(r"'equal': (\d+)", rank.output)
        assert counted is not None, rank.output
        assert int(counted[1]) >= 60, rank.output
