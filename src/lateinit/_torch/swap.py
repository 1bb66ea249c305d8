"""Exchange the implementation of a tensor object, so that the object stays."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lateinit.errors import DeferredTensorError


def swap(tensor: Tensor, real: Tensor) -> None:
    """Give a tensor object the memory and values of another one, which is not used any more."""
    if tensor.is_leaf or tensor.is_inference():
        real.requires_grad_(tensor.requires_grad)
    else:
        with torch.enable_grad():
            real = _Detached.apply(real.requires_grad_())  # type: ignore[no-untyped-call]
    hooks, grad_hooks = tensor._backward_hooks, tensor._post_accumulate_grad_hooks
    torch._C._swap_tensor_impl(tensor, real)
    # Autograd keeps hooks in the implementation that was swapped out: hang them on the new one.
    if hooks is not None:
        tensor._backward_hooks = hooks
    if grad_hooks is not None:
        tensor._post_accumulate_grad_hooks = grad_hooks


class _Detached(torch.autograd.Function):
    """Stands where a graph built in the constructor stood: it cannot be gone through."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise DeferredTensorError(
            "this tensor was computed from parameters in a deferred constructor; its graph was not "
            "recorded: compute it again, in forward or after materialising"
        )
