"""Call a function of torch in another way after it failed on deferred tensors in a block."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lateinit._recording import composite_ops
from lateinit._recording.by_running import record_by_running
from lateinit._recording.conversions import computed
from lateinit._recording.value_checks import is_refusal
from lateinit._recording.writer import ProgramWriter
from lateinit._tensors import is_deferred_tensor
from lateinit._torch import (
    asks_for_values,
    is_of_mixed_graph,
    is_plain,
    map_tensors,
    op_behind,
    reaches_for_memory,
    tensors_in,
    without_modes,
)
from lateinit.errors import RecordingError


def try_again(
    writer: ProgramWriter, func: Any, args: Any, kwargs: Any, begun: int, error: RuntimeError
) -> Any:
    """The result of a failed call, made in another way; raises if there is no such way.

    Args:
        writer: has recorded, from op number ``begun`` on, the ops of the call before it failed.
        func: the function.
        args: its positional arguments.
        kwargs: its keyword arguments.
        begun: the number of the first op that the call recorded.
        error: the error that it raised.
    """
    if is_refusal(error):
        raise error
    if is_of_mixed_graph(error):
        raise _mixed_graph(func) from error
    if not any(op.draw for op in writer.program.ops[begun:]):
        result = _on_real_data(writer, func, args, kwargs)
        if result is not NotImplemented:
            return result
    if reaches_for_memory(error):
        return _composite_by_running(writer, func, args, kwargs, begun, error)
    if asks_for_values(error):
        return _with_real_indices(writer, func, args, kwargs, begun, error)
    raise error


def by_running(writer: ProgramWriter, func: Any, args: Any, kwargs: Any) -> Any:
    """Call a composite function that reads values, which it cannot on meta."""
    return _composite_by_running(writer, func, args, kwargs, len(writer.program.ops))


def _mixed_graph(func: Any) -> RecordingError:
    return RecordingError(
        f"{func.__name__} needs the gradient of a real tensor that was made outside the block, or "
        "of a sparse one, and of deferred tensors at once, which autograd keeps apart by device: "
        "make that tensor in the block, or compute the gradient after lateinit.materialize()"
    )


def _composite_by_running(
    writer: ProgramWriter,
    func: Any,
    args: Any,
    kwargs: Any,
    begun: int,
    error: RuntimeError | None = None,
) -> Any:
    """Record an op whose kernel reads memory above the dispatcher, such as ``_sobol_engine_draw``.

    It is run on the values, like an op without a meta kernel. The ops that it recorded before it
    failed, from number ``begun`` on, are dropped.
    """
    deferred = [t for t in tensors_in(args, kwargs) if is_deferred_tensor(t)]
    info = op_behind(func, args, kwargs)
    drawn = any(op.draw is not None for op in writer.program.ops[begun:])
    if not deferred or info is None or drawn:
        raise error or RecordingError(f"{func.__name__} cannot be recorded")
    if torch.is_grad_enabled() and any(t.requires_grad for t in deferred):
        raise RecordingError(
            f"{func.__name__} works on memory, so that its gradient cannot be recorded: call it "
            "under torch.no_grad(), or after lateinit.materialize()"
        )
    writer.program.forget(begun)
    writer.busy = True
    try:
        with without_modes():
            return record_by_running(writer, info, args, kwargs, deferred)
    finally:
        writer.busy = False


def _on_real_data(writer: ProgramWriter, func: Any, args: Any, kwargs: Any) -> Any:
    """Call a failed function once more, if there are real tensors among its arguments.

    If all are real, it is called as if outside a block: inside, its intermediate tensors (such as
    those of ``quantile``) would be deferred, and torch does not mix devices. If some are deferred,
    the real ones are copied to deferred tensors.
    """
    given = tensors_in(args, kwargs)
    real = [tensor for tensor in given if not tensor.is_meta]
    if not real or any(t.requires_grad for t in real) or not all(map(is_plain, real)):
        return NotImplemented
    if not any(map(is_deferred_tensor, given)):
        result = composite_ops.on_real_data(writer, func, args, kwargs)
        if result is not NotImplemented:
            return result
    info = op_behind(func, args, kwargs)
    if info is None or info.mutates or info.mutates_kw:
        return NotImplemented
    given, named = composite_ops.all_deferred(writer, args, kwargs)
    return func(*given, **named)


def _with_real_indices(
    writer: ProgramWriter, func: Any, args: Any, kwargs: Any, begun: int, error: RuntimeError
) -> Any:
    """Call a function that reads indices above the dispatcher, such as ``tensor_split``.

    Some also write to memory there, such as ``pad_packed_sequence``.
    """

    def real(value: Any) -> Any:
        is_index = isinstance(value, Tensor) and value.dtype in (torch.int32, torch.int64)
        return computed(writer, value) if is_index and is_deferred_tensor(value) else value

    given = map_tensors(args, real), map_tensors(kwargs, real)
    before, after = tensors_in(args, kwargs), tensors_in(*given)
    if all(new is old for new, old in zip(after, before, strict=True)):
        raise error
    try:
        return func(*given[0], **given[1])
    except RuntimeError as again:
        if not reaches_for_memory(again):
            raise
        return _composite_by_running(writer, func, args, kwargs, begun, again)
