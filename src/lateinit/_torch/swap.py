"""Exchange the implementations (``TensorImpl``) of two tensor objects; the objects stay.

torch/utils/__init__.py: swap_tensors refuses tensors that have weak references. The function below
it, ``torch._C._swap_tensor_impl``, does not. It does not move autograd's hooks, which belong to the
implementation (torch/csrc/autograd/python_variable.cpp); ``swap_with_hooks`` does.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn

from lateinit.errors import DeferredTensorError

swap_implementation = torch._C._swap_tensor_impl
"""``swap_implementation(a, b)``: exchange the memory and metadata of two tensor objects."""

# torch's own, whatever stands in their place while a block runs.
make_subclass = torch.Tensor._make_subclass
"""``make_subclass(cls, data, requires_grad)``: a tensor of ``cls`` on the memory of ``data``."""
view_as_subclass = torch.Tensor.as_subclass
"""``view_as_subclass(tensor, cls)``: the same as ``make_subclass``, in the graph of ``tensor``."""
new_tensor = torch.Tensor.__new__
"""``new_tensor(cls, *args)``: the C++ constructor behind a call of a tensor class."""

SWAPPING: tuple[Any, str] = torch._C, "_swap_tensor_impl"
"""The module in which torch/utils/__init__.py: swap_tensors looks up ``swap_implementation``."""
ASKING_FOR_REFERENCES: tuple[Any, str] = torch.utils, "weakref"
"""The module in which swap_tensors looks up ``weakref``, to list weak references."""


class WeakTensor(weakref.ref[Tensor]):
    """A weak reference to a tensor that ``swap_tensors`` may overlook: see ``OthersReferences``."""

    __slots__ = ()


class OthersReferences:
    """Stands in for the module ``weakref``, and does not list the references of lateinit."""

    @staticmethod
    def getweakrefs(value: Any) -> list[Any]:
        return [ref for ref in weakref.getweakrefs(value) if type(ref) is not WeakTensor]

    def __getattr__(self, name: str) -> Any:
        return getattr(weakref, name)


def swap(tensor: Tensor, real: Tensor) -> Tensor:
    """Give ``tensor`` the memory and values of ``real``, which must not be used afterwards.

    ``tensor`` keeps its hooks, ``requires_grad`` and ``is_leaf``. Backward through a tensor that is
    no leaf raises: the graph of the constructor is not recorded.

    Returns:
        The object that holds the implementation which ``tensor`` had.
    """
    # torch/_utils.py: a DTensor on meta comes out of a pickle as a parameter that is no leaf.
    leaf = tensor.is_leaf or isinstance(tensor, nn.Parameter)
    if leaf or tensor.is_inference():
        real.requires_grad_(tensor.requires_grad)
    else:
        with torch.enable_grad():
            real = _Detached.apply(real.requires_grad_())  # type: ignore[no-untyped-call]
    swap_with_hooks(tensor, real)
    return real


def swap_with_hooks(tensor: Tensor, other: Tensor) -> None:
    """Exchange implementations; the hooks of the first tensor are registered on its new one.

    They are registered before the exchange, so that there is no moment without them.
    """
    hooks, grad_hooks = tensor._backward_hooks, tensor._post_accumulate_grad_hooks
    if hooks is not None:
        other._backward_hooks = hooks
    if grad_hooks is not None:
        other._post_accumulate_grad_hooks = grad_hooks
    torch._C._swap_tensor_impl(tensor, other)


def as_subclass(cls: type, data: Tensor, requires_grad: bool) -> Tensor:
    """A new tensor of class ``cls`` on the memory of ``data``; ``__init__`` is not called."""
    made: Tensor = make_subclass(cls, data, requires_grad)
    return made


def hears_ops(cls: type) -> bool:
    """Whether a class of tensors has a ``__torch_dispatch__`` of its own."""
    return getattr(cls, "__torch_dispatch__", None) is not Tensor.__torch_dispatch__


class _Detached(torch.autograd.Function):
    """Takes the place of an autograd graph built in the constructor; backward raises."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        # A view made here could never be written in place (torch/csrc/autograd/variable.cpp).
        return tensor.detach()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise DeferredTensorError(
            "this tensor was computed from parameters in a deferred constructor; its graph was not "
            "recorded: compute it again, in forward or after materialising"
        )
