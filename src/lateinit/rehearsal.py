"""What ``load_state_dict`` would do to a module, found out without doing it.

Torch's own ``load_state_dict`` decides which tensor of a checkpoint goes where: hooks, versions and
overrides are part of it. It is run on stand-ins: meta tensors in the place of what the checkpoint
holds, and, in a rehearsal, in the place of what the module holds. Copies are noted.
"""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode

from lateinit.arguments import tensors_in
from lateinit.errors import CheckpointError
from lateinit.reader import Reader
from lateinit.replay import flat
from lateinit.tensors import DeferredTensor, is_deferred_tensor, is_dtensor, is_parameter
from lateinit.walk import find_tensors

_OWN_WAYS = ("load_state_dict", "_load_from_state_dict", "set_extra_state", "get_extra_state")
_PLAIN_TENSORS = (Tensor, nn.Parameter, DeferredTensor)
_ASKS = frozenset(
    {
        Tensor.size,
        Tensor.dim,
        Tensor.ndimension,
        Tensor.numel,
        Tensor.nelement,
        Tensor.element_size,
        Tensor.stride,
        Tensor.is_floating_point,
        Tensor.is_complex,
        Tensor.is_contiguous,
        Tensor.__len__,
        Tensor.__hash__,
        Tensor.untyped_storage,
    }
)


class Stands:
    """A state dict of stand-ins for what a checkpoint holds.

    ``real`` names those whose values a hook of the module computes with: they are read.
    """

    def __init__(self, reader: Reader, names: Collection[str], real: Collection[str]) -> None:
        self.reader = reader
        self.sources: dict[int, str] = {}
        self.derived: dict[int, Tensor] = {}  # kept, so that no other tensor gets its id
        self.state: OrderedDict[str, Any] = OrderedDict(reader.objects)
        wanted = {name: name for name in reader.entries}
        wanted |= {name: kept for name, kept in reader.aliases.items() if name in names}
        for name, source in wanted.items():
            entry = reader.entries[source]
            if source in real:
                stand = reader.read(source).clone()  # a hook may write to it
            else:
                stand = torch.empty(entry.shape, dtype=entry.dtype, device="meta")
            self.state[name] = stand
            self.sources[id(stand)] = source
        for value in self.state.values():
            if isinstance(value, Tensor):
                self.derived[id(value)] = value
        if reader.versions is not None:
            self.state._metadata = reader.versions  # type: ignore[attr-defined]

    def source(self, tensor: Tensor) -> str | None:
        """The name in the checkpoint that a tensor stands for, unless it was written to."""
        written = not tensor.is_inference() and tensor._version > 0
        return None if written else self.sources.get(id(tensor))


class Loading(TorchFunctionMode):
    """Hands on every ``target.copy_(source)``, and notes which stand-ins are computed with."""

    def __init__(self, stands: Stands, on_copy: Callable[[Tensor, Tensor], None]) -> None:
        super().__init__()
        self._stands = stands
        self._on_copy = on_copy
        self.touched: set[str] = set()
        self.failure: Exception | None = None

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func == Tensor.is_meta.__get__ and is_deferred_tensor(args[0]):  # type: ignore[attr-defined]
            return False  # asked only in order to warn that a copy into meta does nothing
        if func is Tensor.copy_ and len(args) > 1 and isinstance(args[1], Tensor):
            try:
                self._on_copy(args[0], args[1])
            except Exception as error:
                self.failure = self.failure or error  # load_state_dict would make it a message
                raise
            return args[0]
        known = self._stands.derived
        given = [t for t in tensors_in(args, kwargs) if id(t) in known]
        if not given or func in _ASKS:
            return func(*args, **kwargs)
        sources = {self._stands.source(t) for t in given} - {None}
        asks = getattr(func, "__name__", "") == "__get__"
        if not asks:
            self.touched |= {name for name in sources if name is not None}
        result = func(*args, **kwargs)
        made = [leaf for leaf in flat(result) if isinstance(leaf, Tensor)]
        if made and asks:
            self.touched |= {name for name in sources if name is not None}
        known.update({id(leaf): leaf for leaf in made})
        return result


@dataclass(slots=True)
class Rehearsal:
    """What came of it: the problems, and every copy as (target, source).

    A source is a name in the checkpoint, a tensor computed from what is there, or None for a
    value that has nothing to do with it. If it is ``plain``, the copies are all that loading does.
    """

    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    copies: list[tuple[Tensor, str | Tensor | None]] = field(default_factory=list)
    replaced: list[Tensor] = field(default_factory=list)
    real: set[str] = field(default_factory=set)
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
        classes[cls] = all(getattr(cls, n, None) is getattr(nn.Module, n) for n in _OWN_WAYS)
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
        if source is None:
            result.missing.append(name)
        elif tuple(tensor.shape) != reader.entries[source].shape:
            return None
        else:
            result.copies.append((tensor, source))
    return result


def rehearse(
    module: nn.Module, reader: Reader, state: dict[str, Tensor] | None = None
) -> Rehearsal:
    """Find out what loading a checkpoint would do; the module stays as it is.

    A hook that computes with values gets them, in a second or third try. With the ``plain_state``
    of a module there is nothing to be tried, unless something does not fit.
    """
    plainly = None if state is None else _plainly(state, reader)
    if plainly is not None:
        return plainly
    names = {name for found in find_tensors(module) for name in found.names}
    real: set[str] = set()
    while True:
        found, failure = _rehearse(module, Stands(reader, names, real))
        if found.real <= real:
            break
        real |= found.real
    if failure is not None and not found.wrong:
        raise CheckpointError(
            f"{type(module).__name__} cannot load {reader.path}: {failure}"
        ) from failure
    found.real = real
    return found


def _rehearse(module: nn.Module, stands: Stands) -> tuple[Rehearsal, Exception | None]:
    result = Rehearsal()
    failure = None
    with shadowed(module, stands.state) as shadows, caught(module) as lists:

        def on_copy(target: Tensor, source: Tensor) -> None:
            original = shadows.originals.get(id(target), target)
            name = stands.source(source)
            other = source if id(source) in stands.derived else None
            result.copies.append((original, name if name is not None else other))

        loading = Loading(stands, on_copy)
        try:
            with loading, warnings.catch_warnings():
                warnings.simplefilter("ignore")
                module.load_state_dict(copy.copy(stands.state), strict=False)
        except Exception as error:  # noqa: BLE001 - a hook may fail in any way
            failure = error
        result.real |= loading.touched
        for original, now in shadows.replaced():
            result.replaced.append(original)
            result.real |= _shown(stands, now)
    result.missing, result.unexpected, result.wrong = map(list, lists)
    return result, failure


def _shown(stands: Stands, tensor: Any) -> set[str]:
    """The stand-ins that a tensor of the module came to be."""
    if not isinstance(tensor, Tensor):
        return set()
    key = tensor.untyped_storage()._cdata
    return {
        source
        for name, stand in stands.state.items()
        if isinstance(stand, Tensor)
        and (source := stands.source(stand)) is not None
        and stand.untyped_storage()._cdata == key
    }


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
    handle = module._register_load_state_dict_pre_hook(catch)
    torch.__future__.set_swap_module_params_on_conversion(False)
    try:
        yield lists
    finally:
        torch.__future__.set_swap_module_params_on_conversion(swap)
        handle.remove()
        for kept, own in held:
            kept.extend(own)


class Shadows:
    """Meta tensors in the place of a module's own."""

    def __init__(self, state: dict[str, Any]) -> None:
        self._state = state
        self._of: dict[int, tuple[Tensor, Tensor]] = {}
        self.originals: dict[int, Tensor] = {}
        self._places: list[tuple[dict[str, Any], str, Tensor, Tensor]] = []

    def put(self, holder: dict[str, Any], prefix: str) -> dict[str, Any]:
        """A copy of a dict of tensors, with shadows in it."""
        copied = copy.copy(holder)
        for name, tensor in holder.items():
            if tensor is not None:
                shadow = self._shadow(tensor, prefix + name)
                copied[name] = shadow
                self._places.append((copied, name, tensor, shadow))
        return copied

    def _shadow(self, tensor: Tensor, name: str) -> Tensor:
        if id(tensor) not in self._of:
            shadow: Tensor = torch.empty(
                self._shape(tensor, name), dtype=tensor.dtype, device="meta"
            )
            if is_parameter(tensor):
                shadow = nn.Parameter(shadow, tensor.requires_grad)
            self._of[id(tensor)] = tensor, shadow
            self.originals[id(shadow)] = tensor
        return self._of[id(tensor)][1]

    def _shape(self, tensor: Tensor, name: str) -> tuple[int, ...]:
        """A placeholder takes the checkpoint's shape; whether it may is checked apart."""
        if not is_lazy(tensor):
            return tuple(tensor.shape)
        loaded = self._state.get(name)
        return tuple(loaded.shape) if isinstance(loaded, Tensor) else ()

    def replaced(self) -> Iterator[tuple[Tensor, Any]]:
        """What was not copied into but exchanged: the tensor, and what stands there now."""
        for holder, name, tensor, shadow in self._places:
            if holder.get(name) is not shadow:
                yield tensor, holder.get(name)


@contextlib.contextmanager
def shadowed(module: nn.Module, state: dict[str, Any]) -> Iterator[Shadows]:
    """Have shadows in a module's place; afterwards all of its attributes are what they were."""
    shadows = Shadows(state)
    saved: list[tuple[nn.Module, dict[str, Any]]] = []
    try:
        for path, part in module.named_modules():
            saved.append((part, dict(part.__dict__)))
            prefix = f"{path}." if path else ""
            for key, value in part.__dict__.items():
                if type(value) in (dict, list, set, OrderedDict):
                    part.__dict__[key] = value.copy()
            for key in ("_parameters", "_buffers"):
                part.__dict__[key] = shadows.put(saved[-1][1][key], prefix)
            if any(map(is_dtensor, saved[-1][1]["_parameters"].values())):
                # FSDP2 looks at its shards again afterwards; here it would find none.
                part.__dict__["_load_state_dict_post_hooks"] = OrderedDict()
            if type(part).set_extra_state is not nn.Module.set_extra_state:
                part.__dict__["set_extra_state"] = _forget
        yield shadows
    finally:
        for part, attributes in saved:
            part.__dict__.clear()
            part.__dict__.update(attributes)


def _forget(state: Any) -> None:
    """Takes the place of ``set_extra_state`` in a rehearsal."""
