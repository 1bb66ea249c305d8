"""Exchange the implementation of a tensor object, so that the object stays.

``torch._C._swap_tensor_impl`` does what ``torch.utils.swap_tensors`` does, without refusing
tensors that somebody holds weakly. It leaves autograd's hooks behind: they hang on the
implementation, not on the object.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lateinit.errors import DeferredTensorError

swap_implementation = torch._C._swap_tensor_impl
"""``swap_implementation(a, b)``: each object shows what the other one showed."""


def swap(tensor: Tensor, real: Tensor) -> None:
    """Give a tensor object the memory and values of another one, which is not used any more.

    It keeps its hooks and ``requires_grad``. A graph that it had cannot be gone through.
    """
    if tensor.is_leaf or tensor.is_inference():
        real.requires_grad_(tensor.requires_grad)
    else:
        with torch.enable_grad():
            real = _Detached.apply(real.requires_grad_())  # type: ignore[no-untyped-call]
    swap_with_hooks(tensor, real)


def swap_with_hooks(tensor: Tensor, other: Tensor) -> None:
    """Exchange implementations, and hang the hooks of the first tensor on its new one."""
    hooks, grad_hooks = tensor._backward_hooks, tensor._post_accumulate_grad_hooks
    torch._C._swap_tensor_impl(tensor, other)
    if hooks is not None:
        tensor._backward_hooks = hooks
    if grad_hooks is not None:
        tensor._post_accumulate_grad_hooks = grad_hooks


def as_subclass(cls: type, data: Tensor, requires_grad: bool) -> Tensor:
    """A new tensor of a class, on the memory of another one; its ``__init__`` is not called."""
    made: Tensor = torch.Tensor._make_subclass(cls, data, requires_grad)
    return made


def mark_as_parameter(tensor: Tensor) -> None:
    """Let ``isinstance(tensor, nn.Parameter)`` be true of a tensor of another class."""
    tensor._is_param = True


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
