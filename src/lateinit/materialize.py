"""Putting values into deferred tensors, in place.

The tensor objects stay: each gets the real tensor's implementation (``_swap_tensor_impl``, which
keeps hooks and weak references), so optimizers, ties and closures hold what they held.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lateinit.errors import (
    ConstantChangedError,
    DeferredTensorError,
    MaterializeError,
    NotRecordedError,
    OutOfMemoryError,
    PatternError,
    SeedError,
    ShardingError,
    UninitializedError,
    candidates,
    is_out_of_memory,
    listing,
)
from lateinit.execute import execute
from lateinit.memory import allocate
from lateinit.plan import Plan, Step, plan_storages
from lateinit.program import Program, TensorRef
from lateinit.progress import Progress
from lateinit.ranks import agree
from lateinit.replay import Replay, without_modes
from lateinit.sharding import reads_nothing
from lateinit.tensors import (
    ON_META,
    DeferredTensor,
    Slot,
    held,
    is_dtensor,
    locate,
    slot_of,
    unguard,
)
from lateinit.values import digest
from lateinit.walk import Found, find_tensors

T = TypeVar("T")
_CAST_FIRST = "; cast it before it is sharded, or by materialize(dtype=)"
Only = str | Iterable[str] | Callable[[str, Tensor], bool]


@dataclass(slots=True)
class Wanted:
    """The deferred tensors of one program that are to be materialised, by storage."""

    program: Program
    tensors: dict[int, list[tuple[str, Tensor, Slot, TensorRef]]] = field(default_factory=dict)


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
    state is neither read nor moved. Tensors that are real already are left alone.

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
        check_seed(group.program, seed)
        check_shared(group, cast)
    total = sum(g.program.storages[n].nbytes for g in wanted for n in g.tensors)
    with Progress("materialise", total, shown=progress) as bar:
        for group in wanted:
            _materialize(group, cast, seed, threads, bar)
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


def wanted_in(target: Any, only: Only | None) -> list[Wanted]:
    """The deferred tensors that are asked for, by program; all checked before any is touched."""
    found = select(find_tensors(target), only)
    lazy = [f.name for f in found if f.lazy]
    if lazy:
        raise UninitializedError(
            f"the shape is not known yet of {listing(lazy)}: call lateinit.infer_shapes(model, "
            "...) first, or materialise the rest with only="
        )
    pairs = [(f, slot_of(f.tensor)) for f in found]
    unknown = [f.name for f, slot in pairs if slot is None and f.tensor.is_meta]
    if unknown:
        raise NotRecordedError(
            f"on meta, but never recorded: {listing(unknown)}. Build the model inside "
            "`with lateinit.deferred():` instead of on torch.device('meta')"
            + (_CAST_FIRST if any(is_dtensor(f.tensor) for f in found) else "")
        )
    groups: dict[int, Wanted] = {}
    with torch._C.DisableTorchFunctionSubclass():
        for item, slot in pairs:
            if slot is None or slot is ON_META:
                continue
            tensor = item.tensor
            if tensor.is_leaf and tensor.grad is not None:
                raise DeferredTensorError(
                    f"{item.name!r} has a gradient that was computed in a deferred constructor, "
                    "which cannot be carried over: call zero_grad() on the module first"
                )
            program, number = slot.resolve()
            group = groups.get(id(program))
            if group is None:
                group = groups[id(program)] = Wanted(program)
            entry = (item.name, tensor, slot, TensorRef.of(held(tensor), number))
            group.tensors.setdefault(number, []).append(entry)
    return list(groups.values())


def select(found: list[Found], only: Only | None) -> list[Found]:
    """Those of some tensors that ``only`` names."""
    if only is None:
        return found
    if callable(only):
        return [f for f in found if any(only(name, f.tensor) for name in f.names)]
    given: Any = [only] if isinstance(only, str) or not isinstance(only, Iterable) else only
    patterns: list[str] = list(given)
    if not all(isinstance(pattern, str) for pattern in patterns):
        raise TypeError(f"only={only!r}: a glob, several globs, or a function of (fqn, tensor)")
    every = [name for f in found for name in f.names]
    for pattern in patterns:
        if not fnmatch.filter(every, pattern):
            raise PatternError(
                f"only={pattern!r} matches no tensor; there are: {candidates(pattern, every)}"
            )
    return [f for f in found if any(fnmatch.fnmatchcase(n, p) for n in f.names for p in patterns)]


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


def _materialize(
    group: Wanted, cast: Cast, seed: int | None, threads: int | None, bar: Progress
) -> None:
    replay = Replay(group.program, seed)
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


@dataclass(frozen=True, slots=True)
class Cast:
    """Where values go after they are computed."""

    device: torch.device | None
    dtype: torch.dtype | None

    def dtype_of(self, ref: TensorRef) -> torch.dtype:
        wanted = self.dtype is not None and ref.dtype.is_floating_point
        return self.dtype if wanted and self.dtype is not None else ref.dtype

    def storage(self, storage: torch.UntypedStorage, refs: list[TensorRef]) -> Any:
        """A storage moved and cast as a whole, so that tensors which share it still do."""
        if self.device is None and self.dtype is None:
            return storage
        dtypes = {ref.dtype for ref in refs}
        new = {self.dtype_of(ref) for ref in refs}
        dtype = dtypes.pop()
        if new == {dtype} or len(new) > 1:
            dtype = torch.uint8
            new = {dtype}
        whole = torch.empty(0, dtype=dtype, device=storage.device).set_(storage)
        return whole.to(device=self.device, dtype=new.pop()).untyped_storage()


def place(
    tensors: list[tuple[str, Tensor, Slot, TensorRef]],
    storage: Any,
    cast: Cast,
    strides: dict[TensorRef, tuple[int, ...]],
    window: tuple[TensorRef, Tensor] | None = None,
) -> None:
    """Let the tensors that share a storage have it, now that it is real.

    ``window`` is a tensor on it that nobody else has, and what it shows.
    """
    slot = tensors[0][2]
    if slot.real is None:
        device = home(tensors[0][1], storage.device, cast.device)
        if device is not cast.device:
            cast = replace(cast, device=device)
        whole, storage = storage, cast.storage(storage, [ref for *_, ref in tensors])
        window = window if storage is whole else None
    for _, tensor, _, ref in tensors:
        shown = ref
        if cast.dtype is not None or ref in strides:
            shown = ref._replace(dtype=cast.dtype_of(ref), stride=strides.get(ref, ref.stride))
        if window is not None and window[0] == shown:
            give(tensor, shown, storage, window[1])
            window = None
        else:
            give(tensor, shown, storage)
    slot.real, slot.cast = storage, (cast.device, cast.dtype)


def home(
    tensor: Any, recorded: torch.device, asked: torch.device | None = None
) -> torch.device | None:
    """Where a tensor is to be moved, if anywhere: a shard to the devices of its mesh."""
    if asked is None and is_dtensor(tensor) and tensor.device_mesh.device_type != recorded.type:
        kind = tensor.device_mesh.device_type
        return torch.device(kind, torch.get_device_module(kind).current_device())
    return asked


def give(
    tensor: Tensor, ref: TensorRef, storage: torch.UntypedStorage, window: Tensor | None = None
) -> None:
    """Make a deferred tensor object a window on a real storage, or take over one."""
    if is_dtensor(tensor):
        give(held(tensor), ref, storage, window)
        _rewrap(tensor)
        return
    inference = tensor.is_inference()
    if window is not None and window.is_inference() == inference:
        _swap(tensor, window)
    elif inference == torch.is_inference_mode_enabled():
        _swap(tensor, ref.on(storage))
    else:
        with torch.inference_mode(inference):
            _swap(tensor, ref.on(storage))
    unguard(tensor)


def _swap(tensor: Tensor, real: Tensor) -> None:
    if tensor.is_leaf or tensor.is_inference():
        real.requires_grad_(tensor.requires_grad)
    else:
        with torch.enable_grad():
            real = _Detached.apply(real.requires_grad_())  # type: ignore[no-untyped-call]
    hooks, grad_hooks = tensor._backward_hooks, tensor._post_accumulate_grad_hooks
    torch._C._swap_tensor_impl(tensor, real)
    # Autograd keeps hooks in the implementation that was swapped out: hang them on the new one.
    if hooks is not None:
        tensor._backward_hooks = hooks
    if grad_hooks is not None:
        tensor._post_accumulate_grad_hooks = grad_hooks


def _rewrap(tensor: Any) -> None:
    """Let a ``DTensor`` object know that its local shard is on another device now."""
    local = tensor._local_tensor
    _swap(tensor, type(tensor)(local, tensor._spec, requires_grad=tensor.requires_grad))
    tensor._local_tensor = local


def cast_to(device: torch.device | str | None, dtype: torch.dtype | None) -> Cast:
    """Where values are to go, checked before anything is touched."""
    if dtype is not None and not dtype.is_floating_point:
        raise ValueError(f"dtype={dtype}: weights are cast to a floating-point dtype")
    where = None if device is None else torch.device(device)
    if where is not None and where.type == "meta":
        raise ValueError("device='meta': materialised tensors need a device that has memory")
    if where is not None:
        torch.empty(0, device=where)  # raises torch's own error if the device is not there
    return Cast(where, dtype)


class _Detached(torch.autograd.Function):
    """Stands where a graph built in the constructor stood: it cannot be gone through."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise DeferredTensorError(
            "this tensor was computed from parameters in a deferred constructor; its graph was not "
            "recorded: compute it again, in forward or after materialising"
        )


def adopt(tensor: Tensor, source: Tensor) -> None:
    """``tensor.copy_(source)`` for a deferred tensor: it becomes real, with those values."""
    slot, program, ref = locate(tensor)
    if slot.real is None and not program.covers(ref):
        slot.real = Replay(program).values([ref.storage])[ref.storage]
    adopt_uninitialized(tensor)
    with torch.no_grad():
        tensor.copy_(source)


def adopt_uninitialized(tensor: Tensor, device: torch.device | str | None = None) -> None:
    """Give a deferred tensor memory, shared with those on its storage, and no values."""
    slot, program, ref = locate(tensor)
    with without_modes():
        if slot.real is None:
            known = program.storages[ref.storage]
            slot.real = allocate(known.nbytes, torch.device(device or known.device))
        give(tensor, ref, slot.real)


DeferredTensor.adopt = staticmethod(adopt)
