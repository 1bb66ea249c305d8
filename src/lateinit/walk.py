"""Finding the tensors that hang on modules."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lateinit.tensors import is_deferred_tensor, slot_of

Kind = Literal["parameter", "buffer", "attribute"]
_Leaf = tuple[str, Tensor, Kind, bool]
_OWN = frozenset(nn.Module().__dict__)
_HOLDERS = (dict, list, tuple, set, frozenset, Tensor)
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
    if is_lazy(tensor):
        return True
    # Theirs is a parameter of its own class, which must not be imported to be recognised.
    named = type(tensor).__name__.endswith("UninitializedParameter")
    return named and isinstance(tensor, nn.Parameter)


def find_tensors(target: Any) -> Iterator[Found]:
    """Every tensor of a module (or container, or the tensor itself), each once.

    Parameters, buffers, plain tensor attributes, and tensors in lists, tuples, sets and dicts that
    are attributes.
    """
    found: dict[int, Found] = {}
    for name, tensor, kind, persistent in _walk(target, "", set(), ()):
        known = found.get(id(tensor))
        if known is None:
            found[id(tensor)] = Found(tensor, [name], kind, persistent)
        else:
            known.names.append(name)
    yield from found.values()


def own_tensors(module: nn.Module, seen: set[int]) -> Iterator[tuple[str, Tensor]]:
    """The tensors that hang on this very module, not on those below it, by name."""
    for own in (module._parameters, module._buffers):
        for name, tensor in own.items():
            if tensor is not None:
                yield name, tensor
    for name, value in module.__dict__.items():
        if name not in _OWN and type(value) not in _ATOMS and isinstance(value, _HOLDERS):
            for path, tensor, _, _ in _walk(value, name, seen, ()):
                yield path, tensor


def _walk(value: Any, path: str, seen: set[int], above: tuple[int, ...]) -> Iterator[_Leaf]:
    """What an object leads to; whatever is not a registered module is entered once."""
    if isinstance(value, Tensor):
        yield path or "tensor", value, "attribute", True
        return
    if not isinstance(value, (nn.Module, dict, list, tuple, set, frozenset)) or id(value) in seen:
        return
    if isinstance(value, nn.Module):
        yield from _walk_module(value, path, seen, above)
        return
    seen.add(id(value))
    pairs = value.items() if isinstance(value, dict) else enumerate(value)
    for key, item in pairs:
        yield from _walk(item, _join(path, key), seen, above)


def _walk_module(
    module: nn.Module, path: str, seen: set[int], above: tuple[int, ...]
) -> Iterator[_Leaf]:
    """A module that is registered twice is walked twice: its tensors have two names."""
    if id(module) in above:
        return
    above = (*above, id(module))
    for name, parameter in module._parameters.items():
        if parameter is not None:
            yield _join(path, name), parameter, "parameter", True
    for name, buffer in module._buffers.items():
        if buffer is not None:
            yield (
                _join(path, name),
                buffer,
                "buffer",
                name not in module._non_persistent_buffers_set,
            )
    for name, child in module._modules.items():
        if child is not None:
            yield from _walk_module(child, _join(path, name), seen, above)
    if id(module) not in seen:
        seen.add(id(module))
        for name, value in module.__dict__.items():
            if name not in _OWN:
                yield from _walk(value, _join(path, name), seen, above)


def _join(path: str, key: Any) -> str:
    return f"{path}.{key}" if path else str(key)
