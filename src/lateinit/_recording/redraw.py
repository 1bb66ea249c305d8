"""Repeat the draws of a layer's initialisation, for a layer that has values from a checkpoint."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lateinit._integrations import is_pfn_layer
from lateinit._recording.writer import current
from lateinit._tensors import is_parameter
from lateinit._torch import own_buffers, own_parameters


def draw_again(module: Any) -> None:
    """Record the draws of a layer's initialisation; its tensors do not change.

    A lazy layer that gets its shape from a checkpoint draws nothing, but the eager twin has drawn.
    This works for torch's and pytorch-pfn-extras' own layers, by their ``reset_parameters``.
    """
    cls: Any = getattr(module, "cls_to_become", None) or type(module)
    known = cls.__module__.startswith("torch.nn.") or is_pfn_layer(module)
    if not known or current() is None or not hasattr(cls, "reset_parameters"):
        return
    held = own_parameters(module), own_buffers(module)
    before = [dict(tensors) for tensors in held]
    try:
        for tensors in held:
            tensors.update({name: _another(t) for name, t in tensors.items() if t is not None})
        cls.reset_parameters(module)
    finally:
        for tensors, found in zip(held, before, strict=True):
            tensors.update(found)


def _another(tensor: Tensor) -> Tensor:
    new = torch.empty(tensor.shape, dtype=tensor.dtype)
    return nn.Parameter(new, tensor.requires_grad) if is_parameter(tensor) else new
