"""Shards, ranks and meshes: which part of a tensor a rank holds, and whether the ranks agree.

The room gives ``_materialize`` the flat ranges of a shard (``shard_ranges``) and the agreement of
ranks (``rank_agreement``), ``_checkpoint`` the place of a shard in its tensor (``placement``),
``_report`` the cost of a mesh (``mesh_cost``) and a reader of flat ranges. It may import
``_tensors`` and everything below that, but not ``_recording``, its neighbour. Start with
``shard_ranges.py``.
"""

from lateinit._distributed.placement import Part, parts_of, refuse_sums, whole_part
from lateinit._distributed.rank_agreement import Agreement
from lateinit._distributed.ranks import (
    Arguments,
    Ranks,
    answered,
    by_words,
    every_rank,
    is_running,
    ranks_of,
)
from lateinit._distributed.shard_ranges import (
    Box,
    FlatReader,
    Shard,
    groups,
    reads_nothing,
    run_leaves,
    shards_of,
)

__all__ = [
    "Agreement",
    "Arguments",
    "Box",
    "FlatReader",
    "Part",
    "Ranks",
    "Shard",
    "answered",
    "by_words",
    "every_rank",
    "groups",
    "is_running",
    "parts_of",
    "ranks_of",
    "reads_nothing",
    "refuse_sums",
    "run_leaves",
    "shards_of",
    "whole_part",
]
