"""Record an op after running it on real values, if its meta kernel cannot give the results."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lateinit._program import Op, Read
from lateinit._replay import Memory, execution_of
from lateinit._torch import META, Args, Kwargs, OpInfo, is_plain, restoring, tensors_in
from lateinit.errors import RecordingError

if TYPE_CHECKING:
    from lateinit._recording.writer import ProgramWriter


@restoring
def record_by_running(
    writer: ProgramWriter, info: OpInfo, args: Args, kwargs: Kwargs, deferred: list[Tensor]
) -> Any:
    """Run an op on the values of its arguments, and record it with the shapes of its results.

    Args:
        writer: the writer that records it.
        info: the op.
        args: its positional arguments.
        kwargs: its keyword arguments.
        deferred: the deferred tensors among the arguments.
    """
    _check_without_graph(info, args)
    op, results = _run(writer, info, args, kwargs)
    is_random = info.random or writer.values.are_random(op.read())
    # Sparse, quantised and nested tensors are no windows on a storage: they stay real.
    if not all(is_plain(leaf) for leaf in results if isinstance(leaf, Tensor)):
        if is_random:
            writer.program.seed_bound = f"{info.name} made a tensor without a plain layout"
        return results[0] if len(results) == 1 else results
    outputs = {key: kwargs[key] for key in info.mutates_kw if kwargs.get(key) is not None}
    made: list[Any]
    if not info.returns_tensor:
        made = []
    elif info.mutates:
        made = [args[info.mutates[0]]]
    elif outputs:
        made = [_resized(writer, *pair) for pair in zip(outputs.values(), results, strict=False)]
        shown = {key: writer.ref(out) for key, out in outputs.items()}
        op = op._replace(kwargs=op.kwargs | shown)
    else:
        device = writer.device_for(kwargs, deferred)
        made = [writer.mirror(leaf, device) for leaf in results]
    outs = tuple(writer.ref(leaf) if isinstance(leaf, Tensor) else None for leaf in made)
    writer.append(op._replace(outs=outs))
    if is_random:
        # Python code now sees shapes that depend on random values. Under another seed= the replay
        # must find the same shapes; the empty digest means that values do not matter.
        before = len(writer.program.ops)
        writer.program.reads += [Read(ref, before, b"") for ref in outs if ref is not None]
    if not made:
        return None
    return made[0] if len(made) == 1 else tuple(made)


def _check_without_graph(info: OpInfo, args: Args) -> None:
    """Refuse an op whose results depend on whether a gradient is needed, if a gradient is.

    aten/src/ATen/native/sparse/SparseCsrTensorMath.cpp: the indices of amax and amin are computed
    only if an argument requires a gradient, which none does in a replay. The kernel of the backward
    pass uses them without a check, and the process would die.
    """
    finds = info.name == "aten::_sparse_mm_reduce_impl" and args[2] in ("amax", "amin")
    if finds and any(t.requires_grad for t in tensors_in(args, {})):
        raise RecordingError(
            f'torch.sparse.mm(..., "{args[2]}") of tensors that require a gradient cannot be '
            "recorded: call it under torch.no_grad(), or after lateinit.materialize()"
        )


def _run(
    writer: ProgramWriter, info: OpInfo, args: Args, kwargs: Kwargs
) -> tuple[Op, tuple[Any, ...]]:
    """Run an op; returns it as an ``Op`` without results, and the real results."""
    device = writer.device_for(kwargs, [t for t in tensors_in(args, {}) if t.is_meta])
    # Composite kernels pass on the device of a deferred argument, which is meta to them.
    args = tuple(device if _is_meta(value) else value for value in args)
    referred = tuple(writer.referred(value) for value in args)
    written = {k: writer.referred(v) for k, v in kwargs.items() if k != "generator"}
    ambient = writer.ambient_number()
    # The draw is noted before the run, so that the replay draws at its place in the stream.
    op = Op(info.name, referred, written, (), writer.draw(info, args, kwargs), ambient, None)
    execution = execution_of(writer.program)
    touched = dict.fromkeys(ref.storage for ref in (*op.read(), *op.written()))
    given = {n: computed.storage for n, computed in execution.values(touched).items()}
    try:
        with execution.session() as session, writer.program.ambients[ambient].in_force():
            return op, session.call(op, Memory(given), resizes=True)
    except BaseException:
        if op.draw is not None:
            writer.generators.undo(op.draw)
        raise


def _is_meta(value: Any) -> bool:
    return type(value) is torch.device and value == META


def _resized(writer: ProgramWriter, out: Tensor, real: Tensor) -> Tensor:
    """The deferred ``out=`` argument, resized to the shape of the op's result."""
    if out.shape != real.shape:
        out.resize_(real.shape)
        writer.adopt(out, writer.device_of(out))
    return out
