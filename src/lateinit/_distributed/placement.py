"""Where in the whole tensor the local part of a ``DTensor`` lies."""

from __future__ import annotations

from typing import Any

from lateinit._tensors.deferred import (
    held,
)
from lateinit.errors import ShardingError


def place_of(shard: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Where in the whole tensor the local part of a ``DTensor`` starts, and its shape."""
    # Imported by whoever made the shard, and long to import.
    from torch.distributed.tensor._utils import (  # noqa: PLC0415
        compute_local_shape_and_global_offset,
    )

    shape, start = compute_local_shape_and_global_offset(
        shard.shape, shard.device_mesh, shard.placements
    )
    if tuple(shape) != tuple(held(shard).shape):
        raise ShardingError(
            f"a shard {tuple(held(shard).shape)} of a tensor {tuple(shard.shape)}, sharded as "
            f"{shard.placements}, is no block of it: load before sharding"
        )
    return tuple(start), tuple(shape)
