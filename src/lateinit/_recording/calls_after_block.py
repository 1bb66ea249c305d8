"""Call a torch function on deferred tensors outside the block that recorded them.

The call is recorded by a ``Follower``. If that is impossible, the tensors realise themselves and
the function is called again, or the call is refused.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lateinit._program import Program
from lateinit._recording import composite_ops
from lateinit._recording.after_block import Follower, as_meant, refusal, refuse_lost
from lateinit._recording.autocast import casts_of_autocast
from lateinit._recording.conversions import AFTER_BLOCK, CONVERSIONS
from lateinit._recording.recorder import in_force
from lateinit._recording.writer import current
from lateinit._replay import one_thread
from lateinit._tensors import (
    PLAIN_CLASSES,
    Deferred,
    copied_by_deepcopy,
    is_deferred_tensor,
    is_of_waiting,
    original_class,
    realize_now,
    share_real_storage,
    waits,
)
from lateinit._torch import (
    Args,
    Kwargs,
    enable_functions,
    flat,
    functions_state,
    is_differentiating,
    is_fake,
    is_functorch_running,
    mend,
    noted_modes,
    set_functions_state,
    tensors_in,
)


def follow(
    follower_of: Callable[[Program], Follower],
    func: Callable[..., Any],
    args: Args,
    kwargs: Kwargs,
    *,
    at_dispatch: bool = False,
) -> Any:
    """Call a torch function on deferred tensors outside the block that recorded them.

    In another block its modes record the call.

    If the call cannot be recorded, the deferred tensors realise themselves and the function is
    called again, unless one of them waits for ``materialize``.

    Args:
        follower_of: returns the mode that records into a program.
        func: the function.
        args: its positional arguments.
        kwargs: its keyword arguments.
        at_dispatch: whether this is an op at the dispatcher. If it is already part of a graph, no
            tensor may realise itself: the graph holds its meta tensor, and backward would end in an
            internal error.
    """
    if current() is not None:
        return func(*args, **kwargs)
    mend()
    before = noted_modes()
    try:
        return _followed(follower_of, func, args, kwargs, at_dispatch=at_dispatch)
    except BaseException as error:
        before.restore(error.__traceback__)
        raise


def _followed(
    follower_of: Callable[[Program], Follower],
    func: Callable[..., Any],
    args: Args,
    kwargs: Kwargs,
    *,
    at_dispatch: bool,
) -> Any:
    run = func if at_dispatch else partial(_heard_by_classes, func)
    failed: Exception | None = None
    # No other thread may realise one of the tensors in between, or record while a call is undone.
    with one_thread:
        tensors = tensors_in(args, kwargs)
        deferred = [t for t in tensors if is_deferred_tensor(t)]
        for tensor in deferred:
            # Its storage may have become real through another tensor, and changed since.
            share_real_storage(tensor)
        deferred = [t for t in deferred if is_deferred_tensor(t)]
        if deferred and (at_dispatch or not _is_for_values(func, tensors, deferred)):
            follower = follower_of(Deferred.of(deferred[0]).program)
            if len([t for t in tensors if t.is_meta or is_fake(t)]) == len(deferred):
                follower.meant = deferred[0]
            try:
                return _recorded(follower, deferred, func, args, kwargs)
            except Exception as error:
                refused = refusal(error, func, deferred[0], tensors)
                for_good = follower.final or any(map(waits, deferred))
                if for_good or (at_dispatch and _is_late(tensors, deferred)):
                    if refused is None:
                        raise
                    raise refused from error
                failed = refused or error
        for tensor in deferred:
            realize_now(tensor)
    if failed is None or not at_dispatch:
        return run(*args, **kwargs)
    try:
        # torch.sparse_coo_tensor and others take the device from one of the tensors.
        args, kwargs = as_meant(args, kwargs, deferred[0].device)
        return run(*args, **kwargs)
    except RuntimeError as again:
        # torch chose the op for meta; the next call chooses the right one.
        raise failed from again


def _is_for_values(func: Any, tensors: list[Tensor], deferred: list[Tensor]) -> bool:
    """Whether a call with real tensors, or with a graph, needs values.

    Such a call is not tried on meta: a graph or a wrapper of ``torch.func`` would keep meta
    tensors, and tensors that a failed call has saved are counted (torch/utils/checkpoint.py). Nor
    is a call with a user's subclass, whose ``__torch_function__`` decides the class of results.
    """
    meta = [t for t in tensors if t.is_meta]
    if len(meta) > len(deferred) or any(map(is_of_waiting, deferred)):
        return False
    if not all(original_class(t) in PLAIN_CLASSES for t in deferred):
        return True
    if func in _NO_VALUES:
        return False
    real = [t for t in tensors if not t.is_meta]
    if any(map(is_fake, real)):
        return False
    followed = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    return followed or is_functorch_running() or any(t.dim() > 0 for t in real)


def _recorded(
    follower: Follower, deferred: list[Tensor], func: Callable[..., Any], args: Args, kwargs: Kwargs
) -> Any:
    """Call a function, record it, and guard its results; undo everything if it fails."""
    programs = {Deferred.of(tensor).program for tensor in deferred}
    program = follower.writer.program
    before = len(program.ops)
    try:
        result = _called(follower, deferred[0], func, args, kwargs)
    except Exception:
        if len(programs) == 1:
            program.forget(before)
        follower.undo_draws()
        raise
    for leaf in flat(result):
        if isinstance(leaf, Tensor) and is_deferred_tensor(leaf):
            follower.guard(leaf)
    return result


def _called(
    follower: Follower, first: Tensor, func: Callable[..., Any], args: Args, kwargs: Kwargs
) -> Any:
    handler = AFTER_BLOCK.get(func)
    if handler is None and all(t.is_meta for t in tensors_in(args, kwargs)):
        handler = composite_ops.AFTER_BLOCK.get(func)
    with in_force(follower), casts_of_autocast():
        if handler is None:
            result = func(*args, **kwargs)
        else:
            device = follower.writer.device_of(first)
            result = handler(follower.writer, func, *as_meant(args, kwargs, device))
    if follower.meant is not None:
        refuse_lost(func, result, follower.meant)
    return result


def _is_late(tensors: list[Tensor], deferred: list[Tensor]) -> bool:
    """Whether an op at the dispatcher is already part of a graph of autograd or ``torch.func``."""
    followed = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    return followed or any(map(is_of_waiting, deferred)) or is_differentiating()


def _heard_by_classes(func: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call a function on real tensors, some of which may have a ``__torch_function__``."""
    before = functions_state()
    enable_functions()  # our caller does so too, if the call raises
    result = func(*args, **kwargs)
    set_functions_state(before)
    return result


def deepcopied(tensor: Tensor, memo: dict[int, Any]) -> Tensor:
    # follow() makes a tensor real first if its storage is real already.
    if is_deferred_tensor(tensor):
        return copied_by_deepcopy(tensor, memo)
    copied: Tensor = copy.deepcopy(tensor, memo)
    return copied


# Functions whose result has no graph, and that are recorded even if real tensors take part.
_NO_VALUES = frozenset(
    {*CONVERSIONS, deepcopied, torch.Tensor.detach, torch.Tensor.data.__get__}  # type: ignore[attr-defined]
)
