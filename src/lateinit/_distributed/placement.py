"""The place of a ``DTensor``'s local part in the full tensor."""

from __future__ import annotations

from typing import Any

from lateinit._tensors import held
from lateinit._torch import block_of_shard
from lateinit.errors import ShardingError


def place_of(shard: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Where in the full tensor the local part of a ``DTensor`` starts, and its shape.

    Raises:
        ShardingError: the local part is no block of the full tensor.
    """
    shape, start = block_of_shard(shard)
    # torch computes this for contiguous blocks only; for other placements (`_StridedShard`) its
    # answer can be wrong.
    if shape != tuple(held(shard).shape):
        raise ShardingError(
            f"a shard {tuple(held(shard).shape)} of a tensor {tuple(shard.shape)}, sharded as "
            f"{shard.placements}, is no block of it: load before sharding"
        )
    return start, shape
