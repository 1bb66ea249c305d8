"""Find the effects of ``load_state_dict`` on a module, without changing the module.

torch's own ``load_state_dict`` decides which tensor of a checkpoint goes where: hooks, versions and
overrides are part of it. It runs on stand-ins: meta tensors for the checkpoint's tensors
(``stand_ins``) and, in the dry run, for the module's tensors too (``module_stand_ins``). Every
``target.copy_(source)`` is noted. For modules that only copy, the copies follow from the names, and
no dry run is needed (``plain_state``).
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lateinit._checkpoint.formats import Reader, foreign_in
from lateinit._checkpoint.load.module_stand_ins import shadowed
from lateinit._checkpoint.load.stand_ins import Loading, Stands
from lateinit._lazy import on_meta
from lateinit._tensors import Casts, find_tensors, is_ordinary
from lateinit._torch import is_misfit, load_state_dict_first, load_with_counter
from lateinit.errors import CheckpointError, CorruptCheckpointError, LateinitError, listing

# The methods that a class can override to change how it loads.
_OWN_WAYS = ("load_state_dict", "_load_from_state_dict", "set_extra_state", "get_extra_state")
# Batch norms override one of them (`_NormBase`, torch/nn/modules/batchnorm.py). It only adds a
# counter to state dicts that lack it, and `_plainly` does the same.
_PLAIN_WAYS = {"_load_from_state_dict": load_with_counter}
_COUNTER = "num_batches_tracked"


@dataclass(slots=True)
class Rehearsal:
    """The result of a dry run: the problems, and every copy as (target, source).

    Attributes:
        missing: names that the checkpoint lacks.
        unexpected: names that the module lacks.
        wrong: messages of ``load_state_dict``.
        copies: the copies. A source is a name in the checkpoint, a tensor computed from those of
            the checkpoint, or None for a value that does not depend on the checkpoint.
        replaced: parameters and buffers that a hook exchanged for other tensors.
        revealed: names whose values were needed for more than a copy.
        failure: the error that torch raised about problems in the other lists.
        plain: whether loading consists of these copies alone.
    """

    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    copies: list[tuple[Tensor, str | Tensor | None]] = field(default_factory=list)
    replaced: list[Tensor] = field(default_factory=list)
    revealed: set[str] = field(default_factory=set)
    failure: Exception | None = None
    plain: bool = False


def plain_state(module: nn.Module) -> dict[str, Tensor] | None:
    """The tensors of the state dict by name, if loading only copies into them.

    None if a part of the module has hooks, extra state, or a loading method of its own.
    """
    found: dict[str, Tensor] = {}
    classes: dict[type, bool] = {}
    return found if _collect(module, "", found, classes) else None


def _collect(
    part: nn.Module, prefix: str, found: dict[str, Tensor], classes: dict[type, bool]
) -> bool:
    """Add the tensors of a module and its children; False if a module does more than copy."""
    own, cls = part.__dict__, type(part)
    if cls not in classes:
        own_ways = [n for n in _OWN_WAYS if getattr(cls, n, None) is not getattr(nn.Module, n)]
        classes[cls] = all(getattr(cls, n) is _PLAIN_WAYS.get(n) for n in own_ways)
    if (
        not classes[cls]
        or own["_load_state_dict_pre_hooks"]
        or own["_load_state_dict_post_hooks"]
        or "_spec" in own  # a lazy module: its load hook takes the sizes first
        or not own.keys().isdisjoint(_OWN_WAYS)
    ):
        return False
    skipped = own["_non_persistent_buffers_set"]
    for name, tensor in own["_parameters"].items():
        if tensor is not None:
            found[prefix + name] = tensor
    for name, tensor in own["_buffers"].items():
        if tensor is not None and name not in skipped:
            found[prefix + name] = tensor
    return all(
        _collect(child, f"{prefix}{name}.", found, classes)
        for name, child in own["_modules"].items()
        if child is not None
    )


def refuse_foreign(reader: Reader, state: dict[str, Tensor] | None) -> None:
    """Raise if a module would get an object whose class is not unpickled.

    Args:
        reader: the checkpoint.
        state: the tensors of a plain module; None if its hooks may read any object.
    """
    asked = [name for name in reader.objects if state is None or name in state]
    told = {name: listing(sorted(set(foreign_in(reader.objects[name])))) for name in asked}
    found = [f"{name} ({classes})" for name, classes in told.items() if classes]
    if found:
        first = next(name for name, classes in told.items() if classes)
        raise CorruptCheckpointError(
            f"{reader} has objects of classes that are not unpickled, since that could run any "
            f"code: {listing(found)}. Leave them out by rename={{{first!r}: None}}, or save "
            "model.state_dict() without them"
        )


def _plainly(state: dict[str, Tensor], reader: Reader) -> Rehearsal | None:
    """The result for a plain module if everything fits; None if ``load_state_dict`` must run."""
    sources = dict(reader.aliases) | {name: name for name in reader.entries}
    if reader.objects or not reader.entries.keys() <= state.keys():
        return None
    result = Rehearsal(plain=True)
    for name, tensor in state.items():
        source = sources.get(name)
        if not is_ordinary(tensor):
            return None
        # `_NormBase._load_from_state_dict` adds the counter to a state dict that lacks it.
        if source is None and name.endswith(_COUNTER):
            return None
        if source is None:
            result.missing.append(name)
        elif tuple(tensor.shape) != reader.entries[source].shape:
            return None
        else:
            result.copies.append((tensor, source))
    return result


def rehearse(
    module: nn.Module,
    reader: Reader,
    casts: Casts,
    state: dict[str, Tensor] | None = None,
    *,
    strict: bool = False,
) -> Rehearsal:
    """Find the effects of loading a checkpoint; the module does not change.

    Args:
        module: the module.
        reader: the checkpoint.
        casts: the device and dtype that each deferred tensor gets.
        state: the ``plain_state`` of the module. With it, no code has to run if all shapes fit.
        strict: passed on to a class's own ``load_state_dict``.

    Raises:
        CheckpointError: loading fails for another reason than names and shapes.
    """
    plainly = None if state is None else _plainly(state, reader)
    if plainly is not None:
        return plainly
    names = {name for found in find_tensors(module) for name in found.names}
    found, failure = _rehearse(module, Stands(reader, names), casts, strict=strict)
    if isinstance(failure, LateinitError):
        raise failure
    if failure is not None and is_misfit(failure):
        found.failure = failure
    elif failure is not None and not found.wrong:
        raise CheckpointError(
            f"{type(module).__name__} cannot load {reader.path}: {failure}"
        ) from failure
    return found


def _rehearse(
    module: nn.Module, stands: Stands, casts: Casts, *, strict: bool
) -> tuple[Rehearsal, Exception | None]:
    result = Rehearsal()
    failure: Exception | None = None
    with shadowed(module, stands, casts) as shadows, caught(module) as lists:

        def on_copy(target: Tensor, source: Tensor) -> None:
            stands.reveal(target)
            original = shadows.original(target)
            name = stands.source(source)
            other = on_meta(source) if stands.gave(source) else None
            result.copies.append((original, name if name is not None else other))
            shadows.copy(target, source)

        loading = Loading(stands, shadows, on_copy)
        try:
            with loading, warnings.catch_warnings(record=True):
                run(module, stands, lists, strict=strict)
        except Exception as error:  # noqa: BLE001 - a hook may fail in any way
            failure = loading.failure or error
        result.replaced = shadows.replaced(module)
        result.revealed = stands.revealed | {name for _, name in stands.kept(module)}
    result.missing, result.unexpected, result.wrong = map(list, lists)
    return result, failure


def run(module: nn.Module, stands: Stands, lists: tuple[list[str], ...], *, strict: bool) -> None:
    """Call ``module.load_state_dict``, and add what it returns to the lists.

    torch's own method always runs with ``strict=False``, so that all problems are found at once. A
    class's own method may pass the state dict on to other modules, whose lists are not seen, so it
    gets the caller's ``strict``.
    """
    own = getattr(module.load_state_dict, "__func__", None) is not nn.Module.load_state_dict
    found = module.load_state_dict(stands.fresh(), **({} if own and strict else {"strict": False}))
    for kept, more in zip(lists, found if own and isinstance(found, tuple) else (), strict=False):
        kept += [name for name in more if name not in kept]


@contextlib.contextmanager
def caught(module: nn.Module) -> Iterator[tuple[list[str], list[str], list[str]]]:
    """A block that collects the missing and unexpected names and messages of ``load_state_dict``.

    ``Module.load_state_dict`` passes its lists to every pre-hook. A pre-hook that runs before all
    others keeps references to them, so that they can be read even if a class's own
    ``load_state_dict`` does not return them.
    """
    lists: tuple[list[str], list[str], list[str]] = ([], [], [])

    def catch(state: Any, prefix: str, metadata: Any, strict: bool, *found: list[str]) -> None:
        del state, prefix, metadata, strict
        for kept, own in zip(lists, found, strict=True):
            if kept is not own:
                held.append((kept, own))

    held: list[tuple[list[str], list[str]]] = []
    swap = torch.__future__.get_swap_module_params_on_conversion()
    handle = load_state_dict_first(module, catch)
    # With this setting on, `_load_from_state_dict` swaps tensors instead of copying, and there is
    # no copy to intercept.
    torch.__future__.set_swap_module_params_on_conversion(False)
    try:
        yield lists
    finally:
        torch.__future__.set_swap_module_params_on_conversion(swap)
        handle.remove()
        for kept, own in held:
            kept.extend(own)
