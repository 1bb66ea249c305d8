"""Values for a forward pass that is run truly, on copies."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lateinit.modes import without_modes
from lateinit.replay import Replay
from lateinit.tensors import is_deferred_tensor, locate


def real_stand_in(tensor: Tensor, *, past_holes: bool = True) -> Tensor:
    """A real tensor to compute with in the place of one of the model.

    Parameters are shared, since forward passes do not write them; a deferred tensor is computed,
    as if lazy modules before it drew nothing if their shapes are not known yet (``past_holes``).
    """
    if is_deferred_tensor(tensor):
        made = _computed(tensor, past_holes=past_holes)
    elif isinstance(tensor, nn.Parameter):
        made = tensor.detach()
    else:
        made = tensor.detach().clone()
    grad = tensor.requires_grad
    return nn.Parameter(made, grad) if isinstance(tensor, nn.Parameter) else made


def _computed(tensor: Tensor, *, past_holes: bool) -> Tensor:
    slot, program, ref = locate(tensor)
    if slot.real is not None:
        return ref.on(slot.real)
    replay = Replay(program)
    replay.streams.past_holes = past_holes
    with without_modes(), torch.no_grad():
        return replay.value(ref)
