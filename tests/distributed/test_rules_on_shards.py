"""Law 3 under ``init=``, by real processes: shards have the bits of the whole tensor."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch.distributed as dist

from tests.sharding.launch import launch

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch without torch.distributed")


def test_rules_act_on_whole_tensors_whatever_a_rank_holds(tmp_path: Path) -> None:
    for rank in launch("tests.sharding.init_rules", 2, tmp_path, str(tmp_path), seconds=120):
        assert rank.code == 0, rank.output
        assert "WRONG" not in rank.output, rank.output
        assert rank.output.count("equal") == 4, rank.output
        assert rank.output.count("refused") == 2, rank.output
