"""Plan the loading of a checkpoint into a module, before anything changes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn
from torch.nn.parameter import is_lazy

from lateinit._checkpoint.formats import Reader
from lateinit._checkpoint.load.compatibility import Fit, TensorNames, fit
from lateinit._checkpoint.load.dry_run import Rehearsal, plain_state, refuse_foreign, rehearse
from lateinit._checkpoint.load.loaded import Loaded, computed_alone, report
from lateinit._checkpoint.load.renamed import translated
from lateinit._checkpoint.load.selection import AS_FOUND, Choice, selected
from lateinit._checkpoint.load.stand_ins import Stands
from lateinit._distributed import parts_of, refuse_sums
from lateinit._lazy import named_tensors, sizes_in
from lateinit._materialize import check_constants, check_holes, check_shared, plan_of
from lateinit._program import Draw, Plan, Program
from lateinit._recording import hole_of
from lateinit._replay import execution_of
from lateinit._tensors import Casting, Casts, Init, Rules, Wanted, wanted_in
from lateinit._torch import is_dtensor
from lateinit._units import format_bytes
from lateinit.errors import MismatchError, RecordingError, listing


@dataclass(frozen=True, slots=True)
class LoadPlan:
    """The steps to load a checkpoint into a module. Making a plan changes nothing; ``print`` it.

    Attributes:
        module: the module.
        reader: the checkpoint, with the names of the module.
        casts: the device and dtype that each deferred tensor gets.
        strict: whether module and checkpoint must have the same names.
        rules: the initialisers of tensors that the checkpoint lacks.
        names: the tensors of the module.
        groups: its deferred tensors, by program.
        rehearsal: every copy. If it is ``plain``, only these copies are made; otherwise
            ``load_state_dict`` runs again, and its hooks with it.
        fitting: which names get their values from the checkpoint.
        rest: the plans that compute the tensors that the checkpoint lacks.
        files: a text that identifies the checkpoint's files.
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
        """The result that ``load_checkpoint`` will return."""
        computed = computed_alone(self.names, self.fitting)
        return report(self.names, self.reader.path, self.reader, self.fitting, computed)

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
    """Plan and check the loading of a checkpoint; see ``load_checkpoint``.

    The module is left as it was.
    """
    ours = TensorNames(module).saved()
    if choice or reader.homes:
        part = selected(type(module).__name__, ours, reader, choice)
        return _planned(module, part or reader, casting, init, strict)
    try:
        return _planned(module, reader, casting, init, strict)
    except MismatchError:
        # Only if the module cannot load the checkpoint as it is, by hooks or translated names.
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
        parts_of(shard, name)  # raises if its place in the full tensor is not known
    for group in groups:
        check_shared(group)
    refuse_foreign(reader, state)
    reader = translated(module, reader, state)
    rehearsal = rehearse(module, reader, casts, state, strict=strict)
    sized: dict[str, nn.Module] = {}
    if any(found.lazy for found in names.distinct):
        wrong, sized = sizes_in(module, Stands(reader, names.found).state)
        rehearsal.wrong += [message for message in wrong if message not in rehearsal.wrong]
    fitting = fit(module, names, reader, rehearsal, casts.dtype_of, strict=strict)
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
    """Raise if a module that gets its sizes must draw values after a module that stays lazy.

    Args:
        sized: the modules that get their sizes from the checkpoint, by path.
        filled: the holes of these modules.
        loaded: the names that get their values from the checkpoint.
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


def _left(group: Wanted, loaded: set[str]) -> Iterator[int]:
    """The storages to compute: those whose values do not all come from the checkpoint."""
    for number in group.to_compute():
        shared = group.storages[number]
        if not any(d.name in loaded and d.is_whole() for d in shared.tensors):
            yield number
