"""What ``load_state_dict`` would do to a module, found out without doing it.

Torch's own ``load_state_dict`` decides which tensor of a checkpoint goes where: hooks, versions and
overrides are part of it. It is run on stand-ins: meta tensors in the place of what the checkpoint
holds, and, in a rehearsal, in the place of what the module holds. Copies are noted.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lateinit._checkpoint.formats.base import Reader
from lateinit._checkpoint.load.module_stand_ins import shadowed
from lateinit._checkpoint.load.stand_ins import Loading, Stands
from lateinit._lazy.borrowed_model import on_meta
from lateinit._tensors.guard import DeferredTensor
from lateinit._tensors.realize import Cast
from lateinit._tensors.walk import find_tensors
from lateinit._torch.messages import is_misfit
from lateinit._torch.modules import load_state_dict_first, load_with_counter
from lateinit.errors import CheckpointError, LateinitError

_OWN_WAYS = ("load_state_dict", "_load_from_state_dict", "set_extra_state", "get_extra_state")
_PLAIN_WAYS = {"_load_from_state_dict": load_with_counter}
_COUNTER = "num_batches_tracked"
_PLAIN_TENSORS = (Tensor, nn.Parameter, DeferredTensor)


@dataclass(slots=True)
class Rehearsal:
    """What came of it: the problems, and every copy as (target, source).

    A source is a name in the checkpoint, a tensor computed from what is there, or None for a
    value that has nothing to do with it. ``revealed`` are the names whose values somebody wanted
    besides, ``failure`` is what torch raised of problems that are told in the other lists. If it is
    ``plain``, the copies are all that loading does.
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
    """The tensors of a state dict by name, if ``load_state_dict`` does nothing but copy into them.

    None if any part of the module has hooks, extra state or a way of its own to load, or tensors
    of a class of its own.
    """
    found: dict[str, Tensor] = {}
    classes: dict[type, bool] = {}
    return found if _collect(module, "", found, classes) else None


def _collect(
    part: nn.Module, prefix: str, found: dict[str, Tensor], classes: dict[type, bool]
) -> bool:
    """Note what one module would load, and those below it; whether all of it is plain."""
    own, cls = part.__dict__, type(part)
    if cls not in classes:
        own_ways = [n for n in _OWN_WAYS if getattr(cls, n, None) is not getattr(nn.Module, n)]
        classes[cls] = all(getattr(cls, n) is _PLAIN_WAYS.get(n) for n in own_ways)
    if (
        not classes[cls]
        or own["_load_state_dict_pre_hooks"]
        or own["_load_state_dict_post_hooks"]
        or "_spec" in own  # lazy, whose sizes come first
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


def _plainly(state: dict[str, Tensor], reader: Reader) -> Rehearsal | None:
    """What loading does to plain modules, if all that the checkpoint has fits as it is."""
    sources = dict(reader.aliases) | {name: name for name in reader.entries}
    if reader.objects or not reader.entries.keys() <= state.keys():
        return None
    result = Rehearsal(plain=True)
    for name, tensor in state.items():
        source = sources.get(name)
        if type(tensor) not in _PLAIN_TENSORS:
            return None
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
    cast: Cast,
    state: dict[str, Tensor] | None = None,
    *,
    strict: bool = False,
) -> Rehearsal:
    """Find out what loading a checkpoint would do; the module stays as it is.

    With the ``plain_state`` of a module there is nothing to be tried, unless something does not
    fit.

    Raises:
        CheckpointError: loading fails, other than by what does not fit.
    """
    plainly = None if state is None else _plainly(state, reader)
    if plainly is not None:
        return plainly
    names = {name for found in find_tensors(module) for name in found.names}
    found, failure = _rehearse(module, Stands(reader, names), cast, strict=strict)
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
    module: nn.Module, stands: Stands, cast: Cast, *, strict: bool
) -> tuple[Rehearsal, Exception | None]:
    result = Rehearsal()
    failure: Exception | None = None
    with shadowed(module, stands, cast) as shadows, caught(module) as lists:

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
    """``module.load_state_dict``, and what it finds missing and unexpected.

    One of a class's own may hand it on to other modules, whose lists are not seen, and must be told
    whether it is to be strict. Torch's own is to go on in any case: all problems are told at once.
    """
    own = getattr(module.load_state_dict, "__func__", None) is not nn.Module.load_state_dict
    found = module.load_state_dict(stands.fresh(), **({} if own and strict else {"strict": False}))
    for kept, more in zip(lists, found if own and isinstance(found, tuple) else (), strict=False):
        kept += [name for name in more if name not in kept]


@contextlib.contextmanager
def caught(module: nn.Module) -> Iterator[tuple[list[str], list[str], list[str]]]:
    """What ``load_state_dict`` finds missing, unexpected and wrong, while it is in force."""
    lists: tuple[list[str], list[str], list[str]] = ([], [], [])

    def catch(state: Any, prefix: str, metadata: Any, strict: bool, *found: list[str]) -> None:
        del state, prefix, metadata, strict
        for kept, own in zip(lists, found, strict=True):
            if kept is not own:
                held.append((kept, own))

    held: list[tuple[list[str], list[str]]] = []
    swap = torch.__future__.get_swap_module_params_on_conversion()
    handle = load_state_dict_first(module, catch)
    torch.__future__.set_swap_module_params_on_conversion(False)
    try:
        yield lists
    finally:
        torch.__future__.set_swap_module_params_on_conversion(swap)
        handle.remove()
        for kept, own in held:
            kept.extend(own)
