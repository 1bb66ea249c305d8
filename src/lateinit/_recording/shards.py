"""The class of a ``DTensor`` whose local part is deferred, outside blocks.

The ops of a ``DTensor`` reach the guard of its local part. Reads of its properties do not: it is a
wrapper that copied ``meta`` from its local part when it was made, and keeps that when the local
part becomes real. So ``load_state_dict`` would warn that copying does nothing,
``set_model_state_dict`` would replace parameters instead of loading into them, and initialisers of
``torch.nn.init`` that do nothing on ``meta`` would be skipped. This class answers such reads like
``DeferredTensor``, and updates the wrapper when the local part has become real.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from lateinit._integrations import NEEDS_VALUES, SEES_RECORDED, before_sending
from lateinit._recording.after_block import (
    as_meant,
    device_to,
    is_meta_to,
    needs_values,
    refusal,
    refuse_lost,
    would_send,
)
from lateinit._recording.autocast import casts_of_autocast
from lateinit._recording.conversions import AFTER_BLOCK
from lateinit._recording.watched import Watched
from lateinit._recording.writer import ProgramWriter, current
from lateinit._tensors import (
    ON_META,
    Deferred,
    Guarded,
    GuardedShard,
    held,
    is_deferred_tensor,
    share_real_storage,
    slot_of,
    unguard,
)
from lateinit._torch import (
    Args,
    Kwargs,
    calling_modules,
    flat,
    is_dtensor,
    meant_by_device,
    rewrap,
    tell_of_new_dtensors,
    tensors_in,
    why_is_meta,
    without_subclass_functions,
)


class _Here(threading.local):
    """``calling``: whether this thread is calling a function on shards treated as plain ones."""

    calling = False


_here = _Here()


@functools.cache
def _guarding(cls: type[Tensor]) -> type[Tensor]:
    def call(_: Any, func: Any, types: Any, args: Args = (), kwargs: Kwargs | None = None) -> Any:
        # Getters arrive as fresh method-wrappers: equal to those bound here, not identical.
        if func == torch.Tensor.is_meta.__get__ and not _renewed(args[0]):  # type: ignore[attr-defined]
            with without_subclass_functions():
                return is_meta_to(why_is_meta(args[0]), args[0])
        if func == torch.Tensor.device.__get__ and not _renewed(args[0]):
            with without_subclass_functions():
                return device_to(meant_by_device(NEEDS_VALUES, SEES_RECORDED), args[0])
        return _called(func, args, kwargs or {})

    of_class: Any = cls.device_mesh  # type: ignore[attr-defined]

    def device_mesh(shard: Any) -> Any:
        # accelerate/utils/fsdp_utils.py: fsdp2_load_full_state_dict reads it on every rank before
        # rank 0 sends. The other ranks then receive into new real tensors, which cannot be
        # intercepted.
        asking = next(islice(calling_modules(), 1, None))
        instead = before_sending([asking])
        if instead is not None and not _renewed(shard):
            raise would_send(asking, shard, instead)
        return of_class.__get__(shard)

    members = {
        "__torch_function__": classmethod(call),
        "__slots__": (),
        "original": cls,
        "device_mesh": property(device_mesh),
    }
    return type(f"Deferred{cls.__name__}", (GuardedShard, cls), members)


def guard_shard(tensor: Tensor) -> None:
    """Give a ``DTensor`` whose local part is deferred the class that guards it, in place."""
    if _here.calling or isinstance(tensor, GuardedShard):
        return
    local = held(tensor)
    slot = slot_of(local)
    if slot is None or slot is ON_META:
        return
    # In a block, only shards that were cut in it are guarded now, the others at its end.
    if current() is not None and not isinstance(local, Guarded):
        return
    tensor.__class__ = _guarding(type(tensor))
    slot.waits = True


@contextlib.contextmanager
def none_guarded() -> Iterator[None]:
    """A block in which this thread guards no ``DTensor`` that it makes."""
    calling, _here.calling = _here.calling, True
    try:
        yield
    finally:
        _here.calling = calling


# torch has no hook for new ``DTensor`` objects, so their constructor is replaced.
watch_new_shards = Watched(
    partial(tell_of_new_dtensors, guard_shard), partial(tell_of_new_dtensors, None)
).add
"""From now on guard each ``DTensor`` that is made from the tensors of a program."""


def _called(func: Callable[..., Any], args: Args, kwargs: Kwargs) -> Any:
    """Call a function on shards as if they were plain DTensors: the local parts are guarded."""
    shards = [t for t in tensors_in(args, kwargs) if isinstance(t, GuardedShard)]
    for shard in shards:
        if not _renewed(shard):
            _refuse_setting(func, args, shard)
        unguard(shard)
    try:
        with none_guarded():
            result = _honoured(func, args, kwargs)
    finally:
        for shard in shards:
            if not _renewed(shard):
                guard_shard(shard)
    for leaf in flat(result):
        if is_dtensor(leaf):
            guard_shard(leaf)
    return result


def _honoured(func: Callable[..., Any], args: Args, kwargs: Kwargs) -> Any:
    """Call a function on DTensors; if a deferred one makes it fail, the error names that one."""
    tensors = tensors_in(args, kwargs)
    first = next(filter(is_deferred_tensor, tensors), None)
    handler = AFTER_BLOCK.get(func)
    if first is None:
        return func(*args, **kwargs)
    if func == torch.Tensor.backward:  # the gradients on meta could not be kept
        raise needs_values("backward", first)
    local = Deferred.of(held(first))
    writer = ProgramWriter(local.program, drawing=False)
    try:
        with casts_of_autocast(writer):
            if handler is None:
                result = func(*args, **kwargs)
            else:
                result = handler(writer, func, *as_meant(args, kwargs, local.device))
    except Exception as error:
        refused = refusal(error, func, first, tensors)
        if refused is None:
            raise
        raise refused from error
    if all(is_deferred_tensor(t) for t in tensors if t.is_meta):
        refuse_lost(func, result, first)
    return result


_SETTERS = (torch.Tensor.data.__set__, torch.Tensor.grad.__set__)  # type: ignore[attr-defined, union-attr]


def _refuse_setting(func: Any, args: Args, shard: Tensor) -> None:
    # C++ refuses these if exactly one of the two is on meta.
    if func not in _SETTERS or args[0] is not shard or not isinstance(args[1], Tensor):
        return
    if not args[1].is_meta or func == _SETTERS[1]:
        raise needs_values(f"setting .{func.__self__.__name__}", shard)


def _renewed(shard: Any) -> bool:
    """Whether a shard is real; if so, its wrapper gets the device of its local part."""
    local = held(shard)
    share_real_storage(local)
    if is_deferred_tensor(local):
        return False
    unguard(shard)
    if shard.device != local.device:
        rewrap(shard)
    return True
