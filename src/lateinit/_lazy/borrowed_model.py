"""Stand-ins for a model's tensors, and the states of random generators, kept and put back.

For the time of the pass each tensor of the model has a stand-in, so that nothing which the
pass does to tensors, attributes, hooks or flags is seen afterwards.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedTensorMixin  # type: ignore[attr-defined]

from lateinit._lazy.placeholders import Placeholder
from lateinit._lazy.shape_mode import readable
from lateinit._tensors.object_graph import exchanged
from lateinit._tensors.slots import is_deferred_tensor, is_parameter, original_class
from lateinit._tensors.values import own_copy
from lateinit._tensors.walk import is_placeholder
from lateinit._torch.modes import without_subclass_functions
from lateinit._torch.wrappers import is_wrapper
from lateinit.errors import RecordingError

MakeStandIn = Callable[[Tensor], Tensor]


class Lending:
    """Stand-ins for tensors: one for each tensor, wherever it is met."""

    def __init__(self, stand_in: MakeStandIn) -> None:
        self._stand_in = stand_in
        self._made: dict[int, tuple[Tensor, Tensor]] = {}

    def of(self, tensor: Tensor) -> Tensor:
        """The stand-in of a tensor."""
        known = self._made.get(id(tensor))
        if known is None:
            known = self._made[id(tensor)] = tensor, self.make(tensor)
        return known[1]

    def make(self, tensor: Tensor) -> Tensor:
        """A stand-in for a tensor that is met for the first time."""
        if is_placeholder(tensor):
            placeholder: Tensor = clone_placeholder(tensor)
            return placeholder
        return dressed(self._stand_in(tensor), tensor, self.of)


def dressed(stand_in: Tensor, tensor: Tensor, of: MakeStandIn) -> Tensor:
    """Let a stand-in have the class, the attributes and the flags of its tensor."""
    if is_parameter(tensor):
        stand_in = nn.Parameter(stand_in, tensor.requires_grad)
    elif tensor.requires_grad:
        stand_in.requires_grad_()
    if not is_wrapper(tensor):
        stand_in.__class__ = original_class(tensor)
        held = {key: exchanged(value, of) for key, value in vars(tensor).items()}
        vars(stand_in).update({key: value for key, value in held.items() if key != "_is_param"})
    return stand_in


def clone_placeholder(placeholder: Any) -> Any:
    """A placeholder like another one."""
    if isinstance(placeholder, Placeholder):
        return copy.deepcopy(placeholder)
    if isinstance(placeholder, UninitializedTensorMixin):
        made = original_class(placeholder)
        return made(placeholder.requires_grad, "cpu", placeholder.dtype)
    return original_class(placeholder)(torch.empty(0, dtype=placeholder.dtype))


def on_meta(tensor: Tensor) -> Tensor:
    """A meta tensor with the layout of another one."""
    with without_subclass_functions():
        shape, dtype = tensor.size(), tensor.dtype
        try:
            made = torch.empty_strided(shape, tensor.stride(), dtype=dtype, device="meta")
        except RuntimeError:  # layouts that have no strides
            made = torch.empty(shape, dtype=dtype, device="meta")
        return made


def counting_stand_in(tensor: Tensor) -> Tensor:
    """A stand-in without memory; of a counter one with its value, which steers a forward pass.

    A batch norm that averages over all batches reads how many there were.
    """
    with without_subclass_functions():
        counts = tensor.dim() == 0 and not (tensor.is_floating_point() or tensor.is_complex())
    if not counts or (tensor.is_meta and not is_deferred_tensor(tensor)):
        return on_meta(tensor)
    try:
        return readable(own_copy(tensor, {}))
    except RecordingError:  # it depends on what lazy modules will draw
        return on_meta(tensor)
