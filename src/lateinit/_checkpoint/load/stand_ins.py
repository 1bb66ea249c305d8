"""Stand-ins: meta tensors in place of others while a state dict is loaded.

torch's ``load_state_dict`` runs on them. Most of it only reads shapes, and copies. When a hook
computes with a stand-in, the stand-in is *revealed*: it gets its values at that moment, in place.
So hooks see the same values as without stand-ins.
"""

from __future__ import annotations

import abc
import copy
from collections import OrderedDict
from collections.abc import Callable, Collection
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from lateinit._checkpoint.formats import Reader
from lateinit._identity import IdentityMap
from lateinit._tensors import Reach
from lateinit._torch import FunctionMode, device_number, flat, is_dtensor, storage_key, tensors_in
from lateinit._torch.swap import swap


class Held(Protocol):
    """Tensors that have no values yet, and can be revealed."""

    def holds(self, tensor: Tensor) -> bool: ...

    def device(self, tensor: Tensor) -> torch.device: ...

    def reveal(self, tensor: Tensor) -> None: ...


class StandIns(abc.ABC):
    """Meta tensors that stand in for others until their values are needed.

    They are recognised by their storages, which ``.data``, ``detach()`` and ``Parameter(...)``
    share.
    """

    def __init__(self) -> None:
        self._on: dict[int, Tensor] = {}
        self._storages: list[Any] = []  # kept alive, so that their addresses are not reused

    def add(self, stand: Tensor) -> None:
        """Register a meta tensor as a stand-in."""
        storage = stand.untyped_storage()
        self._on[storage_key(storage)] = stand
        self._storages.append(storage)

    def base(self, tensor: Tensor) -> Tensor | None:
        """The stand-in with which a tensor shares its meta storage, if there is one."""
        if not tensor.is_meta or tensor.layout is not torch.strided or is_dtensor(tensor):
            return None
        return self._on.get(storage_key(tensor.untyped_storage()))

    def holds(self, tensor: Tensor) -> bool:
        """Whether a tensor is on the storage of a stand-in that has no values yet."""
        return self.base(tensor) is not None

    def reveal(self, tensor: Tensor) -> None:
        """Give a tensor, its stand-in and all that share its memory their values, in place."""
        base = self.base(tensor)
        if base is not None and base.is_meta:
            self.give_values(base)
        if base is not None and base is not tensor:
            swap(tensor, base.detach())

    @abc.abstractmethod
    def give_values(self, base: Tensor) -> None:
        """Give a stand-in its values, in place, and the stand-ins that share its memory."""

    @abc.abstractmethod
    def device(self, tensor: Tensor) -> torch.device:
        """The device where the values will be."""


class Stands(StandIns):
    """A state dict of stand-ins for the tensors of a checkpoint.

    Attributes:
        reader: the checkpoint.
        revealed: the names whose values were needed.
        state: the state dict.
    """

    def __init__(self, reader: Reader, names: Collection[str]) -> None:
        super().__init__()
        self.reader = reader
        self._sources: IdentityMap[Tensor, str] = IdentityMap()
        self._of: dict[str, list[Tensor]] = {}
        self._derived = WeakTensorKeyDictionary()
        self.revealed: set[str] = set()
        self.state: OrderedDict[str, Any] = OrderedDict(reader.objects)
        wanted = {name: name for name in reader.entries}
        wanted |= {name: kept for name, kept in reader.aliases.items() if name in names}
        for name, source in wanted.items():
            entry = reader.entries[source]
            stand = torch.empty(entry.shape, dtype=entry.dtype, device="meta")
            self.state[name] = stand
            self._sources[stand] = source
            self._of.setdefault(source, []).append(stand)
            self.add(stand)

    def fresh(self) -> OrderedDict[str, Any]:
        """The state dict for one run: the stand-ins, and copies of everything else."""
        state = copy.copy(self.state)
        state.update(copy.deepcopy(dict(self.reader.objects)))
        vars(state)["_metadata"] = copy.deepcopy(self.reader.versions)  # as from state_dict()
        return state

    def source(self, tensor: Tensor) -> str | None:
        """The name in the checkpoint that a tensor stands for; None once it has values."""
        base = self.base(tensor)
        return self._sources[base] if base is not None and base.is_meta else None

    def kept(self, module: nn.Module) -> list[tuple[Tensor, str]]:
        """The stand-ins without values that a module holds anywhere, each with its source."""
        tensors = Reach(module).tensors()
        return [(t, name) for t in tensors if (name := self.source(t)) is not None]

    def gave(self, tensor: Tensor) -> bool:
        """Whether a tensor is a stand-in, or was computed from stand-ins."""
        return self.base(tensor) is not None or tensor in self._derived

    def follow(self, given: list[Tensor], result: Any) -> None:
        """Note the result of an op as computed from stand-ins, if one was among its arguments."""
        if any(map(self.gave, given)):
            self._derived.update({t: True for t in flat(result) if isinstance(t, Tensor)})

    def device(self, tensor: Tensor) -> torch.device:
        del tensor
        return torch.device("cpu")

    def give_values(self, base: Tensor) -> None:
        # A copy and never the file's own memory, since a hook may write to it. One memo, so that
        # names that share memory in the file share the copy.
        memo: dict[int, Any] = {}
        source = self._sources[base]
        for name in self.reader.shared.get(source, (source,)):
            values = self.reader.read(name)
            self.revealed.add(name)
            for stand in self._of.get(name, ()):
                swap(stand, copy.deepcopy(values.detach(), memo))


class Loading(FunctionMode):
    """Function mode: lets stand-ins act as their tensors, and reports each ``copy_``.

    Reads of shape or dtype are answered by the stand-in itself; a read of the device returns the
    device of the tensor. Every other call reveals the values.
    """

    def __init__(
        self, stands: Stands, own: Held, on_copy: Callable[[Tensor, Tensor], None]
    ) -> None:
        super().__init__()
        self._stands = stands
        self._kinds: tuple[Held, ...] = stands, own
        self._on_copy = on_copy
        self.failure: Exception | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.copy_ and len(args) > 1 and args[0] is args[1]:
            return args[0]  # a batch norm keeps its counter if the checkpoint has none
        if func is Tensor.copy_ and len(args) > 1 and isinstance(args[1], Tensor):
            try:
                self._on_copy(args[0], args[1])
            except Exception as error:
                self.failure = self.failure or error  # load_state_dict would turn it into a message
                raise
            self._stands.follow([args[1]], args[0])
            return args[0]
        if func in _ASKS:
            return func(*args, **kwargs)
        given = tensors_in(args, kwargs) + _in_slices(args[1:2])
        for tensor in given if func not in _SAME else ():
            kind = self._kind_of(tensor)
            if kind is not None and func in _PLACES:
                return _PLACES[func](kind.device(tensor))
            if kind is not None:
                kind.reveal(tensor)
        result = func(*args, **kwargs)
        self._stands.follow(given, result)
        return result

    def _kind_of(self, tensor: Tensor) -> Held | None:
        return next((kind for kind in self._kinds if kind.holds(tensor)), None)


def _in_slices(args: tuple[Any, ...]) -> list[Tensor]:
    """The tensors in the slices of an index."""
    index = args[0] if args and type(args[0]) is tuple else args
    parts = [(i.start, i.stop, i.step) for i in index if type(i) is slice]
    return tensors_in(tuple(parts), {}) if parts else []


def _number(device: torch.device) -> int:
    return -1 if device.type == "cpu" else device_number(device)


def _property(name: str) -> Any:
    return getattr(Tensor, name)


# Getters arrive as method wrappers that are made anew at each access, but compare equal.
_PLACES: dict[Any, Callable[[torch.device], Any]] = {
    _property("device").__get__: lambda device: device,
    _property("is_meta").__get__: lambda device: device.type == "meta",
    _property("is_cpu").__get__: lambda device: device.type == "cpu",
    _property("is_cuda").__get__: lambda device: device.type == "cuda",
    Tensor.get_device: _number,
}
_SAME = frozenset({_property("data").__get__, Tensor.detach})
_FACTS = "shape dtype layout ndim requires_grad is_leaf grad_fn is_sparse is_quantized itemsize"
_ASKS = frozenset(
    {
        *(_property(name).__get__ for name in _FACTS.split()),
        _property("requires_grad").__set__,
        Tensor.requires_grad_,
        Tensor.size,
        Tensor.dim,
        Tensor.ndimension,
        Tensor.numel,
        Tensor.nelement,
        Tensor.element_size,
        Tensor.is_floating_point,
        Tensor.is_complex,
        Tensor.__len__,
        Tensor.__hash__,
        torch.is_floating_point,
        torch.is_complex,
        torch.numel,
    }
)
