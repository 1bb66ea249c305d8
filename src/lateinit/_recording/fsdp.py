"""Shard the deferred parameters of ``fully_shard`` at the speed of ``meta``.

FSDP2 cuts each parameter into as many views as there are ranks, keeps one of them, and copies it
into padded memory. Each view would have to be guarded. Instead torch cuts a plain ``meta`` tensor,
and what it has kept is recorded afterwards, as the two ops that it was made by.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor

from lateinit._recording.after_block import named_after
from lateinit._recording.shards import guard_shard
from lateinit._recording.writer import ProgramWriter, current
from lateinit._replay import one_thread
from lateinit._tensors import (
    PLAIN_CLASSES,
    Deferred,
    held,
    is_deferred_tensor,
    original_class,
    share_real_storage,
    slot_of,
    unguard,
)
from lateinit._torch import below_python, kept_by_fsdp, swap_with_hooks, without_subclass_functions


def shard_by_fsdp(
    guard: Callable[[Tensor], None], make: Callable[[], None], state: Any, parameter: Tensor
) -> None:
    """Have FSDP2 shard a parameter.

    Args:
        guard: guards a new deferred tensor.
        make: shards the parameter, and fills in ``state``.
        state: FSDP2's own object for the parameter.
        parameter: the parameter, which may be a ``DTensor`` already.
    """
    with one_thread:
        source = held(parameter)
        share_real_storage(source)
        # FSDP2 takes no inference tensors, and calls methods of tensors that have them.
        usual = original_class(source) in PLAIN_CLASSES and not source.is_inference()
        if current() is not None or not usual or not is_deferred_tensor(source):
            make()
            return
        with without_subclass_functions(), _unguarded(parameter, source):
            make()
        _record(state, source, guard)


@contextlib.contextmanager
def _unguarded(parameter: Tensor, source: Tensor) -> Iterator[None]:
    """A block in which a parameter and its local part are plain ``meta`` tensors."""
    classes = type(parameter), type(source)
    with below_python():
        bare = source.detach().requires_grad_(source.requires_grad)
    swap_with_hooks(source, bare)
    unguard(source)
    unguard(parameter)
    try:
        yield
    finally:
        swap_with_hooks(source, bare)
        parameter.__class__, source.__class__ = classes


def _record(state: Any, source: Tensor, guard: Callable[[Tensor], None]) -> None:
    """Record how the memory that FSDP2 has kept was made, and guard the tensors on it."""
    kept, deferred = kept_by_fsdp(state), Deferred.of(source)
    writer = ProgramWriter(deferred.program, drawing=False)
    with without_subclass_functions(), below_python():
        writer.made(kept.memory, deferred.device, ("aten::zero_", ()))
        if kept.length:
            writer.assign(kept.local, source.detach().narrow(kept.dim, kept.start, kept.length))
    slot = slot_of(kept.memory)
    assert slot is not None
    named_after(slot, deferred.slot).waits = True
    guard(kept.memory)
    guard(kept.local)
    guard_shard(kept.shard)
