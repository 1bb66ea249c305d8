"""One rank reads a checkpoint for all, by real processes: only it can see the files."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest
import torch
import torch.distributed as dist
from torch import nn

import lateinit
from lateinit.errors import ShardingError
from tests.sharding import resuming
from tests.sharding.launch import launch
from tests.support.formats import FORMATS

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch without torch.distributed")

SOURCES = r"ShardingError: source_rank: 0 on rank 0; 1 on rank 1; 2 on rank 2: name one rank"
# What ranks 0, 1 and 2 see in those cases in which something goes wrong.
SEEN: dict[str, tuple[list[str], ...]] = {
    "a_misfit_on_one_rank": (
        [r"MismatchError: .*model\.safetensors has 3 parts that fit Linear"],
        [r"ShardingError: .* failed, planning, on rank 0: MismatchError"],
        [r"ShardingError: .* failed, planning, on rank 0: MismatchError"],
    ),
    "a_missing_file": (
        [r"failed, opening the checkpoint, on rank 1: Corrupt.*none\.pt does not exist"],
        [r"^CorruptCheckpointError: .*none\.pt does not exist"],
        [r"failed, opening the checkpoint, on rank 1: Corrupt.*none\.pt does not exist"],
    ),
    "another_source": ([SOURCES, "the ranks are 0 to 2"],) * 3,
}


def test_a_rank_sends_to_the_others_what_only_it_can_read(tmp_path: Path) -> None:
    hidden = tmp_path / resuming.HIDDEN
    hidden.mkdir()
    model = resuming.expected_block()
    lateinit.save_checkpoint(model, hidden / "model.safetensors")
    run = {"model": model.state_dict(), "optimizer": {"state": {0: {"step": torch.ones(())}}}}
    FORMATS["dcp"](run, hidden)
    FORMATS["pt"](run, hidden).rename(hidden / "run.pt")
    counting = resuming.Counting()
    counting.epoch = 7
    with torch.no_grad():
        counting.weight.fill_(3)
        counting.bias.fill_(3)
    torch.save(counting.state_dict(), hidden / "counting.pt")
    for rank, end in enumerate(
        launch("tests.sharding.resuming", 3, tmp_path, str(tmp_path), seconds=150)
    ):
        assert end.code == 0, end.output
        lines = [line.split(" | ") for line in end.output.splitlines() if " | " in line]
        assert [line[0] for line in lines] == list(resuming.CASES)
        for name, *seen, last in lines:
            wanted = SEEN[name][rank] if name in SEEN else []
            assert len(seen) == len(wanted), end.output
            for message, pattern in zip(seen, wanted, strict=True):
                assert re.search(pattern, message), message
            assert last == "right", (name, end.output)


def test_a_source_needs_a_process_group(tmp_path: Path) -> None:
    with pytest.raises(ShardingError, match=r"init_process_group\(\) on every rank first"):
        lateinit.load_checkpoint(nn.Linear(2, 2), tmp_path, source_rank=0)
    with pytest.raises(TypeError, match="source_rank: the number of a rank is meant"):
        lateinit.load_checkpoint(nn.Linear(2, 2), tmp_path, source_rank="0")  # type: ignore[arg-type]
