"""Select the deferred tensors to materialise: ``only=`` patterns, and grouping by program."""

from __future__ import annotations

import contextlib
import fnmatch
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from lateinit._program import Program
from lateinit._tensors.deferred import Deferred
from lateinit._tensors.realize import SharedStorage
from lateinit._tensors.slots import ON_META, slot_of
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

# Of modules constructed from random values that were read or are real already: their deferred
# tensors, if there are any, do not tell that ``seed=`` cannot be honoured.
_bound: weakref.WeakKeyDictionary[nn.Module, Program] = weakref.WeakKeyDictionary()

Only = str | Iterable[str] | Callable[[str, Tensor], bool]


@dataclass(slots=True)
class Wanted:
    """The deferred tensors of one program to materialise, by number of their storage."""

    program: Program
    storages: dict[int, SharedStorage] = field(default_factory=dict)

    def to_compute(self) -> list[int]:
        """The storages that are not real yet; what is real is shared, and not computed again."""
        return [number for number, shared in self.storages.items() if shared.slot.real is None]

    def tensors(self) -> Iterator[Deferred]:
        """The tensors, storage by storage."""
        return (deferred for shared in self.storages.values() for deferred in shared.tensors)

    def shards(self) -> list[Deferred]:
        """The tensors that are a ``DTensor``."""
        return [deferred for deferred in self.tensors() if is_dtensor(deferred.tensor)]

    def names(self, storages: Iterable[int]) -> str:
        """The names of the tensors on some storages, for a message."""
        return listing(name for number in storages for name in self.storages[number].names)


def bind(modules: Iterable[nn.Module], program: Program) -> None:
    """Note that another seed may not be honoured for modules, whatever their tensors are."""
    if program.seed_bound or program.reads:
        _bound.update(dict.fromkeys(modules, program))


def bound_in(target: Any) -> dict[Program, None]:
    """The programs that the modules of a target are bound to."""
    programs = map(_bound.get, modules_in(target)) if _bound else ()
    return dict.fromkeys(program.merged() for program in programs if program is not None)


def unbind(target: Any) -> None:
    """Forget the programs of modules that have their values."""
    for module in modules_in(target) if _bound else ():
        _bound.pop(module, None)


def wanted_in(target: Any, only: Only | None) -> list[Wanted]:
    """The deferred tensors of ``target`` that ``only`` selects, grouped by program.

    All checks come before any tensor is touched, so that a refused call changes nothing.

    Raises:
        UninitializedError: a selected tensor is lazy.
        NotRecordedError: a selected tensor is on ``meta`` and was never recorded.
        DeferredTensorError: a selected shard has a gradient.
    """
    found = select(find_with_kept(target), only)
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
    groups: dict[Program, Wanted] = {}
    with without_subclass_functions():
        for item, slot in pairs:
            if slot is None or slot is ON_META:
                continue
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
                group = groups[program] = Wanted(program)
            shared = group.storages.get(number)
            if shared is None:
                shared = group.storages[number] = SharedStorage(slot, [], as_recorded=True)
            shared.as_recorded = shared.as_recorded and item.kind == "kept"
            shared.tensors.append(deferred)
    return list(groups.values())


def shards_in(target: Any, only: Only | None) -> dict[str, Tensor]:
    """The ``DTensor``s that patterns select, by name, real ones too.

    All of them if ``only`` is wrong, or a function: what that says may change as tensors become
    real, and this must not.
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
    every = [name for f in found for name in f.names]
    for pattern in patterns:
        if not fnmatch.filter(every, pattern):
            raise PatternError(
                f"only={pattern!r} matches no tensor; there are: {candidates(pattern, every)}"
            )
    return [f for f in found if any(fnmatch.fnmatchcase(n, p) for n in f.names for p in patterns)]
