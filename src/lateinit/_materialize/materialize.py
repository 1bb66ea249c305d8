"""``materialize``, ``plan`` and ``is_deferred``: the public functions on deferred tensors.

Arguments are checked here, and ranks asked. What is done is in ``filling.py``.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, TypeVar

from torch import Tensor, nn

from lateinit._distributed import Agreement, ranks_of
from lateinit._materialize.filling import Filling, plan_of
from lateinit._materialize.scheduler import computed_whole
from lateinit._program import Plan, Program
from lateinit._tensors import Devices, DTypes, Only, casting, find_tensors, wanted_in
from lateinit._torch import restoring, unhurried

T = TypeVar("T")


@restoring
@unhurried
def materialize(
    target: T,
    *,
    only: Only | None = None,
    device: Devices | None = None,
    dtype: DTypes | None = None,
    seed: int | None = None,
    threads: int | None = None,
    progress: bool = False,
    check: bool = True,
) -> T:
    """Give deferred tensors their storage and their values, in place.

    The values are bit for bit those of the eager twin, whichever tensors are materialised first.
    Tensor objects stay the same objects, so that optimizers, ties and hooks keep working, and
    tensors that share memory in the eager twin share it here. Tensors that are real already are
    left alone. The global random state is neither read nor moved.

    Each storage is allocated when its step of the plan starts. Memory peaks at the materialised
    tensors plus a bounded working set. Calls from several threads run one after another.

    If a model was sharded while it was deferred (``fully_shard``, ``parallelize_module``,
    ``distribute_tensor``), each rank computes its own shards. The ranks exchange nothing but
    digests.

    Args:
        target: a module, a tensor, or a list, tuple, set or dict of them.
        only: which tensors: a glob on their fully qualified names (``"*.bias"``), several globs, or
            a predicate ``(fqn, tensor) -> bool``. A tensor with several names is selected if any of
            them matches. By default all deferred tensors.
        device: where the tensors will be. By default the device that each tensor was recorded for;
            for a shard, the device type of its mesh (pass ``device="cpu"`` for FSDP2's CPU
            offloading). Values are computed on the recorded device and then copied.
        dtype: cast floating-point tensors to this dtype. By default each tensor keeps the dtype it
            has now.
        seed: as if ``torch.manual_seed(seed)`` had preceded the construction. By default the random
            state that really preceded it.
        threads: how many threads fill large tensors, by default ``torch.get_num_threads()``. The
            bits do not depend on it.
        progress: show a progress bar on stderr.
        check: before shards are filled, ask the other ranks of the mesh whether they recorded the
            same construction from the same random state and compute with the same kernels, and
            afterwards whether all of them have finished. Each takes one all-gather of a few bytes
            along each mesh axis, so every rank must make this call, whatever it has left to do.
            With False no rank is asked. A target without shards asks nobody.

    Returns:
        ``target`` itself.

    Raises:
        NotRecordedError: a selected tensor is on ``meta`` and was never recorded.
        UninitializedError: a selected tensor is lazy: its shape is not known yet.
        PatternError: a pattern of ``only`` matches no tensor.
        RecordingError: a selected tensor is drawn after a lazy module whose shape is not known yet.
        SeedError: the construction branched on a random value, and ``seed`` gives another one.
        ConstantChangedError: real data that the construction read has changed since.
        DeferredTensorError: tensors that share a storage cannot all have the dtype or device asked
            for, or a selected shard has a gradient.
        ShardingError: the ranks disagree on what they recorded or how they compute it, one of them
            failed or did not answer within the timeout of the process group, or a placement has no
            part of a tensor that could be computed alone.
        MaterializeError: a recorded op failed when it was replayed.
        OutOfMemoryError: memory ran out. Tensors that were materialised before stay so, and another
            call continues.
        TypeError: ``target`` is none of the above, or ``dtype`` is no ``torch.dtype``.
        ValueError: ``threads`` is less than 1, ``dtype`` is no floating-point dtype, or ``device``
            is ``meta``.

    Example:
        >>> with lateinit.deferred():
        ...     layer = torch.nn.Linear(4, 2)
        >>> lateinit.materialize(layer, only="weight").weight.device
        device(type='cpu')
        >>> lateinit.is_deferred(layer.bias)
        True
    """
    casts = casting(device, dtype)
    if threads is not None and threads < 1:
        raise ValueError(f"threads={threads}: at least one thread has to fill tensors")
    if not isinstance(target, (nn.Module, Tensor, dict, list, tuple, set, frozenset)):
        raise TypeError(
            f"materialize takes a module, a tensor, or a container of them, not {type(target)}"
        )
    ranks = ranks_of(target, "materialize()", only=only, ask=check)
    with ranks.together("preparing") as phase:
        filling = Filling(target, only, casts, seed)
        if ranks:
            filling.check()
            phase.compared = Agreement(ranks.shards, filling.left(), seed)
    with ranks.together("filling shards"):
        filling.run(threads=threads, progress=progress)
    return target


@restoring
@unhurried
def plan(target: Any, *, only: Only | None = None) -> Plan:
    """The plan that ``materialize(target, only=only)`` makes and runs; this only makes it.

    Nothing is allocated, drawn or changed.

    Args:
        target: a module, a tensor, or a container of them, as for ``materialize``.
        only: which tensors, as for ``materialize``.

    Returns:
        A ``Plan``; ``print`` it to see every op, with its place in the random stream, and which
        tensors a rank computes whole to keep a shard of them.

    Raises:
        ValueError: the tensors were recorded in several separate blocks, so that they have no
            common program.
        NotRecordedError: a selected tensor is on ``meta`` and was never recorded.
        UninitializedError: a selected tensor is lazy.
        PatternError: a pattern of ``only`` matches no tensor.

    Example:
        >>> with lateinit.deferred():
        ...     layer = torch.nn.Linear(4, 2, bias=False)
        >>> print(lateinit.plan(layer))  # doctest: +ELLIPSIS
        1 step, 1 of 1 recorded ops, 32 bytes
        ...
    """
    groups = wanted_in(target, only)
    if len(groups) > 1:
        raise ValueError("the target was recorded in several blocks: plan one part at a time")
    if not groups:
        return Plan(Program(), ())
    return replace(plan_of(groups[0]), whole=computed_whole)


@restoring
def is_deferred(target: Any) -> bool:
    """Whether a tensor is deferred, or any tensor of a module is.

    Args:
        target: a module, a tensor, or a container of them.

    Returns:
        True if at least one tensor has a recorded construction that has not run. Lazy tensors do
        not count: their shape is not known yet.

    Example:
        >>> lateinit.is_deferred(torch.nn.Linear(2, 2))
        False
    """
    return any(found.deferred for found in find_tensors(target))
