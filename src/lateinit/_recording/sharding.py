"""Shard deferred tensors at the speed of ``meta``, by FSDP2 and by ``distribute_tensor``.

torch cuts a tensor into as many views as there are ranks, keeps one of them, and copies it. Each
view would have to be guarded. Instead torch cuts a plain ``meta`` tensor, and the ops that make the
kept part are recorded afterwards.

In a block, this happens as if the block were over: a shard is no part of the construction, which is
the same on all ranks.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from lateinit._program import Ambient, Op, Program, Storage, TensorRef
from lateinit._recording.after_block import named_after
from lateinit._recording.shards import guard_shard, none_guarded
from lateinit._recording.writer import current
from lateinit._replay import one_thread
from lateinit._tensors import (
    PLAIN_CLASSES,
    Deferred,
    Guarded,
    Slot,
    attach,
    held,
    is_deferred_tensor,
    original_class,
    share_real_storage,
    slot_of,
    unguard,
)
from lateinit._torch import (
    META,
    ZERO,
    Args,
    Cut,
    Kwargs,
    below_python,
    chunk_of,
    here,
    inference_mode,
    is_deterministic,
    kept_by_fsdp,
    outside,
    set_grad_enabled,
    swap_with_hooks,
    tensors_in,
    without_subclass_functions,
)
from lateinit.errors import DeferredTensorError

Guard = Callable[[Tensor], None]


def shard_by_fsdp(guard: Guard, make: Callable[[], None], state: Any, parameter: Tensor) -> None:
    """Have FSDP2 shard a parameter.

    Args:
        guard: guards a new deferred tensor.
        make: FSDP2's own sharding of the parameter, which fills in ``state``.
        state: FSDP2's own object for the parameter.
        parameter: the parameter, which may be a ``DTensor`` already.
    """
    source = held(parameter)
    with one_thread, _block_left([source], guard):
        share_real_storage(source)
        with without_subclass_functions():
            usual = _is_usual(source)
            if usual:
                with _unguarded(parameter, source), none_guarded():
                    make()
                _record_kept(state, source, guard)
        if not usual:
            make()


def take_part(guard: Guard, cut: Cut) -> Tensor:
    """Have torch take this rank's part of a tensor.

    Args:
        guard: guards a new deferred tensor.
        cut: the call of torch.
    """
    source = cut.tensor
    with one_thread, _block_left([source], guard):
        share_real_storage(source)
        if cut.dim is not None and _is_usual(source) and not source.requires_grad:
            with without_subclass_functions(), below_python():
                part = cut.take(source.detach())
                chunk = chunk_of(source.size(cut.dim), cut.chunks, cut.chunk)
                # Another torch version may cut in another way, or make no copy.
                if slot_of(part) is None and part.size(cut.dim) == len(chunk):
                    made = torch.empty_strided(
                        part.size(), part.stride(), dtype=part.dtype, device=META
                    )
                    _record(made, made, Deferred.of(source), cut.dim, chunk.start, zeros=False)
                    guard(made)
                    return made
        return cut.take(source)


def _is_usual(source: Tensor) -> bool:
    """Whether torch may cut a bare ``meta`` tensor in place of this one.

    FSDP2 refuses inference tensors, and calls hook methods of tensor classes that have them.
    """
    usual = original_class(source) in PLAIN_CLASSES and not source.is_inference()
    return usual and is_deferred_tensor(source)


def call_on_shards(func: Callable[..., Any], args: Args, kwargs: Kwargs) -> Any:
    """Call a torch function on the shards of deferred tensors in a block, as after the block.

    Draws are refused, since each rank would get other values.
    """
    with _block_left(tensors_in(args, kwargs)):
        try:
            return func(*args, **kwargs)
        except DeferredTensorError as error:
            raise DeferredTensorError(
                f"{str(error).partition(': ')[0]}: it is sharded, inside `with "
                "lateinit.deferred():`; do this before it is sharded, or after "
                "lateinit.materialize()"
            ) from error


@contextlib.contextmanager
def _block_left(tensors: list[Tensor], guard: Guard | None = None) -> Iterator[None]:
    """Leave the block that runs in this thread, if any.

    Args:
        tensors: the tensors that are used meanwhile.
        guard: guards the deferred ones among them, as the end of the block would.
    """
    writer = current()
    if writer is None or not any(map(is_deferred_tensor, tensors)):
        yield
        return
    if writer.shared:
        writer.take_back(tensors)
    grad, inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
    with outside(), inference_mode(inference):
        here.writer = None
        try:
            set_grad_enabled(grad)
            for tensor in tensors:
                if guard and is_deferred_tensor(tensor) and not isinstance(tensor, Guarded):
                    guard(tensor)
            yield
        finally:
            here.writer = writer


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


def _record_kept(state: Any, source: Tensor, guard: Guard) -> None:
    """Record the ops that make the memory which FSDP2 has kept, and guard the tensors on it."""
    kept = kept_by_fsdp(state)
    _record(kept.memory, kept.local, Deferred.of(source), kept.dim, kept.start, zeros=True)
    guard_shard(kept.shard)
    guard(kept.memory)
    guard(kept.local)


def _record(
    memory: Tensor, part: Tensor, source: Deferred, dim: int, start: int, *, zeros: bool
) -> None:
    """Record that new memory has a chunk of a deferred tensor.

    Ops are appended to the program directly: this runs for each parameter of a model, and making a
    ``ProgramWriter`` for it would double its time.

    Args:
        memory: a tensor on all of the memory.
        part: the tensor on it that has the values.
        source: the deferred tensor.
        dim: the dim of ``source`` that was cut.
        start: the start of the chunk in that dim.
        zeros: whether the rest of the memory is zeros.
    """
    program, number = source.program, len(source.program.storages)
    if not program.ambients:
        program.ambients.append(Ambient(torch.get_default_dtype(), is_deterministic()))
    with without_subclass_functions():
        storage, slot = memory.untyped_storage(), Slot(program, number)
        attach(storage, slot)
        elements, nbytes = part.numel(), storage.nbytes()
        program.storages.append(Storage(nbytes, source.device, followed=True))
        into, whole = TensorRef.of(part, number), source.ref
        if not elements or (zeros and elements * into.dtype.itemsize < nbytes):
            _append(program, ZERO, TensorRef.of(memory, number))
    if elements:
        offset = whole.offset + start * whole.stride[dim]
        _append(program, "aten::copy_", into, whole._replace(size=into.size, offset=offset))
    named_after(slot, source.slot).waits = True


def _append(program: Program, name: str, *args: TensorRef) -> None:
    program.ops.append(Op(name, args, {}, (), None, len(program.ambients) - 1, None))
