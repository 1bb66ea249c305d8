"""The kind of a call in a block, by its op and its arguments."""

from __future__ import annotations

import enum
from typing import NamedTuple

import torch
from torch import Tensor

from lateinit._tensors import ON_META, is_deferred_tensor, slot_of
from lateinit._torch import META, ZERO, Args, Kwargs, OpInfo, flat, has_tensor, tensors_in


class Kind(enum.Enum):
    """How a recorder treats a call. If several kinds apply, the order of ``classify`` decides."""

    FILL = "fills a deferred tensor with numbers or draws"
    DRAWN = "makes a new tensor of draws"
    SHOW = "sets a real tensor to the memory of a deferred one"
    SET_STORAGE = "sets a deferred tensor to real memory"
    ON_META = "is on meta because the constructor asked for it"
    MIXED = "takes a deferred tensor and one that the constructor put on meta"
    REAL = "takes real tensors alone, or reads a file"
    READ = "gives Python a value"
    LEAVE = "writes deferred values into a real tensor"
    RECORD = "makes or changes deferred tensors"


class Call(NamedTuple):
    """A classified call; ``deferred`` and ``real`` are tensors among its arguments."""

    kind: Kind
    deferred: list[Tensor]
    real: list[Tensor]


def classify(info: OpInfo, args: Args, kwargs: Kwargs) -> Call:
    """The kind of a call, by the op and by which of its tensors are deferred, real or on meta."""
    # Before the arguments are sorted: a fill needs only the tensor that it fills.
    if info.fills and not has_tensor(args[1:]) and _takes_fill(info, args[0]):
        return Call(Kind.FILL, [], [])
    if info.random and info.filled_by is not None:
        return Call(Kind.DRAWN, [], [])
    deferred, real, on_meta = _sort(args, kwargs)
    return Call(_kind(info, args, kwargs, deferred, real, on_meta), deferred, real)


def _kind(
    info: OpInfo,
    args: Args,
    kwargs: Kwargs,
    deferred: list[Tensor],
    real: list[Tensor],
    on_meta: bool,
) -> Kind:
    if deferred and info.name.startswith("aten::set_.source_"):
        if info.name.endswith("Tensor") and real and args[1].is_meta:
            return Kind.SHOW
        if isinstance(args[1], (torch.UntypedStorage, Tensor)) and args[1].device != META:
            return Kind.SET_STORAGE
    if kwargs.get("device") == META or (on_meta and not deferred):
        return Kind.ON_META
    if on_meta:
        return Kind.MIXED
    if not deferred and (real or (info.takes_text and _has_text(args, kwargs))):
        return Kind.REAL
    if info.only_reads:
        return Kind.READ
    if deferred and real and any(not t.is_meta for t in written(info, args, kwargs)):
        return Kind.LEAVE
    return Kind.RECORD


def _takes_fill(info: OpInfo, tensor: Tensor) -> bool:
    return fits(info, tensor) and is_deferred_tensor(tensor)


def fits(info: OpInfo, tensor: Tensor) -> bool:
    """Whether the usual numbers of a fill fit a tensor's dtype: then no kernel needs to be tried.

    For integer dtypes only zero is certain to be in range.
    """
    return tensor.is_floating_point() or (info.name == ZERO and not tensor.is_quantized)


def _sort(args: Args, kwargs: Kwargs) -> tuple[list[Tensor], list[Tensor], bool]:
    """The deferred and the real tensors of a call; whether any is on meta by request."""
    deferred: list[Tensor] = []
    real: list[Tensor] = []
    on_meta = False
    for tensor in tensors_in(args, kwargs):
        slot = slot_of(tensor)
        if slot is None or slot is ON_META:
            if tensor.is_meta:
                on_meta = True
            else:
                real.append(tensor)
        else:
            deferred.append(tensor)
    return deferred, real, on_meta


def _has_text(args: Args, kwargs: Kwargs) -> bool:
    """Whether a call without tensors is given a text: it may read a file, which later changes."""
    return str in map(type, flat((*args, *kwargs.values())))


def written(info: OpInfo, args: Args, kwargs: Kwargs) -> list[Tensor]:
    """The tensors that a call writes."""
    given = tuple(args[i] for i in info.mutates if i < len(args))
    return tensors_in(given, {key: kwargs.get(key) for key in info.mutates_kw})
