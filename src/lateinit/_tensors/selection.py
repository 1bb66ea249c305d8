"""Select the deferred tensors to materialise: ``only=`` patterns, and grouping by program."""

from __future__ import annotations

import contextlib
import fnmatch
import glob
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

from torch import Tensor, nn

from lateinit._program import Program
from lateinit._replay import execution_of
from lateinit._tensors.cast import Cast
from lateinit._tensors.casts import AS_IT_IS, Casting, Casts, agreed
from lateinit._tensors.deferred import Deferred
from lateinit._tensors.init_rules import Rules
from lateinit._tensors.realize import SharedStorage
from lateinit._tensors.slots import ON_META, Slot, slot_of
from lateinit._tensors.walk import Found, find_with_kept, modules_in
from lateinit._torch import is_dtensor, is_wrapper, without_subclass_functions
from lateinit.errors import (
    DeferredTensorError,
    NotRecordedError,
    PatternError,
    UninitializedError,
    candidates,
    listing,
)

# The programs of modules that may have no deferred tensor left to lead to them: see ``bind``.
_bound: weakref.WeakKeyDictionary[nn.Module, Program] = weakref.WeakKeyDictionary()
# The random states at the ends of blocks, by modules that have their values.
_ends: weakref.WeakKeyDictionary[nn.Module, bytes] = weakref.WeakKeyDictionary()

T = TypeVar("T")
Only = str | Iterable[str] | Callable[[str, Tensor], bool]


@dataclass(slots=True)
class Wanted:
    """The deferred tensors of one program to materialise, by number of their storage.

    ``program`` is ``recorded``, or an extension of it if ``init=`` has rules for some tensors.
    """

    program: Program
    recorded: Program
    storages: dict[int, SharedStorage] = field(default_factory=dict)

    def extend(self, rules: Rules, seed: int | None) -> None:
        """Have rules act on the finished values."""
        rules.extend(self.tensors(), seed)
        self.program = next(self.tensors()).program

    def to_compute(self) -> list[int]:
        """The storages that are not real yet; the memory of real ones is shared, not recomputed."""
        return [number for number, shared in self.storages.items() if shared.slot.real is None]

    def tensors(self) -> Iterator[Deferred]:
        """The tensors, storage by storage."""
        return (deferred for shared in self.storages.values() for deferred in shared.tensors)

    def shards(self) -> list[Deferred]:
        """The tensors that are shards: a ``DTensor`` each."""
        return [deferred for deferred in self.tensors() if is_dtensor(deferred.tensor)]

    def names(self, storages: Iterable[int]) -> str:
        """The names of the tensors on some storages, for a message."""
        return listing(name for number in storages for name in self.storages[number].names)


def bind(modules: Iterable[nn.Module], program: Program) -> None:
    """Note the program of modules, for when none of their tensors is deferred any more.

    It is still needed if no other seed can be honoured, or if ``settle_rng`` waits for the draws of
    lazy modules.
    """
    if program.seed_bound or program.reads or program.holes:
        _bound.update(dict.fromkeys(modules, program))


def bound_in(target: Any) -> dict[Program, None]:
    """The programs that the modules of a target are bound to."""
    programs = map(_bound.get, modules_in(target)) if _bound else ()
    return dict.fromkeys(program.merged() for program in programs if program is not None)


def unbind(target: Any, programs: Iterable[Program]) -> None:
    """Forget the programs of modules that have their values; keep the random states at their ends.

    Args:
        target: the module or container that has its values.
        programs: the programs that recorded it.
    """
    ends = {program: _end_of(program) for program in programs}
    known = set(ends.values())
    if isinstance(target, nn.Module) and len(known) == 1:
        _keep_end(target, *known)
    for module in modules_in(target) if _bound else ():
        program = _bound.get(module)
        if program is not None and None not in program.merged().holes:
            _keep_end(module, ends.get(program.merged()))
            del _bound[module]


def ends_in(target: Any) -> set[bytes]:
    """The random states at the ends of the constructions of modules that have their values."""
    return {_ends[module] for module in modules_in(target) if module in _ends}


def _keep_end(module: nn.Module, state: bytes | None) -> None:
    if state is not None:
        _ends[module] = state


def _end_of(program: Program) -> bytes | None:
    """The random state at the end of the construction, if it is known or lazy modules drew."""
    if program.end is None or None in program.holes:
        return None
    if program.holes:
        return execution_of(program, program.seed).state(program.end)
    return program.final if program.seed is None else None


def wanted_in(target: Any, only: Only | None, casts: Casting | Casts = AS_IT_IS) -> list[Wanted]:
    """The deferred tensors of ``target`` that ``only`` selects, grouped by program.

    All checks come before any tensor is touched, so that a refused call changes nothing.

    Args:
        target: the target.
        only: selects tensors, as for ``materialize``.
        casts: the device and dtype of each tensor.

    Raises:
        UninitializedError: a selected tensor is lazy.
        NotRecordedError: a selected tensor is on ``meta`` and was never recorded.
        DeferredTensorError: a selected shard has a gradient, or tensors on one storage cannot have
            the requested devices or dtypes.
        PatternError: a pattern matches nothing, or contradicts another one on a tensor.
    """
    every = find_with_kept(target)
    found, resolved = select(every, only), casts.over(target, every)
    pairs = _recorded(found)
    resolved.check_gaps(f for f, _ in pairs)
    groups: dict[Program, Wanted] = {}
    several: dict[Slot, list[tuple[Deferred, Cast, bool]]] = {}
    with without_subclass_functions():
        for item, slot in pairs:
            tensor = item.tensor
            if is_dtensor(tensor) and tensor.grad is not None:
                raise DeferredTensorError(
                    f"{item.name!r} was sharded while it had the gradient of its constructor, "
                    "which cannot be carried over: call zero_grad() on the module first"
                )
            deferred = Deferred(tensor, slot, item.name)
            program, number = deferred.program, deferred.ref.storage
            group = groups.get(program)
            if group is None:
                group = groups[program] = Wanted(program, program)
            shared = group.storages.get(number)
            kept, cast = item.kind == "kept", resolved.of(item)
            if shared is None:
                shared = group.storages[number] = SharedStorage(slot, [], kept, cast)
            elif slot not in several:
                several[slot] = [(shared.tensors[0], shared.cast, shared.as_recorded)]
            if slot in several:
                several[slot].append((deferred, cast, kept))
            shared.as_recorded = shared.as_recorded and kept
            shared.tensors.append(deferred)
    for group in groups.values():
        for shared in group.storages.values():
            if shared.slot in several:
                shared.cast = agreed(several[shared.slot])
    return list(groups.values())


def _recorded(found: list[Found]) -> list[tuple[Found, Slot]]:
    """The deferred tensors among those found, with slots; any other meta tensor raises."""
    lazy = [f.name for f in found if f.lazy]
    if lazy:
        raise UninitializedError(
            f"the shape is not known yet of {listing(lazy)}: call lateinit.infer_shapes(model, "
            "...) first, or materialise the rest with only="
        )
    pairs = [(f, slot_of(f.tensor)) for f in found]
    missing = [(f, slot) for f, slot in pairs if slot in (None, ON_META) and f.tensor.is_meta]
    wrappers = [f.name for f, _ in missing if is_wrapper(f.tensor)]
    if wrappers:
        raise NotRecordedError(
            f"made of other tensors, by a class that says itself where it is: {listing(wrappers)}. "
            "Wrap, or quantise, what lateinit.materialize() has given its values"
        )
    unknown = [f.name for f, slot in missing if slot is None]
    if unknown:
        raise NotRecordedError(
            f"on meta, but never recorded: {listing(unknown)}. Build the model inside "
            "`with lateinit.deferred():` instead of on torch.device('meta'), or leave out with "
            "only= what is to stay there"
        )
    return [(f, slot) for f, slot in pairs if slot is not None and slot is not ON_META]


def shards_in(target: Any, only: Only | None) -> dict[str, Tensor]:
    """The ``DTensor``s that patterns select, by name, real ones included.

    All of them if ``only`` is invalid or a function: the answers of a function may change as
    tensors become real, and this result must not.
    """
    found = find_with_kept(target)
    with contextlib.suppress(PatternError, TypeError):  # `wanted_in` raises it
        found = found if callable(only) else select(found, only)
    return {f.name: f.tensor for f in found if is_dtensor(f.tensor)}


def select(found: list[Found], only: Only | None) -> list[Found]:
    """The tensors of ``found`` that ``only`` selects under any of their names.

    Raises:
        PatternError: a pattern matches no tensor.
        TypeError: ``only`` is neither a pattern, nor patterns, nor a function.
    """
    if only is None:
        return found
    if callable(only):
        return [f for f in found if any(only(name, f.tensor) for name in f.names)]
    given: Any = [only] if isinstance(only, str) or not isinstance(only, Iterable) else only
    patterns: list[str] = list(given)
    if not all(isinstance(pattern, str) for pattern in patterns):
        raise TypeError(f"only={only!r}: a glob, several globs, or a function of (fqn, tensor)")
    return by_globs(found, patterns, lambda f: f.names)


def by_globs(
    rows: Iterable[T], patterns: Iterable[str], names: Callable[[T], Iterable[str]]
) -> list[T]:
    """The rows that have a name which matches a pattern: a glob, or a name that is the pattern.

    Raises:
        PatternError: a glob matches no name.
    """
    named = [(row, list(names(row))) for row in rows]
    every = [name for _, own in named for name in own]
    known = set(every)
    patterns = [glob.escape(p) if p in known else p for p in patterns]
    for pattern in patterns:
        if not fnmatch.filter(every, pattern):
            raise PatternError(
                f"only={pattern!r} matches no tensor; there are: {candidates(pattern, every)}"
            )
    return [
        row for row, own in named if any(fnmatch.fnmatchcase(n, p) for n in own for p in patterns)
    ]
