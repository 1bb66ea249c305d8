"""``materialize``, ``plan`` and ``is_deferred``: the public functions on deferred tensors.

This module checks arguments and compares ranks; ``filling.py`` does the work.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, TypeVar

from torch import Tensor, nn

from lateinit._distributed import Agreement, ranks_of
from lateinit._materialize.filling import Filling, plan_of
from lateinit._materialize.offload import offload_of
from lateinit._materialize.scheduler import computed_whole
from lateinit._program import Plan, Program
from lateinit._tensors import (
    AS_IT_IS,
    NO_RULES,
    Casting,
    Casts,
    Devices,
    DTypes,
    Found,
    Init,
    Only,
    Rules,
    casting,
    find_tensors,
    select,
    told,
    wanted_in,
)
from lateinit._torch import restoring, unhurried

T = TypeVar("T")


@restoring
@unhurried
def materialize(  # noqa: PLR0913 - options, all of them by keyword
    target: T,
    *,
    only: Only | None = None,
    device: Devices | None = None,
    dtype: DTypes | None = None,
    init: Init | None = None,
    offload_folder: str | os.PathLike[str] | None = None,
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
    ``distribute_tensor``), each rank computes its own shards. The ranks exchange only digests.

    Args:
        target: a module, a tensor, or a list, tuple, set or dict of them.
        only: the tensors to materialise: a glob on their fully qualified names (``"*.bias"``),
            several globs, or a predicate ``(fqn, tensor) -> bool``. A tensor with several names is
            selected if any of them matches. By default all deferred tensors.
        device: the device of the materialised tensors. By default the device that each tensor was
            recorded for; for a shard, the device type of its mesh (pass ``device="cpu"`` for
            FSDP2's CPU offloading). Values are computed on the recorded device and then copied. Or
            a map from names, as in accelerate: ``{"encoder": "cuda:0", "*": "cpu"}``. A pattern is
            a glob, or the name of a tensor, or of a module and everything below it; the most
            specific pattern wins. A map must match every parameter and buffer. ``"auto"`` is the
            map that accelerate infers. ``"disk"``, for everything or in a map, writes parameters to
            ``offload_folder`` one at a time and leaves them on ``meta``, with accelerate's hooks,
            which load them in each forward.
        dtype: cast floating-point parameters and buffers of the state dict to this dtype. By
            default each tensor keeps the dtype it has now. Other buffers, plain attributes, and
            tensors that ``transformers`` or ``diffusers`` keep in float32 keep theirs in any case.
            Or a map from names: ``{"*norm*": torch.float32, "*": torch.bfloat16}``. A pattern that
            matches only tensors which a single dtype would not cast does cast them.
        init: initialisers that act on the finished values, by name, as ``nn.init.f_(p)`` after
            construction would: ``{"*.o_proj.weight": lateinit.init.normal(std=0.01), "lm_head":
            "zeros"}``. A value is one of ``lateinit.init``, its name, a function of ``nn.init``, or
            any function that initialises a tensor in place. A pattern acts on the parameters that
            it matches, or, if it matches none, on all its tensors. Each initialiser draws from a
            generator of its own, which starts from the recorded random state and the name. No other
            value changes, and values computed from the old value stay.
        offload_folder: the folder to which ``device="disk"`` writes.
        seed: as if ``torch.manual_seed(seed)`` had preceded the construction. By default the random
            state that really preceded it.
        threads: how many threads fill large tensors, by default ``torch.get_num_threads()``. The
            bits do not depend on it.
        progress: show a progress bar on stderr.
        check: before shards are filled, compare with the other ranks of the mesh whether all
            recorded the same construction from the same random state and compute with the same
            kernels, and afterwards whether all of them have finished. Each comparison takes one
            all-gather of a few bytes along each mesh axis, so every rank must make this call, even
            if it has nothing left to compute. With False, or for a target without shards, there is
            no communication.

    Returns:
        ``target`` itself.

    Raises:
        NotRecordedError: a selected tensor is on ``meta`` and was never recorded.
        UninitializedError: a selected tensor is lazy: its shape is not known yet.
        PatternError: a pattern matches no tensor, or two patterns that are equally specific, or
            that match two names of one tensor, have different values.
        DeviceError: this machine does not have the device.
        InitError: a value of ``init`` is no initialiser, or does not fit its tensor.
        RecordingError: a selected tensor is drawn after a lazy module whose shape is not known yet.
        SeedError: the construction branched on a random value, and ``seed`` gives another one.
        ConstantChangedError: real data that the construction read has changed since.
        DeferredTensorError: tensors that share a storage cannot all have the requested dtype or
            device, or a selected shard has a gradient.
        ShardingError: the ranks differ in what they recorded or how they compute it, or a rank
            failed or did not answer within the timeout of the process group, or a shard cannot be
            computed on its own.
        MaterializeError: a recorded op failed when it was replayed.
        OutOfMemoryError: memory ran out. Tensors that were materialised before stay so, and another
            call continues.
        TypeError: ``target`` is of another type, ``dtype`` is no ``torch.dtype``, or ``seed`` is no
            integer.
        ValueError: ``threads`` is less than 1, ``dtype`` is no floating-point dtype, ``seed`` is
            outside the range of ``torch.manual_seed``, or ``device`` is ``meta``.

    Example:
        >>> with lateinit.deferred():
        ...     layer = torch.nn.Linear(4, 2)
        >>> lateinit.materialize(layer, only="weight").weight.device
        device(type='cpu')
        >>> lateinit.is_deferred(layer.bias)
        True
    """
    casts: Casting | Casts = casting(device, dtype)
    if threads is not None and threads < 1:
        raise ValueError(f"threads={threads}: at least one thread has to fill tensors")
    if not isinstance(target, (nn.Module, Tensor, dict, list, tuple, set, frozenset)):
        raise TypeError(
            f"materialize takes a module, a tensor, or a container of them, not {type(target)}"
        )
    ranks = ranks_of(target, "materialize()", only=only, ask=check)
    with ranks.together("preparing") as phase:
        rules, offload = _rules(target, init), None
        if device is not None or ranks:
            found = find_tensors(target)
            casts = casts.over(target, found)
            offload = offload_of(target, found, casts, offload_folder, only)
        filling = Filling(target, only, casts, seed, rules, offload)
        if isinstance(casts, Casts) and ranks:
            filling.check()
            phase.compared = Agreement(ranks.shards, filling.left(), seed, casts.dtype_of)
    with ranks.together("filling shards"):
        filling.run(threads=threads, progress=progress)
    return target


def _rules(target: Any, init: Init | None) -> Rules:
    return NO_RULES if init is None else Rules(init, find_tensors(target))


@restoring
@unhurried
def plan(
    target: Any,
    *,
    only: Only | None = None,
    device: Devices | None = None,
    dtype: DTypes | None = None,
    init: Init | None = None,
    seed: int | None = None,
) -> Plan:
    """Make the plan that ``materialize`` with these arguments would execute, without executing it.

    Nothing is allocated, drawn or changed.

    Args:
        target: a module, a tensor, or a container of them, as for ``materialize``.
        only: selects tensors, as for ``materialize``.
        device: as for ``materialize``.
        dtype: as for ``materialize``.
        init: as for ``materialize``.
        seed: as for ``materialize``.

    Returns:
        A ``Plan``; ``print`` it to see every op, with its place in the random stream, and which
        tensors a rank computes whole to keep a shard of them. If ``device``, ``dtype`` or ``init``
        is given, it lists for each tensor what it gets, or the reason why it is left alone.

    Raises:
        ValueError: the tensors were recorded in several separate blocks, so that they have no
            common program.
        NotRecordedError: a selected tensor is on ``meta`` and was never recorded.
        UninitializedError: a selected tensor is lazy.
        PatternError: as for ``materialize``.
        DeviceError: as for ``materialize``.
        InitError: as for ``materialize``.
        DeferredTensorError: as for ``materialize``.

    Example:
        >>> with lateinit.deferred():
        ...     layer = torch.nn.Linear(4, 2, bias=False)
        >>> print(lateinit.plan(layer))  # doctest: +ELLIPSIS
        1 step, 1 of 1 recorded ops, 32 bytes
        ...
    """
    casts, found = casting(device, dtype), find_tensors(target)
    resolved, rules = casts.over(target, found), _rules(target, init)
    groups = wanted_in(target, only, resolved)
    if len(groups) > 1:
        raise ValueError("the target was recorded in several blocks: plan one part at a time")
    if not groups:
        return Plan(Program(), ())
    groups[0].extend(rules, seed)
    notes = _notes(select(found, only), resolved, rules) if casts != AS_IT_IS or rules else ()
    return replace(plan_of(groups[0]), whole=computed_whole, notes=tuple(notes))


def _notes(found: list[Found], casts: Casts, rules: Rules) -> Iterator[str]:
    """For each deferred tensor, its device, dtype and rule, or why it is left alone."""
    for each in found:
        rule = rules.of(each.tensor)
        if not each.deferred:
            if rule is not None:
                yield f"{each.name}: real already, left alone by {told(rule)}"
            continue
        cast, left = casts.of(each), casts.left_alone(each)
        dtype = str(each.tensor.dtype).removeprefix("torch.")
        if cast.dtype is not None and each.tensor.is_floating_point():
            dtype = f"{dtype} -> {str(cast.dtype).removeprefix('torch.')}"
        parts = [f"{', '.join(each.names)}: {dtype}"]
        parts += [f"on {cast.device}"] if cast.device is not None else []
        parts += [f"by {told(rule)}"] if rule is not None else []
        parts += [f"left alone: {left}"] if left is not None else []
        yield ", ".join(parts)


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
