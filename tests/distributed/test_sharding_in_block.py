"""Law 3 for models that are sharded inside the block, by real processes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch.distributed as dist

from tests.sharding.launch import launch

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch without torch.distributed")


def test_a_model_is_sharded_inside_the_block_or_told_to_be_sharded_after_it(
    tmp_path: Path,
) -> None:
    from tests.sharding.in_block import REFUSED

    for rank in launch("tests.sharding.in_block", 2, tmp_path, seconds=200):
        assert rank.code == 0, rank.output
        assert re.search(r"^23 checks, 0 wrong$", rank.output, re.MULTILINE), rank.output
        for act, words in REFUSED.items():
            assert re.search(f"{act.__name__}: .*{words}", rank.output), rank.output
