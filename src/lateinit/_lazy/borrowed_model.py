"""Stand-ins for a model's tensors while the model's own code runs.

Each tensor gets one stand-in, wherever the model holds it, so that a forward pass
(``infer_shapes``) or a dry run of loading (``_checkpoint.load``) leaves the tensors unchanged.
Attributes, hooks and flags are restored by ``_tensors.object_graph``.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedTensorMixin  # type: ignore[attr-defined]

from lateinit._identity import IdentityMap
from lateinit._lazy.placeholders import Placeholder
from lateinit._lazy.shape_mode import readable
from lateinit._tensors import (
    exchanged,
    is_deferred_tensor,
    is_parameter,
    is_placeholder,
    original_class,
    own_copy,
)
from lateinit._torch import is_wrapper, without_subclass_functions
from lateinit.errors import RecordingError

MakeStandIn = Callable[[Tensor], Tensor]


class Lending:
    """Makes one stand-in for each tensor, and returns the same one for every later look-up."""

    def __init__(self, stand_in: MakeStandIn) -> None:
        self._stand_in = stand_in
        self._made: IdentityMap[Tensor, Tensor] = IdentityMap()

    def of(self, tensor: Tensor) -> Tensor:
        """The stand-in of a tensor."""
        known = self._made.get(tensor)
        if known is None:
            known = self._made[tensor] = self.make(tensor)
        return known

    def know(self, stand_in: Tensor) -> Tensor:
        """Register a tensor as its own stand-in; returns it."""
        self._made[stand_in] = stand_in
        return stand_in

    def has_original(self, tensor: Tensor) -> bool:
        """Whether a tensor has a stand-in other than itself."""
        return self._made.get(tensor, tensor) is not tensor

    def make(self, tensor: Tensor) -> Tensor:
        """Make the stand-in of a tensor that has none yet."""
        if is_placeholder(tensor):
            placeholder: Tensor = clone_placeholder(tensor)
            return placeholder
        return dressed(self._stand_in(tensor), tensor, self.of)


def dressed(stand_in: Tensor, tensor: Tensor, of: MakeStandIn) -> Tensor:
    """Give a stand-in the class, the attributes and the flags of its tensor.

    Attributes that are tensors are replaced by their stand-ins, ``of(attribute)``.
    """
    if is_parameter(tensor):
        stand_in = nn.Parameter(stand_in, tensor.requires_grad)
    elif tensor.requires_grad:
        stand_in.requires_grad_()
    if not is_wrapper(tensor):
        stand_in.__class__ = original_class(tensor)
        held = {key: exchanged(value, of) for key, value in vars(tensor).items()}
        vars(stand_in).update(held)
    return stand_in


def clone_placeholder(placeholder: Any) -> Any:
    """A placeholder of the same class and dtype: lateinit's, torch's, or pytorch-pfn-extras'."""
    if isinstance(placeholder, Placeholder):
        return copy.deepcopy(placeholder)
    if isinstance(placeholder, UninitializedTensorMixin):
        made = original_class(placeholder)
        return made(placeholder.requires_grad, "cpu", placeholder.dtype)
    return original_class(placeholder)(torch.empty(0, dtype=placeholder.dtype))


def on_meta(tensor: Tensor) -> Tensor:
    """A meta tensor with the shape, the strides and the dtype of ``tensor``."""
    with without_subclass_functions():
        # A fake input may have symbolic sizes: torch.export uses them for dynamic dims.
        shape, dtype = [int(size) for size in tensor.size()], tensor.dtype
        try:
            stride = [int(step) for step in tensor.stride()]
            made = torch.empty_strided(shape, stride, dtype=dtype, device="meta")
        except RuntimeError:  # layouts that have no strides
            made = torch.empty(shape, dtype=dtype, device="meta")
        return made


def counting_stand_in(tensor: Tensor) -> Tensor:
    """A stand-in without memory, except that an integer scalar keeps its value.

    Control flow may depend on a counter: ``_BatchNorm.forward`` (torch/nn/modules/batchnorm.py)
    divides by ``num_batches_tracked`` if ``momentum`` is None.
    """
    with without_subclass_functions():
        counts = tensor.dim() == 0 and not (tensor.is_floating_point() or tensor.is_complex())
    if not counts or (tensor.is_meta and not is_deferred_tensor(tensor)):
        return on_meta(tensor)
    try:
        return readable(own_copy(tensor, {}))
    except RecordingError:  # its value depends on later draws of lazy modules
        return on_meta(tensor)
