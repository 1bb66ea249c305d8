"""Raise at its line what a kernel raises for the values of its arguments.

Meta kernels see no values: that a probability is negative or an index too large would be known only
when the op is replayed, and a constructor may catch the error. The rows of ``op_table`` say which
kernels look. On few elements, computed by few ops, such a kernel is run before the op is recorded,
and its results are dropped. Of a large tensor the values are arithmetic of the construction, which
is not done while recording: the op then raises when it is replayed.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lateinit._program import TensorRef, needed_ops
from lateinit._torch import (
    Args,
    Kwargs,
    OpInfo,
    copied_with_strides,
    map_tensors,
    tensors_in,
    without_modes,
)
from lateinit.errors import LateinitError

if TYPE_CHECKING:
    from lateinit._recording.writer import ProgramWriter

_MOST = 1 << 14  # elements of an argument, as a matrix of 128 x 128: inverted within a millisecond
_MOST_COMPUTED = 1 << 18  # elements that the ops write which its values depend on
_MOST_OPS = 64
_MARK = "lateinit_refuses_values"


def check_values(writer: ProgramWriter, info: OpInfo, args: Args, kwargs: Kwargs) -> None:
    """Raise what the kernel of an op raises; the random generators move as far as it moves them.

    Args:
        writer: records the op.
        info: the op, which ``checks_values``.
        args: its positional arguments.
        kwargs: its keyword arguments.
    """
    given = tensors_in(args, kwargs)
    if any(t.numel() > _MOST or t.device.type not in ("cpu", "meta") for t in given):
        return
    refs = [writer.ref(tensor) for tensor in given if tensor.is_meta]
    if not _is_cheap(writer, refs):
        return
    try:
        with without_modes():
            held = {ref: writer.values.of(ref) for ref in refs}
    except LateinitError:  # it waits for shapes, or was refused: replaying says so
        return

    def values() -> tuple[Args, Kwargs]:  # anew for each run, which may write to them
        def value(tensor: Tensor) -> Tensor:
            # In its layout: the order in which a kernel draws depends on it.
            return copied_with_strides(held[writer.ref(tensor)] if tensor.is_meta else tensor)

        return map_tensors(args, value), map_tensors(kwargs, value)

    with without_modes():
        try:
            _call(info, *values(), generator=torch.Generator() if info.random else None)
        except Exception as error:
            if writer.values.are_random(refs):
                writer.program.seed_bound = f"{info.name} failed for random values"
            if info.random:
                _fail(writer, info, *values())
            setattr(error, _MARK, True)
            raise


def is_refusal(error: Exception) -> bool:
    """Whether an error is eager construction's own: the call is not to be tried in another way."""
    return getattr(error, _MARK, False)


def _is_cheap(writer: ProgramWriter, refs: list[TensorRef]) -> bool:
    program = writer.program
    if any(program.storages[ref.storage].device.type != "cpu" for ref in refs):
        return False
    needed = needed_ops(program, [ref.storage for ref in refs])
    written = (ref.numel for n in needed for ref in program.ops[n].written())
    return len(needed) <= _MOST_OPS and sum(written) <= _MOST_COMPUTED


def _call(info: OpInfo, args: Args, kwargs: Kwargs, generator: torch.Generator | None) -> None:
    if generator is not None and "generator" in info.arguments[: len(args)]:
        place = info.arguments.index("generator")
        args = (*args[:place], generator, *args[place + 1 :])
    elif generator is not None:
        kwargs = kwargs | {"generator": generator}
    info.func(*args, **kwargs)


def _fail(writer: ProgramWriter, info: OpInfo, args: Args, kwargs: Kwargs) -> None:
    """Call an op that will fail on the generator that it draws from: it may have drawn before."""
    own = next((a for a in (*args, *kwargs.values()) if isinstance(a, torch.Generator)), None)
    with writer.settled():
        generator = own or torch.default_generator
        before = generator.get_state()
        with contextlib.suppress(Exception):  # the caller raises it
            _call(info, args, kwargs, generator)
        if not generator.get_state().equal(before):
            writer.program.seed_bound = f"{info.name} failed when it had drawn already"
