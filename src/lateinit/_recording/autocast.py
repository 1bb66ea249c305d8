"""Autocast of deferred tensors: its casts are recorded, and then the op on their results.

torch itself decides how it would cast real tensors of the same dtypes (``_torch.autocast``), so
that no list of ops is kept here. The recorded ops are independent of autocast.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lateinit._recording.writer import ProgramWriter, current
from lateinit._tensors import is_deferred_tensor
from lateinit._torch import (
    Args,
    Kwargs,
    as_autocast_casts,
    autocast_heard,
    below_autocast,
    generation_of_cache,
    is_any_autocast_enabled,
    is_cast_once,
    map_tensors,
    tensors_in,
    without_modes,
)


def casts_of_autocast(
    writer: ProgramWriter | None = None,
) -> contextlib.AbstractContextManager[Any]:
    """A block in which autocast, if it is on, casts deferred tensors too.

    Args:
        writer: knows the devices of the tensors; needed if no recording is in force.
    """
    on = is_any_autocast_enabled()
    return autocast_heard(partial(_cast, writer)) if on else contextlib.nullcontext()


def _cast(writer: ProgramWriter | None, op: Any, args: Args, kwargs: Kwargs) -> Any:
    """Record the casts of autocast for one op, and the op."""
    writer, tensors = current() or writer, tensors_in(args, kwargs)
    first = next(filter(is_deferred_tensor, tensors), None)
    if writer is None or first is None:
        return NotImplemented
    meant = writer.device_of(first)

    def device(tensor: Tensor) -> torch.device:
        if not tensor.is_meta:
            return tensor.device
        # A plain meta tensor, in shape propagation, counts as one on the same device.
        return writer.device_of(tensor) if is_deferred_tensor(tensor) else meant

    def stand_in(tensor: Tensor) -> Tensor:
        return torch.empty(0, dtype=tensor.dtype, device=device(tensor))

    with without_modes():
        asked = map_tensors(args, stand_in), map_tensors(kwargs, stand_in)
    chosen, *given = as_autocast_casts(op, *asked)
    originals = iter(tensors)

    def cast(shown: Tensor) -> Tensor:
        tensor = next(originals)
        return (
            tensor
            if tensor.dtype == shown.dtype
            else _converted(tensor, device(tensor).type, shown.dtype)
        )

    args, kwargs = map_tensors(given, cast)
    with below_autocast():
        return chosen(*args, **kwargs)


class _Casts(threading.local):
    """The casts of weights that autocast keeps, by the ids of the weights, in one generation."""

    generation: object = None
    kept: dict[int, tuple[weakref.ref[Tensor], Tensor]]

    def __init__(self) -> None:
        self.kept = {}


_casts = _Casts()


def is_cast_already(tensor: Tensor, device: str) -> bool:
    """Whether autocast keeps a cast of a weight, and would use that cast in place of the weight.

    Args:
        tensor: the weight.
        device: its device type.
    """
    owner, _ = _casts.kept.get(id(tensor), (None, tensor))
    known = owner is not None and owner() is tensor
    return known and generation_of_cache(device) is _casts.generation


def _converted(tensor: Tensor, device: str, dtype: torch.dtype) -> Tensor:
    """A tensor cast as by autocast: a weight that was cast before is not cast again.

    If the weight was changed since, the old values and dtype are used, as in eager construction.
    """
    if not is_cast_once(tensor, device, dtype):
        with below_autocast():
            return tensor.to(dtype)
    generation = generation_of_cache(device)
    if generation is not _casts.generation:
        _casts.generation, _casts.kept = generation, {}
    owner, made = _casts.kept.get(id(tensor), (None, tensor))
    if owner is None or owner() is not tensor:
        with below_autocast():
            made = tensor.to(dtype)
        forget = partial(_casts.kept.pop, id(tensor), None)
        _casts.kept[id(tensor)] = weakref.ref(tensor, lambda _: forget()), made
    return made
