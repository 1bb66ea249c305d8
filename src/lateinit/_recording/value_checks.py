"""Raise the errors of kernels for invalid values while recording, at the line of the call.

Meta kernels see no values: a negative probability or an index out of range would be found only at
replay, but a constructor may catch the error. The rows of ``op_table`` mark the kernels that check
values. If its arguments have few elements, computed by few ops, such a kernel is run before the op
is recorded, and its results are dropped. Computing the values of a large tensor would be arithmetic
while recording, so then the op raises only when it is replayed.
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

_MOST = 1 << 14  # elements of an argument: a matrix of 128 x 128 is inverted within a millisecond
_MOST_COMPUTED = 1 << 18  # elements that the ops write on which its values depend
_MOST_OPS = 64
_MARK = "lateinit_refuses_values"


def check_values(writer: ProgramWriter, info: OpInfo, args: Args, kwargs: Kwargs) -> None:
    """Raise the error of an op's kernel, after moving the random generators as the kernel does.

    Args:
        writer: the writer that will record the op.
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
    except LateinitError:  # values wait for shapes, or were refused: replay raises
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
    """Whether eager construction raises this error too: then no other way is tried."""
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
    """Call an op that will fail with its real generator, since it may draw before it fails."""
    own = next((a for a in (*args, *kwargs.values()) if isinstance(a, torch.Generator)), None)
    with writer.settled():
        generator = own or torch.default_generator
        before = generator.get_state()
        with contextlib.suppress(Exception):  # the caller raises it
            _call(info, args, kwargs, generator)
        if not generator.get_state().equal(before):
            writer.program.seed_bound = f"{info.name} failed when it had drawn already"
