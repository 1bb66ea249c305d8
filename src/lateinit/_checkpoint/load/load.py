"""Load a checkpoint into a module: make a plan, then run it, one tensor after another.

Nothing changes until the plan is made, so every error before that leaves the module as it was.
"""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lateinit._checkpoint.formats import block_of, open_checkpoint
from lateinit._checkpoint.load.assign import Placer
from lateinit._checkpoint.load.compatibility import TensorNames
from lateinit._checkpoint.load.dry_run import caught, run
from lateinit._checkpoint.load.loaded import Loaded, computed_alone, report
from lateinit._checkpoint.load.plan import LoadPlan, plan_load
from lateinit._checkpoint.load.selection import AS_FOUND, Choice
from lateinit._checkpoint.load.sending import Link
from lateinit._checkpoint.load.stand_ins import Loading, Stands
from lateinit._distributed import Agreement, parts_of, ranks_of
from lateinit._lazy import NOT_ADOPTED
from lateinit._log import log
from lateinit._materialize import Filling, offload_of
from lateinit._progress import Progress
from lateinit._tensors import Casting, Deferred, Init, held
from lateinit._torch import is_dtensor
from lateinit.errors import CheckpointError, UninitializedError


def load_into(  # noqa: PLR0913 - options, all of them by keyword
    module: nn.Module,
    path: Path,
    casting: Casting,
    *,
    strict: bool,
    progress: bool,
    check: bool,
    choice: Choice = AS_FOUND,
    init: Init | None = None,
    offload_folder: str | os.PathLike[str] | None = None,
    source_rank: int | None = None,
) -> Loaded:
    """Load a checkpoint into a module; see ``load_checkpoint``."""
    ranks = ranks_of(module, "load_checkpoint()", ask=check)
    link = None if source_rank is None else Link(source_rank)
    serving = contextlib.nullcontext if link is None else link.serving
    opened = open_checkpoint if link is None else link.open
    with ranks.together("planning") as phase, serving("planning"):
        plan = plan_load(module, opened(path), casting, strict=strict, choice=choice, init=init)
        offload = offload_of(module, plan.names.distinct, plan.casts, offload_folder, None)
        if offload is not None:
            for group in plan.groups:
                offload.check(group.storages.values())
        if ranks:
            left, dtype_of = _shards_left(plan), plan.casts.dtype_of
            phase.compared = Agreement(ranks.shards, left, None, dtype_of, plan.files)
    with ranks.together("loading"), serving("loading"):
        loaded = _load(plan, path, progress=progress)
        if offload is not None:
            offload.finish()
    return loaded


def _shards_left(plan: LoadPlan) -> Iterator[Deferred]:
    """The shards that the checkpoint lacks."""
    for group, rest in zip(plan.groups, plan.rest, strict=True):
        computed = {number for step in rest.steps for number in step.gives}
        yield from (shard for shard in group.shards() if shard.ref.storage in computed)


def _load(plan: LoadPlan, path: Path, *, progress: bool) -> Loaded:
    """Execute a plan on this rank."""
    module = plan.module
    names, computed = plan.names, computed_alone(plan.names, plan.fitting)
    with Progress("load", plan.nbytes, shown=progress) as bar:
        _run(plan, bar)
    # Tensors that the checkpoint lacks are computed last. Hooks may have exchanged tensors, so the
    # module is searched again if any hook ran.
    left: Any = module
    if plan.rehearsal.plain:
        left = {f.name: f.tensor for f in names.distinct if f.deferred}
    else:
        names = TensorNames(module)
    Filling(left, _is_known, plan.casts, rules=plan.rules).run(progress=progress)
    found = report(names, path, plan.reader, plan.fitting, computed)
    counts = len(found.loaded), len(found.initialised), len(found.computed)
    log.info("%s: %d tensors loaded, %d initialised, %d computed", path, *counts)
    return found


def _is_known(_: str, tensor: Tensor) -> bool:
    """Whether a tensor has its shape; lazy modules that the checkpoint lacks may stay lazy."""
    return not is_lazy(tensor)


def _run(plan: LoadPlan, bar: Progress) -> None:
    """Make the copies of a plan."""
    reader, copies = plan.reader, plan.rehearsal.copies
    placer = Placer(plan.groups, plan.casts, plan.rules)
    uses = Counter(source for _, source in copies if isinstance(source, str))

    def put(target: Tensor, name: str, values: Callable[[], Tensor]) -> None:
        # A hook of its module may have left it lazy.
        if is_lazy(target):
            raise UninitializedError(f"{name} {NOT_ADOPTED}")
        # A target may take memory only if its source is read once: a hook may write to a loaded
        # tensor before the same data is read again.
        once = uses[name] == 1 and name not in plan.rehearsal.revealed
        take = plan.rehearsal.plain or (once and name not in reader.shared)
        placer.put(target, values(), take=take)
        bar.advance(reader.entries[name].nbytes)

    if not plan.rehearsal.plain:
        _run_hooks(plan, placer, put)
        return
    # `load_state_dict` would make exactly these copies.
    for number, (target, name) in enumerate(copies):
        if isinstance(name, str) and number not in plan.fitting.repeated:
            put(target, name, partial(reader.read, name))


def _run_hooks(plan: LoadPlan, placer: Placer, put: Callable[..., None]) -> None:
    """Run ``load_state_dict`` on stand-ins for the checkpoint; each copy puts real values."""
    module, reader, rehearsal = plan.module, plan.reader, plan.rehearsal
    stands = Stands(reader, plan.names.found)
    sharded = any(is_dtensor(found.tensor) for found in plan.names.distinct)
    copies = 0

    def on_copy(target: Tensor, source: Tensor) -> None:
        nonlocal copies
        copies += 1
        stands.reveal(target)
        name = stands.source(source)
        if name is None:
            stands.reveal(source)
            placer.reveal(source)
        read = partial(block_of, source)
        if name is not None:  # a rank reads only its own blocks
            read = partial(reader.read, name, alone=sharded)
        values = partial(_values_for, target, source, read, plan.names)
        if name is None:
            placer.put(target, values(), take=False)
        else:
            put(target, name, values)

    loading = Loading(stands, placer, on_copy)
    try:
        with loading, caught(module) as lists:
            run(module, stands, lists, strict=plan.strict)
    except Exception as error:
        # load_state_dict turns an exception in a copy into a message; raise the first exception
        # itself.
        raise loading.failure or error from error
    # Hooks may have kept stand-ins somewhere in the module.
    for tensor, _ in stands.kept(module):
        stands.reveal(tensor)
    # FSDP2's copies after loading (`reset_sharded_param`) have no counterpart in the dry run.
    as_often = sharded or copies == len(rehearsal.copies)
    if not as_often or lists[:2] != (rehearsal.missing, rehearsal.unexpected):
        raise CheckpointError(
            f"{type(module).__name__} loads {reader.path} in another way the second time than in "
            "the dry run, as its hooks keep state outside of it; it has changed by now: build it "
            "anew, materialise it, and give it the state dict by load_state_dict()"
        )


def _values_for(
    target: Tensor, source: Tensor, read: Callable[..., Tensor], names: TensorNames
) -> Tensor:
    """The values of a source for a tensor: the whole source, or this rank's part for a shard.

    Args:
        target: the tensor.
        source: the source, or a stand-in for it.
        read: reads a block of the source, given its offsets and its shape.
        names: the tensors of the module, for messages.
    """
    if not is_dtensor(target) or is_dtensor(source):
        return read((0,) * source.dim(), tuple(source.shape))
    parts = parts_of(target, next(iter(names.of(target)), "a shard"))
    if len(parts) == 1:
        return read(*parts[0].full)
    joined = torch.empty(held(target).shape, dtype=source.dtype, device="cpu")
    for part in parts:
        block_of(joined, *part.local).copy_(read(*part.full))
    return joined
