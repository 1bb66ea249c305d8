"""Load a checkpoint into a module: make a plan, then run it, one tensor after another.

Until the plan is made nothing changes, so that every error before that leaves the module as it was.
"""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lateinit._checkpoint.formats import Reader, StoredTensor, block_of, open_checkpoint
from lateinit._checkpoint.load.assign import Placer
from lateinit._checkpoint.load.compatibility import Fit, TensorNames, fit
from lateinit._checkpoint.load.dry_run import (
    Rehearsal,
    caught,
    plain_state,
    refuse_foreign,
    rehearse,
    run,
)
from lateinit._checkpoint.load.renamed import translated
from lateinit._checkpoint.load.selection import AS_FOUND, Choice, selected
from lateinit._checkpoint.load.sending import Link
from lateinit._checkpoint.load.stand_ins import Loading, Stands
from lateinit._distributed import Agreement, parts_of, ranks_of, refuse_sums
from lateinit._lazy import NOT_ADOPTED, known_shape, named_tensors, sizes_in
from lateinit._log import log
from lateinit._materialize import (
    Filling,
    check_constants,
    check_holes,
    check_shared,
    offload_of,
    plan_of,
)
from lateinit._program import Draw, Plan, Program
from lateinit._progress import Progress
from lateinit._recording import hole_of
from lateinit._replay import execution_of
from lateinit._tensors import (
    Casting,
    Casts,
    Deferred,
    Found,
    Init,
    Rules,
    Wanted,
    held,
    is_deferred_tensor,
    wanted_in,
)
from lateinit._torch import is_dtensor
from lateinit._units import format_bytes
from lateinit.errors import (
    CheckpointError,
    MismatchError,
    RecordingError,
    UninitializedError,
    listing,
)


@dataclass(frozen=True, slots=True)
class Loaded:
    """What ``load_checkpoint`` did: tensors by name, with dtype, shape and bytes.

    Attributes:
        path: the checkpoint.
        loaded: the names that have their values from the checkpoint, tied ones included.
        initialised: the names that the checkpoint lacks. A deferred tensor was initialised by its
            recorded construction; a real one was left as it was.
        computed: deferred tensors that no checkpoint holds, such as non-persistent buffers.
        unexpected: the tensors of the checkpoint that the model lacks.
        nbytes: the bytes that were loaded, tied tensors counted once.
        under: what the names of the checkpoint begin with and those of the module do not: the keys
            of the state dict in the file, and a prefix.
    """

    path: Path
    loaded: tuple[StoredTensor, ...]
    initialised: tuple[StoredTensor, ...]
    computed: tuple[StoredTensor, ...]
    unexpected: tuple[StoredTensor, ...]
    nbytes: int
    under: str = ""

    def __str__(self) -> str:
        under = f" (under {self.under!r})" if self.under else ""
        size = format_bytes(self.nbytes)
        lines = [f"{self.path}{under}: {len(self.loaded)} tensors loaded, {size}"]
        for what, entries in (
            ("initialised", self.initialised),
            ("computed", self.computed),
            ("unexpected", self.unexpected),
        ):
            if entries:
                size = format_bytes(sum(entry.nbytes for entry in entries))
                lines.append(f"  {what}: {len(entries)}, {size}")
                lines += [
                    f"    {entry.name} {entry.shape} {str(entry.dtype).removeprefix('torch.')}"
                    for entry in entries
                ]
        return "\n".join(lines)


@dataclass(frozen=True, slots=True)
class LoadPlan:
    """What loading a checkpoint into a module does. Making it has changed nothing; ``print`` it.

    Attributes:
        module: the module.
        reader: the checkpoint, with the names of the module.
        casts: the device and dtype that each deferred tensor gets.
        strict: whether both sides must have the same names.
        rules: the initialisers of what the checkpoint lacks.
        names: the tensors of the module.
        groups: its deferred tensors, by program.
        rehearsal: every copy. If it is ``plain``, nothing but these copies is done; otherwise
            ``load_state_dict`` runs once more, and its hooks with it.
        fitting: which names have their values from the checkpoint.
        rest: the plans that compute what the checkpoint lacks.
        files: the checkpoint's files, in words that tell them from others.
    """

    module: nn.Module
    reader: Reader
    casts: Casts
    strict: bool
    rules: Rules
    names: TensorNames
    groups: list[Wanted]
    rehearsal: Rehearsal
    fitting: Fit
    rest: tuple[Plan, ...]
    files: str

    @property
    def nbytes(self) -> int:
        """The bytes that are read."""
        sources = (source for _, source in self.rehearsal.copies)
        return sum(self.reader.entries[s].nbytes for s in sources if isinstance(s, str))

    def foreseen(self) -> Loaded:
        """What ``load_checkpoint`` will return."""
        computed = _computed(self.names, self.fitting)
        return _report(self.names, self.reader.path, self.reader, self.fitting, computed)

    def __str__(self) -> str:
        hooks = "" if self.rehearsal.plain else ", by load_state_dict and its hooks"
        count = len(self.rehearsal.copies)
        lines = [f"{self.reader}: {count} copies, {format_bytes(self.nbytes)}{hooks}"]
        for number, (target, source) in enumerate(self.rehearsal.copies):
            name = next(iter(self.names.of(target)), "a tensor of a hook")
            origin = source if isinstance(source, str) else "a value that a hook computes"
            again = ", read already" if number in self.fitting.repeated else ""
            lines.append(f"  {name} <- {origin}{again}")
        return "\n".join([*lines, *map(str, self.rest)])


def plan_load(
    module: nn.Module,
    reader: Reader,
    casting: Casting,
    *,
    strict: bool,
    choice: Choice = AS_FOUND,
    init: Init | None = None,
) -> LoadPlan:
    """Find out what loading a checkpoint does, and whether it can be done; see ``load_checkpoint``.

    The module is left as it was.
    """
    ours = TensorNames(module).saved()
    if choice or reader.homes:
        part = selected(type(module).__name__, ours, reader, choice)
        return _planned(module, part or reader, casting, init, strict)
    try:
        return _planned(module, reader, casting, init, strict)
    except MismatchError:
        # After all the ways in which a module can load it as it is: hooks, translated names.
        part = selected(type(module).__name__, ours, reader, choice)
        if part is None:
            raise
    return _planned(module, part, casting, init, strict)


def _planned(
    module: nn.Module, reader: Reader, casting: Casting, init: Init | None, strict: bool
) -> LoadPlan:
    files = reader.described()
    names, state = TensorNames(module), plain_state(module)
    casts, rules = casting.over(module, names.distinct), Rules(init, names.distinct)
    shaped = {f.name: f.tensor for f in names.distinct if not is_lazy(f.tensor)}
    groups = wanted_in(shaped, None, casts)
    shards = {found.name: found.tensor for found in names.distinct if is_dtensor(found.tensor)}
    refuse_sums(shards)
    for name, shard in shards.items():
        parts_of(shard, name)  # raises if it is not known where it lies
    for group in groups:
        check_shared(group)
    refuse_foreign(reader, state)
    reader = translated(module, reader, state)
    rehearsal = rehearse(module, reader, casts, state, strict=strict)
    sized: dict[str, nn.Module] = {}
    if any(found.lazy for found in names.distinct):
        wrong, sized = sizes_in(module, Stands(reader, names.found).state)
        rehearsal.wrong += [message for message in wrong if message not in rehearsal.wrong]
    fitting = fit(module, names, reader, rehearsal, lambda t: _dtype_of(t, casts), strict=strict)
    loaded = set(fitting.loaded)
    rules.leave(names.found[name].tensor for name in loaded)
    for group in groups:
        group.extend(rules, None)
    rest = tuple(plan_of(group, _left(group, loaded)) for group in groups)
    filled = {hole.resolve() for part in sized.values() if (hole := hole_of(part)) is not None}
    for group, plan in zip(groups, rest, strict=True):
        session = execution_of(group.program).session()
        check_constants(group, plan, session)
        check_holes(
            group, plan, session, {n for program, n, _ in filled if program is group.recorded}
        )
    _check_drawn(sized, filled, loaded)
    told = names, groups, rehearsal, fitting, rest, files
    return LoadPlan(module, reader, casts, strict, rules, *told)


def _check_drawn(
    sized: dict[str, nn.Module], filled: set[tuple[Program, int, Draw]], loaded: set[str]
) -> None:
    """Raise if a module that gets its sizes must draw values after one that stays lazy.

    Args:
        sized: the modules that get their sizes from the checkpoint, by path.
        filled: their holes.
        loaded: the names that have their values from the checkpoint.
    """
    for path, part in sized.items():
        names = [f"{path}.{name}".lstrip(".") for name, t in named_tensors(part) if is_lazy(t)]
        drawn, hole = [name for name in names if name not in loaded], hole_of(part)
        if not drawn or hole is None:
            continue
        program, _, place = hole.resolve()
        known = {number for other, number, _ in filled if other is program}
        try:
            execution_of(program).check_known([place], known)
        except RecordingError as error:
            raise RecordingError(f"{listing(drawn)!r}: {error}") from None


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
            phase.compared = Agreement(ranks.shards, _shards_left(plan), None, plan.files)
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
    """Do what a plan says, on this rank."""
    module = plan.module
    names, computed = plan.names, _computed(plan.names, plan.fitting)
    with Progress("load", plan.nbytes, shown=progress) as bar:
        _run(plan, bar)
    # What the checkpoint lacks is computed last. Hooks may have exchanged tensors, so that the
    # module is searched anew unless none ran.
    left: Any = module
    if plan.rehearsal.plain:
        left = {f.name: f.tensor for f in names.distinct if f.deferred}
    else:
        names = TensorNames(module)
    Filling(left, _is_known, plan.casts, rules=plan.rules).run(progress=progress)
    found = _report(names, path, plan.reader, plan.fitting, computed)
    counts = len(found.loaded), len(found.initialised), len(found.computed)
    log.info("%s: %d tensors loaded, %d initialised, %d computed", path, *counts)
    return found


def _is_known(_: str, tensor: Tensor) -> bool:
    """Whether a tensor has its shape; lazy modules that the checkpoint lacks may stay lazy."""
    return not is_lazy(tensor)


def _dtype_of(tensor: Tensor, casts: Casts) -> torch.dtype:
    """The dtype that a tensor will have; a real tensor keeps its own."""
    dtype = casts.of_tensor(tensor).dtype if is_deferred_tensor(tensor) else None
    return dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype


def _run(plan: LoadPlan, bar: Progress) -> None:
    """Make the copies of a plan."""
    reader, copies = plan.reader, plan.rehearsal.copies
    placer = Placer(plan.groups, plan.casts, plan.rules)
    uses = Counter(source for _, source in copies if isinstance(source, str))

    def put(target: Tensor, name: str, values: Callable[[], Tensor]) -> None:
        # A hook of its module may have left it so.
        if is_lazy(target):
            raise UninitializedError(f"{name} {NOT_ADOPTED}")
        # Only a tensor that is read once may be given away as memory: a hook may write to a loaded
        # tensor before the same data is read again.
        once = uses[name] == 1 and name not in plan.rehearsal.revealed
        take = plan.rehearsal.plain or (once and name not in reader.shared)
        placer.put(target, values(), take=take)
        bar.advance(reader.entries[name].nbytes)

    if not plan.rehearsal.plain:
        _run_hooks(plan, placer, put)
        return
    # `load_state_dict` would do nothing but these copies.
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
        if name is not None:  # a rank reads its share only
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
        # load_state_dict turns an exception in a copy into a message; the first one itself is
        # raised.
        raise loading.failure or error from error
    # Stand-ins that a hook kept somewhere in the module.
    for tensor, _ in stands.kept(module):
        stands.reveal(tensor)
    # FSDP2's copies after loading (`reset_sharded_param`) have no counterpart in the dry run.
    as_often = sharded or copies == len(rehearsal.copies)
    if not as_often or lists[:2] != (rehearsal.missing, rehearsal.unexpected):
        raise CheckpointError(
            f"{type(module).__name__} loads {reader.path} otherwise the second time than in the "
            "rehearsal, as its hooks keep something outside of it; it has changed by now: build it "
            "anew, materialise it, and give it the state dict by load_state_dict()"
        )


def _values_for(
    target: Tensor, source: Tensor, read: Callable[..., Tensor], names: TensorNames
) -> Tensor:
    """What a tensor takes of a source: all of it, or what a rank holds if it is a shard.

    Args:
        target: the tensor.
        source: the source, or a stand-in for it.
        read: reads a block of the source: where it starts, and its shape.
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


def _left(group: Wanted, loaded: set[str]) -> Iterator[int]:
    """The storages to compute: those whose values do not all come from the checkpoint."""
    for number in group.to_compute():
        shared = group.storages[number]
        if not any(d.name in loaded and d.is_whole() for d in shared.tensors):
            yield number


def _computed(names: TensorNames, fitting: Fit) -> list[Found]:
    """The deferred tensors that no checkpoint would hold."""
    known = {*fitting.loaded, *fitting.missing}
    return [f for f in names.distinct if f.deferred and not known.intersection(f.names)]


def _report(
    names: TensorNames, path: Path, reader: Reader, fitting: Fit, computed: list[Found]
) -> Loaded:
    loaded = _entries(names, fitting.loaded)
    distinct = {names.key(names.found[entry.name].tensor): entry.nbytes for entry in loaded}
    return Loaded(
        path=path,
        loaded=loaded,
        initialised=_entries(names, fitting.missing),
        computed=_entries(names, [found.name for found in computed]),
        unexpected=tuple(reader.entries[n] for n in fitting.unexpected if n in reader.entries),
        nbytes=sum(distinct.values()),
        under=reader.under,
    )


def _entries(names: TensorNames, wanted: Iterable[str]) -> tuple[StoredTensor, ...]:
    return tuple(
        StoredTensor(name, tensor.dtype, tuple(size or 0 for size in known_shape(tensor) or ()))
        for name in wanted
        if name in names.found and (tensor := names.found[name].tensor) is not None
    )
