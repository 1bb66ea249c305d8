"""``materialize``, ``plan`` and ``is_deferred``: the public functions on deferred tensors.

The order is fixed: collect the wanted tensors by program, check everything that can fail before a
tensor changes, then execute the plan and place each storage as soon as it has its values. Come here
for a check that is missing, or for the order of two checks.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lateinit._distributed import agree, reads_nothing
from lateinit._materialize.scheduler import computed_whole, execute
from lateinit._program import Plan, Program, Step, plan_storages
from lateinit._progress import Progress
from lateinit._replay import Session, execution_of, one_thread
from lateinit._tensors import (
    Cast,
    Only,
    Wanted,
    bound_in,
    cast_to,
    described,
    find_tensors,
    is_deferred_tensor,
    modules_in,
    unbind,
    wanted_in,
)
from lateinit._torch import (
    Held,
    constants_of_script,
    digest,
    held_by_script,
    is_dtensor,
    is_out_of_memory,
    name_of_class,
    restoring,
    unhurried,
    without_modes,
)
from lateinit.errors import (
    ConstantChangedError,
    DeferredTensorError,
    MaterializeError,
    OutOfMemoryError,
    RecordingError,
    SeedError,
    ShardingError,
    listing,
)

T = TypeVar("T")


@restoring
@unhurried
def materialize(
    target: T,
    *,
    only: Only | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
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
    ``distribute_tensor``), each rank computes its own shards. The ranks exchange nothing but one
    digest.

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
            same construction from the same random state. This takes one all-gather of a few bytes
            along each mesh axis, so every rank must make this call. With False no rank is asked.

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
        ShardingError: the ranks disagree on what they recorded, or a placement has no part of a
            tensor that could be computed alone.
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
    cast = cast_to(device, dtype)
    if threads is not None and threads < 1:
        raise ValueError(f"threads={threads}: at least one thread has to fill tensors")
    if not isinstance(target, (nn.Module, Tensor, dict, list, tuple, set, frozenset)):
        raise TypeError(
            f"materialize takes a module, a tensor, or a container of them, not {type(target)}"
        )
    scripts = list(modules_in(target))
    check_script_constants(scripts)
    # Held from before the walk: as long as they live, the walk finds these tensor objects.
    held = held_by_script(scripts)
    wanted = wanted_in(target, only)
    for group in wanted:
        # Outside the lock, since this may wait for other ranks.
        _check_shards(group, seed, ask=check)
    with one_thread:
        for program in bound_in(target) | dict.fromkeys(group.program for group in wanted):
            check_seed(program, seed)
        for group in wanted:
            _leave_real(group)
            check_shared(group, cast)
        planned = [(group, plan_of(group), _session(group, seed)) for group in wanted]
        for group, plan_, session in planned:
            check_constants(group, plan_, session)
            check_holes(group, plan_, session)
        total = sum(shared.record.nbytes for g in wanted for shared in g.storages.values())
        try:
            with Progress("materialise", total, shown=progress) as bar:
                for group, plan_, session in planned:
                    group.program.seed = seed
                    _run(group, plan_, session, cast, threads, bar)
            _put_back(held)
        except BaseException:
            _put_back(held)
            raise
    if only is None:
        unbind(target)
    return target


def _put_back(held: Iterable[Held]) -> None:
    for script in held:
        script.put_back()


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


def plan_of(group: Wanted, storages: Iterable[int] | None = None) -> Plan:
    """The plan that computes the tensors of one program.

    Args:
        group: the selected tensors.
        storages: the storages to compute, by default all that are not real yet.
    """
    wanted = group.to_compute() if storages is None else storages
    names = tuple((deferred.name, deferred.ref) for deferred in group.tensors())
    return Plan(group.program, tuple(plan_storages(group.program, wanted)), names)


def _session(group: Wanted, seed: int | None) -> Session:
    return execution_of(group.program, seed).session()


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


def check_script_constants(modules: Iterable[nn.Module]) -> None:
    """Raise ``MaterializeError`` if a TorchScript graph has a deferred tensor for a constant."""
    for module in modules:
        for constant in constants_of_script(module):
            if is_deferred_tensor(constant):
                raise MaterializeError(
                    f"a graph of the TorchScript module {name_of_class(module)} holds "
                    f"{described(constant)} as a constant, which cannot be given values: freeze or "
                    "trace the module after lateinit.materialize()"
                )


def check_seed(program: Program, seed: int | None) -> None:
    """Raise ``SeedError`` if the construction would have run differently under ``seed``.

    A constructor that read a random value may have branched on it, and the program holds only the
    branch that was taken. Each recorded read is therefore replayed under ``seed`` and compared.
    """
    if seed is None:
        return
    if program.seed_bound:
        raise SeedError(f"seed={seed} cannot be honoured: while recording, {program.seed_bound}")
    execution = execution_of(program, seed)
    for read in program.reads:
        value = execution.value(read.ref, read.before)
        # A read without a digest recorded only that Python saw a shape; replay itself compares it.
        if read.digest and digest(value) != read.digest:
            reader = f"{read.name!r} realised itself with" if read.name else "the constructor read"
            raise SeedError(
                f"seed={seed} cannot be honoured: {reader} a random value ({read.ref}) and seed "
                f"{seed} gives another one; record again under that seed"
            )


def _leave_real(group: Wanted) -> None:
    """Drop the tensors that another thread has materialised since ``group`` was collected."""
    for number, shared in list(group.storages.items()):
        if shared.slot.real is not None:
            shared.tensors = [d for d in shared.tensors if is_deferred_tensor(d.tensor)]
            if not shared.tensors:
                del group.storages[number]


def _check_shards(group: Wanted, seed: int | None, *, ask: bool) -> None:
    """Raise ``ShardingError`` for shards that cannot be computed alone.

    Args:
        group: the selected tensors of one program.
        seed: the seed that replaces the recorded random state.
        ask: compare the recorded construction with that of the other ranks.
    """
    shards = [deferred for deferred in group.tensors() if is_dtensor(deferred.tensor)]
    if not shards:
        return
    partial = [shard.name for shard in shards if _is_partial(shard.tensor)]
    if partial:
        raise ShardingError(
            f"{listing(partial)}: a Partial placement holds terms of a sum, not parts of a tensor, "
            "so it has no initial values of its own: use Shard or Replicate"
        )
    empty = [s.name for s in shards if reads_nothing(group.program, s.ref.storage)]
    if empty:
        raise ShardingError(
            f"{listing(empty)}: sharded by a means that cannot be followed on deferred tensors: "
            "use distribute_tensor, parallelize_module or fully_shard"
        )
    if ask:
        agree({shard.name: shard.tensor for shard in shards}, group.program, seed)


def _is_partial(tensor: Any) -> bool:
    return any(placement.is_partial() for placement in tensor.placements)


def check_shared(group: Wanted, cast: Cast) -> None:
    """Raise if tensors on one storage cannot all have the dtype and device of ``cast``.

    Two cases fail: the tensors have several dtypes and a cast would change one of them, or the
    storage is real already and was cast or moved otherwise.
    """
    for shared in group.storages.values():
        real = shared.slot.real
        if shared.as_recorded or (real is None and len(shared.tensors) == 1):
            continue
        dtypes = {ref.dtype for ref in shared.refs}
        if len(dtypes) > 1 and dtypes != {cast.dtype_of(ref) for ref in shared.refs}:
            raise DeferredTensorError(
                f"{listing(map(repr, shared.names))} share one storage in several dtypes, so "
                f"dtype={cast.dtype} cannot be honoured for them"
            )
        if real is None:
            continue
        for deferred in shared.tensors:
            own, ref, before = deferred.device, deferred.ref, real.cast
            same_place = (before.device or own) == (cast.device or own)
            if not same_place or real.window(ref).dtype != cast.dtype_of(ref):
                raise DeferredTensorError(
                    f"{deferred.name!r} shares its memory with a tensor that was materialised with "
                    f"device={before.device}, dtype={before.dtype}: ask for the same"
                )


def check_constants(group: Wanted, plan_: Plan, session: Session) -> None:
    """Raise if real data has changed that some values are computed from.

    Args:
        group: the selected tensors of one program.
        plan_: what will be computed.
        session: reads the constants and compares their checksums.
    """
    program = group.program
    if all(constant.checksum is None for constant in program.constants):
        return
    for step in plan_.steps:
        try:
            with without_modes():
                for number in step.ops:
                    for constant in program.ops[number].constants():
                        session.constant(constant)
        except ConstantChangedError as error:
            raise ConstantChangedError(f"{group.names(step.gives)!r}: {error}") from None


def check_holes(group: Wanted, plan_: Plan, session: Session, filled: Collection[int] = ()) -> None:
    """Raise if a value is drawn after a lazy module whose shape is not known.

    Such a module draws an unknown number of words, so no later draw has a known position.

    Args:
        group: the selected tensors of one program.
        plan_: what will be computed.
        session: what it will be computed in.
        filled: the numbers of holes that will be filled before.
    """
    program = group.program
    if None not in program.holes:
        return
    for step in plan_.steps:
        draws = (program.ops[number].draw for number in step.ops)
        try:
            session.streams.check_known((draw for draw in draws if draw is not None), filled)
        except RecordingError as error:
            raise RecordingError(f"{group.names(step.gives)!r}: {error}") from None


def _run(
    group: Wanted,
    plan_: Plan,
    session: Session,
    cast: Cast,
    threads: int | None,
    bar: Progress,
) -> None:
    """Run the plan of one program, and realise each storage as soon as it has its values."""
    left = dict.fromkeys(number for step in plan_.steps for number in step.gives)
    with without_modes():
        # The other storages became real in an earlier call. The tensors left on them only share the
        # memory.
        for number in group.storages.keys() - left.keys():
            group.storages[number].share()
    running: Step | None = None
    try:
        with session:
            for step, run in execute(session, plan_.steps, threads):
                running = step
                results = run()
                for number in step.gives:
                    shared = group.storages[number]
                    shared.give(results.pop(number), cast)
                    bar.advance(shared.record.nbytes)
                    del left[number]
                running = None
    except Exception as error:
        # No step is running if `execute` failed while it started a later one, for example in
        # allocating memory: then everything that is left is named.
        names = group.names(left if running is None else running.gives)
        if is_out_of_memory(error):
            raise OutOfMemoryError(
                f"out of memory while materialising {names}; what was done before stands: free "
                "memory and call materialize() again, or materialise a part"
            ) from error
        if isinstance(error, (MaterializeError, ConstantChangedError)):
            raise type(error)(f"{names!r}: {error}") from (error.__cause__ or error)
        raise
