"""Run the calls that were postponed until a shape is known (``_recording.postponed``)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lateinit._lazy.scratch_recording import aside
from lateinit._recording import fill
from lateinit._recording.guard import guard
from lateinit._recording.holes import Hole
from lateinit._recording.postponed import (
    Postponed,
    forget_postponed,
    postponed,
    waits_for_shape,
)
from lateinit._tensors import is_deferred_tensor, is_placeholder
from lateinit._torch import here, outside, own_buffers, own_parameters

# An attribute of a tensor that is cast after its postponed calls: the device, and the dtypes.
_DUE = "_lateinit_casts"


@contextlib.contextmanager
def recorded_in(hole: Hole | None, held: Any) -> Iterator[None]:
    """A block whose ops are recorded in a hole; without one they run eagerly.

    In a trial (``mixin.trying``) they run as the trial requires.

    Args:
        hole: the hole.
        held: an iterator of the tensors that may become deferred in the block.
    """
    if here.trial:
        hole = None
    with aside() if here.trial == "aside" else outside():
        if hole is None:
            yield
        else:
            with fill(hole):
                yield
    # The end of a block guards the tensors that were made or registered in it. A placeholder that
    # became deferred in the block is neither, so it is guarded here.
    for tensor in held:
        if is_deferred_tensor(tensor):
            guard(tensor)


def has_postponed(module: nn.Module) -> bool:
    """Whether a call was postponed for a module, a part of it, or a tensor of these."""
    return any(postponed(owner) for owner in _owners(module))


def cast_later(tensor: Tensor, device: torch.device | None, casts: tuple[torch.dtype, ...]) -> None:
    """Have ``settle`` move and cast a tensor after its postponed calls."""
    if device is not None or casts:
        tensor.__dict__[_DUE] = device, casts


def settle(module: nn.Module, *, loaded: bool = False) -> None:
    """Run the postponed calls of a module and its parts, in order, as far as shapes are known.

    The calls of parts that are still lazy stay postponed.

    Args:
        module: the module.
        loaded: whether it has its shape from a checkpoint, whose values replace all others.
    """
    due: list[tuple[Postponed, Any]] = []
    owners = [owner for owner in _owners(module) if postponed(owner) or _DUE in owner.__dict__]
    for owner in owners:
        lazy = waits_for_shape(owner) if isinstance(owner, nn.Module) else is_placeholder(owner)
        if not lazy and postponed(owner):
            due += [(each, owner) for each in postponed(owner)]
            forget_postponed(owner)
    for each, owner in sorted(due, key=lambda pair: pair[0].hole.resolve()[1]):
        held = [*module.parameters(), *module.buffers()]
        real = not any(is_deferred_tensor(tensor) for tensor in held)
        # After a first forward pass the tensor is real: its values are written now, not recorded.
        with recorded_in(None if real and not loaded else each.hole, held):
            if not loaded:
                each.run(owner)
    for owner in owners:
        if _DUE in owner.__dict__ and not is_placeholder(owner):
            owner.data = cast_as(owner, *owner.__dict__.pop(_DUE))


def cast_as(tensor: Tensor, device: torch.device | None, casts: tuple[torch.dtype, ...]) -> Tensor:
    """A tensor moved to a device and cast, step by step."""
    with torch.no_grad():
        moved = tensor.to(device=device)
        for dtype in casts:
            moved = moved.to(dtype)
    return moved


def _owners(module: nn.Module) -> list[Any]:
    """The parts of a module, itself included, and their tensors; each once."""
    found: dict[int, Any] = {}
    for part in module.modules():
        for owner in (part, *own_parameters(part).values(), *own_buffers(part).values()):
            if owner is not None:
                found[id(owner)] = owner
    return list(found.values())
