"""Real copies of the current values of deferred and real tensors."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor

from lateinit._program import TensorRef
from lateinit._replay import execution_of
from lateinit._tensors.cast import AS_RECORDED, Cast, Real
from lateinit._tensors.deferred import Deferred
from lateinit._tensors.slots import is_deferred_tensor
from lateinit._torch import without_modes


def own_copy(
    tensor: Tensor,
    memo: dict[Any, Any],
    *,
    cast: Cast = AS_RECORDED,
    together: list[TensorRef] | None = None,
    past_holes: bool = False,
) -> Tensor:
    """A real copy of a tensor. A deferred tensor is computed by replay and stays deferred.

    Copies with the same ``memo`` share memory as their originals do. They share no memory with an
    original, so writing to a copy changes no original.

    Args:
        tensor: a real or a deferred tensor.
        memo: the copies made so far, as for ``copy.deepcopy``.
        cast: the device and dtype of computed values.
        together: all windows on the storage of ``tensor`` that will be copied; they decide whether
            the storage can be cast (see ``Cast.storage``).
        past_holes: assume that lazy modules without known shapes draw nothing.
    """
    if not is_deferred_tensor(tensor):
        try:
            return copy.deepcopy(tensor.detach(), memo)
        except RuntimeError:  # a subclass that torch can copy only in this way
            return tensor.detach().clone()
    deferred = Deferred.of(tensor)
    real, slot = deferred.real(), deferred.slot
    with without_modes():
        if real is not None:
            return copy.deepcopy(real, memo)
        if slot not in memo:
            values = deferred.values(execution_of(deferred.program, past_holes=past_holes))
            memo[slot] = cast.apply(values, together or [deferred.ref])
        made: Real = memo[slot]
        return made.window(deferred.ref).on(made.storage)
