"""Finding the tensors that hang on modules."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lateinit._tensors.slots import is_deferred_tensor, is_ordinary, slot_of
from lateinit._torch.modes import without_subclass_functions
from lateinit._torch.modules import (
    OWN_ATTRIBUTES,
    not_persistent,
    own_buffers,
    own_modules,
    own_parameters,
)
from lateinit._torch.storage import storage_key

Kind = Literal["parameter", "buffer", "attribute"]
_CONTAINERS = (dict, list, tuple, set, frozenset)
_HOLDERS = (*_CONTAINERS, Tensor)
_ENTERED = (nn.Module, *_CONTAINERS)
_ATOMS = frozenset({bool, int, float, str, type(None)})


@dataclass(slots=True)
class Found:
    """One tensor object and all of the names that lead to it, the first one first."""

    tensor: Tensor
    names: list[str]
    kind: Kind
    persistent: bool

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
        """Whether it is on meta, without the constructor having asked for that."""
        return self.tensor.is_meta and slot_of(self.tensor) is None


def is_placeholder(tensor: Any) -> bool:
    """Whether a tensor has no shape yet, by torch's protocol or that of pytorch-pfn-extras."""
    if is_ordinary(tensor):
        return False
    if is_lazy(tensor):
        return True
    # Theirs is a parameter of its own class, which must not be imported to be recognised.
    named = type(tensor).__name__.endswith("UninitializedParameter")
    return named and isinstance(tensor, nn.Parameter)


def find_tensors(target: Any) -> list[Found]:
    """Every tensor of a module (or container, or the tensor itself), each once.

    Parameters, buffers, plain tensor attributes, and tensors in lists, tuples, sets and dicts that
    are attributes.
    """
    walk = _Walk(set())
    walk.enter(target, "", ())
    return list(walk.found.values())


def own_tensors(module: nn.Module, seen: set[int]) -> Iterator[tuple[str, Tensor]]:
    """The tensors that hang on this very module, not on those below it, by name."""
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
    """What an object leads to; whatever is not a registered module is entered once."""

    __slots__ = ("found", "seen")

    def __init__(self, seen: set[int]) -> None:
        self.found: dict[int, Found] = {}
        self.seen = seen

    def enter(self, value: Any, path: str, above: tuple[int, ...]) -> None:
        kind = type(value)  # isinstance() would ask the object too, which can be slow to answer
        if issubclass(kind, Tensor):
            self._note(path or "tensor", value, "attribute", persistent=True)
            return
        if not issubclass(kind, _ENTERED) or id(value) in self.seen:
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
        """A module that is registered twice is walked twice: its tensors have two names."""
        if id(module) in above:
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

    def _note(self, path: str, tensor: Tensor, kind: Kind, *, persistent: bool) -> None:
        known = self.found.get(id(tensor))
        if known is None:
            self.found[id(tensor)] = Found(tensor, [path], kind, persistent)
        else:
            known.names.append(path)


def _join(path: str, key: Any) -> str:
    return f"{path}.{key}" if path else str(key)


def window_key(tensor: Tensor) -> tuple[Any, ...]:
    """What two tensors have in common that show the same memory in the same way."""
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
