"""Where in the whole tensor the local part of a ``DTensor`` lies."""

from __future__ import annotations

from typing import Any

from lateinit._tensors.slots import held
from lateinit._torch.wrappers import block_of_shard
from lateinit.errors import ShardingError


def place_of(shard: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Where in the whole tensor the local part of a ``DTensor`` starts, and its shape.

    Raises:
        ShardingError: the local part is no block of the whole.
    """
    shape, start = block_of_shard(shard)
    if shape != tuple(held(shard).shape):
        raise ShardingError(
            f"a shard {tuple(held(shard).shape)} of a tensor {tuple(shard.shape)}, sharded as "
            f"{shard.placements}, is no block of it: load before sharding"
        )
    return start, shape
