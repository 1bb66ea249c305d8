"""Running the ops that deferred tensors need, and giving each tensor its storage and values."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lateinit._distributed.rank_agreement import agree
from lateinit._distributed.shard_ranges import reads_nothing
from lateinit._materialize.scheduler import execute
from lateinit._program.plan import Plan, Step, needed_ops, plan_storages
from lateinit._program.program import Program, TensorRef
from lateinit._progress import Progress
from lateinit._replay.replay import Replay
from lateinit._tensors.realize import Cast, cast_to, place
from lateinit._tensors.selection import Only, Wanted, wanted_in
from lateinit._tensors.slots import is_deferred_tensor
from lateinit._tensors.walk import find_tensors
from lateinit._torch.messages import is_out_of_memory
from lateinit._torch.modes import without_modes
from lateinit._torch.storage import digest
from lateinit._torch.wrappers import is_dtensor
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
# Replaying sets what holds for the whole process, and tensors on one storage are to share one.
_one_thread = threading.RLock()


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

    Bit for bit what eager construction gives, whatever is materialised first. The global random
    state is neither read nor moved. Tensors that are real already are left alone. Of several
    threads that call this at once, one materialises after the other.

    Of a model that was sharded while it was deferred (``fully_shard``, ``parallelize_module``,
    ``distribute_tensor``) each rank computes its own shards, and nothing is sent but one digest.

    Args:
        target: a module, a tensor, or a list, tuple or dict of them.
        only: which tensors: a glob on their fully qualified names (``"*.bias"``), several of
            them, or a predicate ``(fqn, tensor) -> bool``. A tensor with several names is taken
            if one of them matches.
        device: where to put them; by default the device that each was recorded for, and of a
            shard that of its mesh (``device="cpu"`` for FSDP2's CPU offloading). Values are
            computed where they were recorded for, then copied while the next are computed.
        dtype: cast floating-point tensors to this; by default each keeps the dtype it has now.
        seed: as if ``torch.manual_seed(seed)`` had preceded the construction; by default the
            random state that really did.
        threads: how many threads fill large tensors, by default ``torch.get_num_threads()``; the
            bits are the same for any number.
        progress: show a progress bar on stderr.
        check: before shards are filled, ask the other ranks of their mesh whether they recorded
            the same construction from the same random state: one all-gather of a few bytes along
            each axis, for which all of them must call this. False asks nobody.

    Returns:
        ``target`` itself.

    Raises:
        NotRecordedError: a wanted tensor is on ``meta`` and was never recorded.
        UninitializedError: a wanted tensor is lazy: its shape is not known yet.
        PatternError: a pattern of ``only`` matches no tensor.
        RecordingError: a wanted tensor is drawn after a lazy module, whose shape is not known yet.
        SeedError: the construction branched on a random value, and ``seed`` gives another one.
        ConstantChangedError: real data that the construction read has changed since.
        ShardingError: ranks disagree on what they recorded, or a shard's placement is one that
            no part of a tensor can be computed for.
        OutOfMemoryError: memory ran out; what was materialised stands, and calling again
            continues.

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
    wanted = wanted_in(target, only)
    for group in wanted:
        _check_shards(group, seed, ask=check)
    with _one_thread:
        for group in wanted:
            _leave_real(group)
            check_seed(group.program, seed)
            check_shared(group, cast)
        replays = [Replay(group.program, seed) for group in wanted]
        for group, replay in zip(wanted, replays, strict=True):
            check_constants(group, replay)
            check_holes(group, replay)
        total = sum(g.program.storages[n].nbytes for g in wanted for n in g.tensors)
        with Progress("materialise", total, shown=progress) as bar:
            for group, replay in zip(wanted, replays, strict=True):
                _materialize(group, cast, replay, threads, bar)
    return target


def plan(target: Any, *, only: Only | None = None) -> Plan:
    """What ``materialize(target, only=only)`` would run, without running it.

    Returns:
        A ``Plan``; ``print`` it to see every op, with its place in the random stream.

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
    group = groups[0]
    names = tuple((name, ref) for found in group.tensors.values() for name, _, _, ref in found)
    return Plan(group.program, tuple(plan_storages(group.program, group.tensors)), names)


def is_deferred(target: Any) -> bool:
    """Whether a tensor is deferred, or any tensor of a module is.

    Example:
        >>> lateinit.is_deferred(torch.nn.Linear(2, 2))
        False
    """
    return any(found.deferred for found in find_tensors(target))


def check_seed(program: Program, seed: int | None) -> None:
    """Raise where another seed would have sent the constructor another way."""
    if seed is None:
        return
    if program.seed_bound:
        raise SeedError(f"seed={seed} cannot be honoured: while recording, {program.seed_bound}")
    replay = Replay(program, seed)
    for read in program.reads:
        value = replay.value(read.ref, read.before)
        if read.digest and digest(value) != read.digest:
            raise SeedError(
                f"seed={seed} cannot be honoured: the constructor read a random value "
                f"({read.ref}) and seed {seed} gives another one; record again under that seed"
            )


def _leave_real(group: Wanted) -> None:
    """Ask no more for what another thread has materialised since."""
    for number, tensors in list(group.tensors.items()):
        if tensors[0][2].real is not None:
            left = [entry for entry in tensors if is_deferred_tensor(entry[1])]
            group.tensors[number] = left
            if not left:
                del group.tensors[number]


def _check_shards(group: Wanted, seed: int | None, *, ask: bool) -> None:
    """Raise where shards hold no part of a recorded tensor, or other ranks recorded another one."""
    shards: dict[str, tuple[Any, TensorRef]] = {}
    for tensors in group.tensors.values():
        for name, tensor, _, ref in tensors:
            if is_dtensor(tensor):
                shards[name] = tensor, ref
    if not shards:
        return
    partial = [name for name, (tensor, _) in shards.items() if _is_partial(tensor)]
    if partial:
        raise ShardingError(
            f"{listing(partial)}: a Partial placement holds terms of a sum, not parts of a tensor, "
            "so it has no initial values of its own: use Shard or Replicate"
        )
    empty = [n for n, (_, ref) in shards.items() if reads_nothing(group.program, ref.storage)]
    if empty:
        raise ShardingError(
            f"{listing(empty)}: sharded by a means that cannot be followed on deferred tensors: "
            "use distribute_tensor, parallelize_module or fully_shard"
        )
    if ask:
        agree({name: tensor for name, (tensor, _) in shards.items()}, group.program, seed)


def _is_partial(tensor: Any) -> bool:
    return any(placement.is_partial() for placement in tensor.placements)


def check_shared(group: Wanted, cast: Cast) -> None:
    """Raise where a storage that is real already was asked for in another dtype or place."""
    for tensors in group.tensors.values():
        name, _, slot, shown = tensors[0]
        if slot.real is None and len(tensors) == 1:
            continue
        dtypes = {ref.dtype for *_, ref in tensors}
        if len(dtypes) > 1 and dtypes != {cast.dtype_of(ref) for *_, ref in tensors}:
            raise DeferredTensorError(
                f"{listing(repr(n) for n, *_ in tensors)} share one storage in several dtypes, so "
                f"dtype={cast.dtype} cannot be honoured for them"
            )
        own = group.program.storages[shown.storage].device
        before = Cast(*slot.cast)
        same_place = (before.device or own) == (cast.device or own)
        same_dtype = before.dtype_of(shown) == cast.dtype_of(shown)
        if slot.real is not None and not (same_place and same_dtype):
            raise DeferredTensorError(
                f"{name!r} shares its memory with a tensor that was materialised with "
                f"device={slot.cast[0]}, dtype={slot.cast[1]}: ask for the same"
            )


def check_constants(group: Wanted, replay: Replay, storages: Iterable[int] | None = None) -> None:
    """Raise where real data have changed that some storages, by default all, are computed from."""
    program = group.program
    if all(constant.checksum is None for constant in program.constants):
        return
    wanted = group.tensors if storages is None else storages
    wanted = [number for number in wanted if group.tensors[number][0][2].real is None]

    def read(targets: Iterable[int]) -> set[int]:
        return {n for op in needed_ops(program, targets) for n in program.ops[op].constants()}

    for number in sorted(read(wanted)):
        try:
            with without_modes():
                replay.constant(number)
        except ConstantChangedError as error:
            found = [storage for storage in wanted if number in read([storage])]
            names = listing(name for storage in found for name, *_ in group.tensors[storage])
            raise ConstantChangedError(f"{names!r}: {error}") from None


def check_holes(group: Wanted, replay: Replay) -> None:
    """Raise where a value is drawn after a lazy module of which no shape is known yet."""
    program = group.program
    if None not in program.holes:
        return
    wanted = (number for number, found in group.tensors.items() if found[0][2].real is None)
    for step in plan_storages(program, wanted):
        draws = (program.ops[number].draw for number in step.ops)
        try:
            replay.streams.check_known(draw for draw in draws if draw is not None)
        except RecordingError as error:
            names = listing(name for number in step.gives for name, *_ in group.tensors[number])
            raise RecordingError(f"{names!r}: {error}") from None


def _materialize(
    group: Wanted, cast: Cast, replay: Replay, threads: int | None, bar: Progress
) -> None:
    done = {n for n, tensors in group.tensors.items() if tensors[0][2].real is not None}
    with without_modes():
        for number in done:
            place(group.tensors[number], group.tensors[number][0][2].real, cast, {})
    steps = plan_storages(group.program, (n for n in group.tensors if n not in done))
    left = dict.fromkeys(number for step in steps for number in step.gives)
    running: Step | None = None
    try:
        with replay.session():
            for step, run in execute(replay, steps, threads):
                running = step
                storages = run()
                for number in step.gives:
                    window = replay.windows.pop(number, None)
                    place(group.tensors[number], storages.pop(number), cast, replay.strides, window)
                    bar.advance(group.program.storages[number].nbytes)
                    del left[number]
                running = None
    except Exception as error:
        failed = left if running is None else running.gives
        names = listing(name for n in failed for name, *_ in group.tensors[n])
        if is_out_of_memory(error):
            raise OutOfMemoryError(
                f"out of memory while materialising {names}; what was done before stands: free "
                "memory and call materialize() again, or materialise a part"
            ) from error
        if isinstance(error, (MaterializeError, ConstantChangedError)):
            raise type(error)(f"{names!r}: {error}") from (error.__cause__ or error)
        raise
