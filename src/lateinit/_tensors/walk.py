"""Find the tensors of a module, with all of their names."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Literal

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lateinit._identity import IdentityMap
from lateinit._tensors.object_graph import parts_of
from lateinit._tensors.slots import is_deferred_tensor, is_ordinary, slot_of, waits
from lateinit._torch import (
    OWN_ATTRIBUTES,
    held_by_script,
    not_persistent,
    own_buffers,
    own_modules,
    own_parameters,
    storage_key,
    without_subclass_functions,
)

Kind = Literal["parameter", "buffer", "attribute", "kept"]
_CONTAINERS = (dict, list, tuple, set, frozenset)
_HOLDERS = (*_CONTAINERS, Tensor)
_ENTERED = (nn.Module, *_CONTAINERS)
_NOT_ENTERED = (nn.Module, type, ModuleType)
_ATOMS = frozenset({bool, int, float, str, type(None)})  # most attributes: skipped by type


@dataclass(slots=True)
class Found:
    """One tensor object and all of its names in order of discovery.

    Attributes:
        tensor: the tensor.
        names: its names.
        kind: how it is held; if in several ways, the way in which a module registers it.
        persistent: whether a state dict holds it.
        given: whether the target is this tensor or a plain container of it, not a module.
    """

    tensor: Tensor
    names: list[str]
    kind: Kind
    persistent: bool
    given: bool = False

    @property
    def name(self) -> str:
        return self.names[0]

    @property
    def deferred(self) -> bool:
        return is_deferred_tensor(self.tensor) and not self.lazy

    @property
    def lazy(self) -> bool:
        return is_placeholder(self.tensor)

    @property
    def unrecorded(self) -> bool:
        """Whether the tensor is on ``meta`` outside any recording and cannot be materialised."""
        return self.tensor.is_meta and slot_of(self.tensor) is None


def is_placeholder(tensor: Any) -> bool:
    """Whether a tensor is lazy, by the protocol of torch or of pytorch-pfn-extras."""
    if is_ordinary(tensor):
        return False
    if is_lazy(tensor):
        return True
    # pytorch-pfn-extras has an UninitializedParameter of its own, derived from Parameter alone. It
    # is recognised by its name, since isinstance() would require the library.
    named = type(tensor).__name__.endswith("UninitializedParameter")
    return named and isinstance(tensor, nn.Parameter)


def find_tensors(target: Any) -> list[Found]:
    """Every tensor of a module or container, each object once; of a tensor, itself.

    Finds parameters, buffers, tensor attributes, and tensors in attributes that are lists, tuples,
    sets or dicts.
    """
    walk = _Walk(set())
    walk.enter(target, "", ())
    return list(walk.found.values())


def find_with_kept(target: Any) -> list[Found]:
    """``find_tensors``, and the deferred tensors that objects on the modules keep.

    Objects are those of any class, such as distributions, dataclasses, deques, and functions with
    their closures. Modules and classes that an object refers to are not entered, and no parameter
    is taken: those belong to other parts of the model.
    """
    walk = _Walk(set())
    walk.enter(target, "", ())
    seen: IdentityMap[Any, None] = IdentityMap()
    kept: list[Found] = []
    waiting = walk.objects
    while waiting:
        path, value = waiting.pop()
        if type(value) in _ATOMS or isinstance(value, _NOT_ENTERED) or value in seen:
            continue
        seen[value] = None
        if not isinstance(value, Tensor):
            waiting += _named_parts(path, value)
        elif is_deferred_tensor(value) and not waits(value) and value not in walk.found:
            kept.append(Found(value, [path], "kept", persistent=False))
    return [*walk.found.values(), *kept]


def _named_parts(path: str, value: Any) -> list[tuple[str, Any]]:
    if isinstance(value, dict):
        return [(_join(path, key), part) for key, part in value.items()]
    return [(path, part) for part in parts_of(value)]


def own_tensors(module: nn.Module, seen: set[int]) -> Iterator[tuple[str, Tensor]]:
    """The tensors of one module by name, without those of its registered children.

    Args:
        module: the module.
        seen: ids of the containers and modules that were entered; this call adds to it.
    """
    for own in (own_parameters(module), own_buffers(module)):
        for name, tensor in own.items():
            if tensor is not None:
                yield name, tensor
    walk: _Walk | None = None
    for name, value in module.__dict__.items():
        if name not in OWN_ATTRIBUTES and type(value) not in _ATOMS and isinstance(value, _HOLDERS):
            walk = walk or _Walk(seen)
            walk.enter(value, name, ())
    if walk is not None:
        for found in walk.found.values():
            yield found.name, found.tensor


class _Walk:
    """A walk over containers and modules. Everything but registered modules is entered once."""

    __slots__ = ("found", "objects", "seen")

    def __init__(self, seen: set[int]) -> None:
        self.found: IdentityMap[Tensor, Found] = IdentityMap()
        self.objects: list[tuple[str, Any]] = []  # objects of all other classes, by path
        self.seen = seen

    def enter(self, value: Any, path: str, above: tuple[int, ...]) -> None:
        kind = type(value)  # isinstance() also reads __class__, which may be a slow property
        if issubclass(kind, Tensor):
            given = not above
            self._note(path or "tensor", value, "attribute", persistent=True, given=given)
            return
        if not issubclass(kind, _ENTERED):
            self.objects.append((path, value))
            return
        if id(value) in self.seen:
            return
        if issubclass(kind, nn.Module):
            self._enter_module(value, path, above)
            return
        self.seen.add(id(value))
        pairs = value.items() if issubclass(kind, dict) else enumerate(value)
        for key, item in pairs:
            if type(item) not in _ATOMS:
                self.enter(item, _join(path, key), above)

    def _enter_module(self, module: nn.Module, path: str, above: tuple[int, ...]) -> None:
        """Walk a module. One registered twice is walked twice: its tensors have two names."""
        if id(module) in above:  # a module that contains itself
            return
        above = (*above, id(module))
        for name, parameter in own_parameters(module).items():
            if parameter is not None:
                self._note(_join(path, name), parameter, "parameter", persistent=True)
        for name, buffer in own_buffers(module).items():
            if buffer is not None:
                persistent = name not in not_persistent(module)
                self._note(_join(path, name), buffer, "buffer", persistent=persistent)
        for name, child in own_modules(module).items():
            if child is not None:
                self._enter_module(child, _join(path, name), above)
        if id(module) not in self.seen:
            self.seen.add(id(module))
            for name, value in module.__dict__.items():
                if name not in OWN_ATTRIBUTES and type(value) not in _ATOMS:
                    self.enter(value, _join(path, name), above)
            for held in held_by_script([module]):
                registered = own_parameters(module), own_buffers(module)
                if not any(held.name in known for known in registered):
                    self.enter(held.value, _join(path, held.name), above)

    def _note(
        self, path: str, tensor: Tensor, kind: Kind, *, persistent: bool, given: bool = False
    ) -> None:
        known = self.found.get(tensor)
        if known is None:
            self.found[tensor] = Found(tensor, [path], kind, persistent, given)
            return
        known.names.append(path)
        known.given = known.given or given
        if kind != "attribute":  # a module may keep a tensor that another module registers
            known.persistent = persistent or (known.persistent and known.kind != "attribute")
            known.kind = kind if known.kind != "parameter" else "parameter"


def _join(path: str, key: Any) -> str:
    return f"{path}.{key}" if path else str(key)


def modules_in(target: Any) -> Iterator[nn.Module]:
    """The modules of a module or a container, each with its children."""
    if isinstance(target, nn.Module):
        yield from target.modules()
    elif isinstance(target, _CONTAINERS):
        for item in target.values() if isinstance(target, dict) else target:
            yield from modules_in(item)


def modules_by_name(target: Any, path: str = "") -> dict[str, nn.Module]:
    """The modules of a module or a container by each of their names."""
    if isinstance(target, nn.Module):
        return dict(target.named_modules(prefix=path, remove_duplicate=False))
    found: dict[str, nn.Module] = {}
    if isinstance(target, _CONTAINERS):
        pairs = target.items() if isinstance(target, dict) else enumerate(target)
        for key, item in pairs:
            found |= modules_by_name(item, _join(path, key))
    return found


def window_key(tensor: Tensor) -> tuple[Any, ...]:
    """A key that is equal for two tensors that show the same memory in the same way."""
    with without_subclass_functions():
        return (
            storage_key(tensor.untyped_storage()),
            tensor.dtype,
            tensor.storage_offset(),
            tuple(tensor.size()),
            tuple(tensor.stride()),
            tensor.is_conj(),
            tensor.is_neg(),
        )
