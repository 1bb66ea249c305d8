"""Two models that were sharded in the same way, tensor by tensor on this rank."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.tensor import DTensor

from lateinit._tensors.walk import find_tensors
from lateinit._torch.storage import as_bytes

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import nn


def differences(expected: nn.Module, found: nn.Module) -> list[str]:
    """What is not the same on this rank: names, ties, kinds, places, bits."""
    ours, theirs = facts(expected), facts(found)
    names = sorted(ours.keys() | theirs.keys())
    return [
        f"{n}: {theirs.get(n)} for {ours.get(n)}" for n in names if ours.get(n) != theirs.get(n)
    ]


def facts(model: nn.Module) -> dict[str, Any]:
    return {
        found.name: (found.names, found.kind, *seen(found.tensor)) for found in find_tensors(model)
    }


def seen(tensor: torch.Tensor) -> Iterator[Any]:
    """All that can be told of a tensor; of what is on meta, nothing is equal to anything."""
    yield tuple(tensor.shape), tensor.dtype, tensor.requires_grad, tensor.device
    local = tensor
    if isinstance(tensor, DTensor):
        yield tensor.placements, tuple(tensor.device_mesh.shape)
        local = tensor.to_local()
    yield object() if local.is_meta else (tuple(local.shape), bits(local))


def bits(tensor: torch.Tensor) -> bytes:
    tensor = tensor if tensor.layout is torch.strided else tensor.to_dense()
    return as_bytes(tensor).numpy().tobytes()
