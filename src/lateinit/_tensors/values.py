"""The values that tensors have now, in memory of their own."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor

from lateinit._program.program import TensorRef
from lateinit._replay.replay import Replay
from lateinit._tensors.realize import Cast, as_cast
from lateinit._tensors.slots import is_deferred_tensor, locate
from lateinit._torch.modes import without_modes

_AS_RECORDED = Cast(None, None)


def own_copy(
    tensor: Tensor,
    memo: dict[Any, Any],
    *,
    cast: Cast = _AS_RECORDED,
    together: list[TensorRef] | None = None,
    past_holes: bool = False,
) -> Tensor:
    """A real copy of a tensor; a deferred one is computed, and stays deferred.

    Copies with the same ``memo`` share memory as their originals do, and share it with nothing
    else: whoever writes to one changes no original.

    Args:
        tensor: a tensor with values, or a deferred one.
        memo: what was copied before, as for ``copy.deepcopy``.
        cast: where computed values go.
        together: the windows on the same storage that are copied too; a cast depends on them.
        past_holes: take lazy modules whose shapes are not known yet to draw nothing.
    """
    if not is_deferred_tensor(tensor):
        return copy.deepcopy(tensor.detach(), memo)
    slot, program, ref = locate(tensor)
    with without_modes():
        if slot.real is not None:
            return copy.deepcopy(as_cast(slot, ref).on(slot.real), memo)
        if slot not in memo:
            values = Replay(program, past_holes=past_holes).values([ref.storage])
            memo[slot] = cast.storage(values[ref.storage], together or [ref])
        return ref._replace(dtype=cast.dtype_of(ref)).on(memo[slot])
