"""Ranks that fail, differ, are lost or try again, by real processes."""

from __future__ import annotations

import inspect
import os
import re
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
import torch
import torch.distributed as dist
from torch import nn

import lateinit
from lateinit._distributed import ranks_of
from lateinit._tensors import shards_in
from tests.sharding import arguments, faults, together
from tests.sharding.alone import alone_as
from tests.sharding.launch import launch
from tests.sharding.placements import Block, fsdp, line
from tests.support import processes

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch without torch.distributed")


def checkpoints(folder: Path) -> Path:
    """Files that the cases load: two of all tensors, and one of a part of them."""
    for name, seed in (("model", together.SEED), ("other", 4)):
        torch.manual_seed(seed)
        lateinit.save_checkpoint(lateinit.deferred_init(Block), folder / f"{name}.safetensors")
    torch.manual_seed(together.SEED)
    part = lateinit.deferred_init(Block)
    del part.norm, part.down
    lateinit.save_checkpoint(part, folder / "part.safetensors")
    return folder


PLACES = "the ranks are not in the same call: in materialize\\(\\), {}, on rank 0; in {}, on rank 1"
AGAIN = PLACES.format("filling shards", "materialize\\(\\), preparing")
OTHER = PLACES.format("preparing", "load_checkpoint\\(\\), planning")
STATES = r"from different random states: seed {} on rank 0; seed.{} on rank 1\. Call torch"
FILES = (
    r"load different tensors: 7 tensors in [\d,]+ bytes .*\) on rank 0; 7 tensors .* on rank 1\. "
)
# What ranks 0 and 1 see; then both have the right values.
SEEN: dict[str, tuple[list[str], list[str]]] = {
    "a_failure_in_the_middle": (
        [r"materialize\(\) failed, filling shards, on rank 1: OSError: no such luck\. What is"],
        ["OSError: no such luck"],
    ),
    "a_file_that_ends_in_the_middle": (
        [r"load_checkpoint\(\) failed, loading, on rank 1: OSError: the disk is gone\. "],
        ["OSError: the disk is gone"],
    ),
    "a_missing_file": (
        [r"load_checkpoint\(\) failed, planning, on rank 1: CorruptCheckpointError: .*not exist"],
        ["CorruptCheckpointError: .* does not exist"],
    ),
    "a_wrong_pattern": (
        [r"materialize\(\) failed, preparing, on rank 1: PatternError: only='\*\.wait' matches"],
        [r"PatternError: only='\*\.wait' matches no tensor"],
    ),
    "an_interrupt": ([AGAIN], ["KeyboardInterrupt", AGAIN]),
    "another_call": ([OTHER], [OTHER]),
    "no_question": ([], []),
    "nothing_is_left": ([], []),
    "other_files": ([FILES], [FILES]),
    "what_is_left_differs": (
        [r"failed, filling shards, on rank 1: OSError", STATES.format("3", "9")],
        ["OSError", STATES.format("3", "9")],
    ),
    "what_the_file_lacks_differs": ([STATES.format("3", "5")], [STATES.format("3", "5")]),
}
HEARD = r"materialize\(\) failed, filling shards, on rank 1: OSError: no such luck"
ON_FOUR: dict[str, tuple[list[str], ...]] = {
    "stages": ([HEARD], ["OSError"], [], []),
    "two_axes": ([HEARD], ["OSError"], [HEARD], [HEARD]),
}


@pytest.mark.parametrize(("ranks", "expected"), [(2, SEEN), (4, ON_FOUR)], ids=["two", "four"])
def test_what_goes_wrong_on_one_rank_is_heard_on_all_and_can_be_tried_again(
    ranks: int, expected: dict[str, tuple[list[str], ...]], tmp_path: Path
) -> None:
    folder = checkpoints(tmp_path)
    ended = launch("tests.sharding.together", ranks, tmp_path, str(folder), seconds=200)
    for rank, end in enumerate(ended):
        assert end.code == 0, end.output
        lines = [line.split(" | ") for line in end.output.splitlines() if " | " in line]
        assert [line[0] for line in lines] == list(expected)
        for name, *seen, last in lines:
            wanted = expected[name][rank]
            assert len(seen) == len(wanted), end.output
            for message, pattern in zip(seen, wanted, strict=True):
                assert re.search(pattern, message), message
            assert last == "right", name


REFUSED = (
    "ShardingError: the ranks (make different shards|load different tensors|recorded different "
    "constructions|recorded the construction from different random states|were given different "
    "arguments)"
)


def test_an_argument_that_differs_between_ranks_is_refused_on_all_before_anything_changes(
    tmp_path: Path,
) -> None:
    arguments.checkpoint(tmp_path)
    for end in launch("tests.sharding.arguments", 2, tmp_path, str(tmp_path), seconds=200):
        assert end.code == 0, end.output
        lines = [line.split(" | ") for line in end.output.splitlines() if " | " in line]
        assert [line[0] for line in lines] == list(arguments.CASES)
        for name, *seen in lines:
            assert re.match(REFUSED, seen[0]), (name, seen)
            assert seen[1:] == ["", "right"], (name, seen)
    assert not list(tmp_path.glob("saved*"))


@pytest.mark.parametrize("function", sorted(arguments.DIFFERENT))
def test_for_every_argument_it_is_said_whether_ranks_may_differ_in_it(function: str) -> None:
    parameters = inspect.signature(getattr(lateinit, function)).parameters.values()
    keywords = {p.name for p in parameters if p.kind is p.KEYWORD_ONLY}
    must, may = arguments.DIFFERENT[function].keys(), arguments.MAY_DIFFER[function]
    assert must | may == keywords
    assert not must & may


def test_the_shards_that_patterns_select_are_asked_for_and_no_function_is_called() -> None:
    def never(name: str, tensor: torch.Tensor) -> bool:
        raise AssertionError(name, tensor)

    with alone_as(0, 2):
        with lateinit.deferred():
            model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
        fsdp(model, line(2))
        every = set(shards_in(model, None))
        assert every == {"0.weight", "0.bias", "1.weight", "1.bias"}
        assert set(shards_in(model, ["*.bias"])) == {"0.bias", "1.bias"}
        assert set(shards_in(model, "nothing")) == set(shards_in(model, never)) == every
        assert not ranks_of(model, "materialize()")  # nobody is behind a fake group
        lateinit.materialize(model)
        assert set(shards_in(model, None)) == every


PREPARING = r"{}, preparing: not all of the ranks 0, 1, 2 answered"
WRITING = r"save_checkpoint\(\), writing shards: not all ranks answered"
LOST = {
    "killed filling": r"materialize\(\), filling shards: not all of the ranks 0, 1, 2 answered",
    "killed loading": r"load_checkpoint\(\), loading: not all of the ranks 0, 1, 2 answered",
    "killed publishing": WRITING,
    "killed saving": WRITING,
    "killed saving later": WRITING,
    "killed saving whole files": WRITING,
    "never arrives": PREPARING.format(r"materialize\(\)"),
    "never arrives to save": PREPARING.format(r"save_checkpoint\(\)"),
}


def test_a_rank_that_is_lost_is_missed_in_time_by_the_others_and_breaks_no_checkpoint(
    tmp_path: Path,
) -> None:
    folder = checkpoints(tmp_path)
    command = [sys.executable, "-m", "tests.sharding.faults", str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        cwd=processes.ROOT,
        env=environment,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    lines = [line.split(" | ") for line in done.stdout.splitlines()]
    assert [name for name, *_ in lines] == list(faults.WAYS) == list(LOST)
    for name, codes, left in lines:
        culprit = faults.WAYS[name].culprit
        seen = [(folder / f"{name} {rank}").read_text() for rank in range(faults.RANKS)]
        assert codes.split() == ["03"[rank == culprit] for rank in range(faults.RANKS)], seen
        assert left == "earlier", name
        for rank, text in enumerate(seen):
            wanted = "^$" if rank == culprit else f"lost: {LOST[name]}(.|\n)*in time: True"
            assert re.search(wanted, text), (name, text)
