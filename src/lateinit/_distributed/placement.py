"""The place of a ``DTensor``'s local part in the full tensor.

Each axis of the mesh cuts one dim, or none. So the local part is, along each dim, some ranges of
the full tensor, and on the whole a product of them: one box for ``Shard``, several for
``_StridedShard``, which takes a part of each of several groups (torch's FSDP2 over tensor
parallelism; the fused projections of ``transformers``).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from lateinit._distributed.shard_ranges import Box
from lateinit._tensors import held
from lateinit._torch import axes_as_sharded, indices_of_part
from lateinit.errors import ShardingError, listing


class Part(NamedTuple):
    """A box that a rank holds of a tensor.

    Attributes:
        local: its place in the local part.
        full: its place in the full tensor.
    """

    local: Box
    full: Box


def parts_of(shard: Any, name: str) -> list[Part]:
    """The boxes that make up the local part of a ``DTensor``; none if it has no elements.

    Args:
        shard: the ``DTensor``.
        name: its fully qualified name, for messages.

    Raises:
        ShardingError: the local part is no part of the full tensor, or its place is not known.
    """
    if shard.device_mesh.get_coordinate() is None:
        return []  # this rank is not in the mesh
    indices = _indices(shard, name)
    local = tuple(held(shard).shape)
    if tuple(map(len, indices)) != local:
        raise ShardingError(
            f"{name}: the local part of a tensor {tuple(shard.shape)} sharded as "
            f"{shard.placements} is {tuple(map(len, indices))} on this rank, and this one is "
            f"{local}: load before sharding, or shard it by distribute_tensor"
        )
    along = [list(_ranges(found)) for found in indices]
    return [Part(*_boxes(place)) for place in itertools.product(*along)]


def whole_part(shape: Sequence[int]) -> Part:
    """The one box of a tensor that a rank holds as a whole."""
    box = Box((0,) * len(shape), tuple(shape))
    return Part(box, box)


def refuse_sums(shards: Mapping[str, Any]) -> None:
    """Raise ``ShardingError`` for shards that hold terms of a sum, and no parts of a tensor."""
    names = [n for n, s in shards.items() if any(p.is_partial() for p in s.placements)]
    if names:
        raise ShardingError(
            f"{listing(names)}: a Partial placement holds terms of a sum, not parts of a tensor, "
            "so it has no values of its own: use Shard or Replicate"
        )


def _indices(shard: Any, name: str) -> list[Sequence[int]]:
    """The indices of the full tensor that this rank has along each dim."""
    refuse_sums({name: shard})
    mesh = shard.device_mesh
    found: list[Sequence[int]] = [range(length) for length in shard.shape]
    for axis in axes_as_sharded(shard):
        placement = shard.placements[axis]
        if placement.is_replicate():
            continue
        dim = getattr(placement, "dim", 0)
        before, here = found[dim], mesh.get_coordinate()[axis]
        own = indices_of_part(placement, len(before), mesh.size(axis), here)
        if own is None:
            raise ShardingError(
                f"{name}: it is not known which part of a tensor the placement {placement} holds: "
                "load before sharding, or use Shard or Replicate"
            )
        if isinstance(own, range):  # neighbours: the result stays a range too
            found[dim] = before[own.start : own.stop]
        else:
            found[dim] = [before[index] for index in own]
    return found


def _ranges(indices: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """Runs of neighbouring indices: the position in ``indices``, the first index, the length."""
    if type(indices) is range:
        yield from [(0, indices.start, len(indices))] if indices else []
        return
    start = 0
    for place in range(1, len(indices) + 1):
        if place == len(indices) or indices[place] != indices[place - 1] + 1:
            yield start, indices[start], place - start
            start = place


def _boxes(ranges: Sequence[tuple[int, int, int]]) -> tuple[Box, Box]:
    local, full, size = zip(*ranges, strict=True) if ranges else ((), (), ())
    return Box(local, size), Box(full, size)
