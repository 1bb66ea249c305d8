"""Tensors that consist of others: ``DTensor`` and its local part, quantised tensors and the like.

``torch.distributed.tensor`` takes long to import; whoever made a ``DTensor`` has imported it.
"""

from __future__ import annotations

import sys
from typing import Any

from torch import Tensor

from lateinit._torch.swap import swap


def is_wrapper(tensor: Any) -> bool:
    """Whether a tensor is a shell around others, as distributed and quantised ones are."""
    return hasattr(type(tensor), "__tensor_flatten__")


def is_dtensor(tensor: Any) -> bool:
    """Whether a tensor is a ``DTensor``."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local_part(tensor: Any) -> Tensor:
    """The tensor that has the memory of a ``DTensor`` on this rank."""
    local: Tensor = tensor._local_tensor
    return local


def rewrap(tensor: Any) -> None:
    """Let a ``DTensor`` object know that its local part is on another device now."""
    local = tensor._local_tensor
    swap(tensor, type(tensor)(local, tensor._spec, requires_grad=tensor.requires_grad))
    tensor._local_tensor = local


def block_of_shard(shard: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The shape of the local part of a ``DTensor``, and where in the whole tensor it starts.

    It is what torch says of contiguous blocks. Of any other part (``_StridedShard``) it is wrong.
    """
    # Imported by whoever made the shard, and long to import.
    from torch.distributed.tensor._utils import (  # noqa: PLC0415
        compute_local_shape_and_global_offset,
    )

    shape, start = compute_local_shape_and_global_offset(
        shard.shape, shard.device_mesh, shard.placements
    )
    return tuple(shape), tuple(start)
