"""Read a pickle that names other libraries' classes beside tensors, without calling any of them.

Training runs save their configuration that way (the ``hyper_parameters`` of Lightning). Each such
class, and each function that is not known here, is replaced by an inert class of its own, which
accepts any arguments and keeps only the items of a dict. So nothing is imported and no code of the
file is run, as "Restricting Globals" in the documentation of Python's ``pickle`` recommends. If a
module would load such an object, ``load`` refuses it by name.
"""

from __future__ import annotations

import codecs
import pickle
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from lateinit._torch import (
    REBUILD_PARAMETER,
    REBUILD_PARAMETER_WITH_STATE,
    REBUILD_TENSOR,
    REBUILD_TENSOR_WITH_ATTRIBUTES,
    REBUILD_TENSOR_WITH_DTYPE,
    is_out_of_memory,
    rebuild,
)


class Foreign(dict[Any, Any]):
    """Stands in for an object of a class that is not unpickled.

    It is a dict, so that tensors in another library's dict are found.
    """

    path = ""

    def __new__(cls, *_: Any, **__: Any) -> Foreign:
        return super().__new__(cls)

    def __init__(self, *_: Any, **__: Any) -> None:
        super().__init__()

    def __setstate__(self, state: Any) -> None: ...
    def __reduce__(self) -> Any:
        return _instance, (self.path,)

    # Unlike a dict it is hashable, since any object may be a key in a pickle.
    __hash__ = object.__hash__  # type: ignore[assignment]
    __eq__ = object.__eq__

    def append(self, item: Any) -> None:
        """As of a list."""

    def extend(self, items: Any) -> None:
        """As of a list."""

    def add(self, item: Any) -> None:
        """As of a set."""


def _class(path: str) -> type[Foreign]:
    return type(path.rpartition(".")[2], (Foreign,), {"path": path})


def _instance(path: str) -> Foreign:
    return _class(path)()


def foreign_in(value: Any) -> Iterator[str]:
    """The names of the classes in a value whose objects were not unpickled."""
    if isinstance(value, Foreign):
        yield value.path
    elif isinstance(value, dict):
        for pair in value.items():
            yield from foreign_in(pair)
    elif isinstance(value, (list, tuple, set, frozenset)):
        for item in value:
            yield from foreign_in(item)


def _of_kind(build: Callable[..., Any], kind: Any, args: tuple[Any, ...], _: Any) -> Any:
    """A tensor without its attributes; for a subclass of tensors, a ``Foreign``."""
    return kind() if isinstance(kind, type) else build(*args)


def _called(function: Callable[..., Any]) -> Callable[..., Any]:
    """A new function each time that one is named, since a pickle may set attributes on it."""

    def call(*args: Any) -> Any:
        return function(*args)

    return call


_KNOWN: Mapping[tuple[str, str], Callable[..., Any]] = {
    REBUILD_PARAMETER: rebuild(REBUILD_PARAMETER),
    REBUILD_PARAMETER_WITH_STATE: lambda *args: rebuild(REBUILD_PARAMETER)(*args[:3]),
    REBUILD_TENSOR: rebuild(REBUILD_TENSOR),
    REBUILD_TENSOR_WITH_ATTRIBUTES: _of_kind,
    REBUILD_TENSOR_WITH_DTYPE: rebuild(REBUILD_TENSOR_WITH_DTYPE),
    ("_codecs", "encode"): codecs.encode,  # makes bytes in protocol 2
    ("builtins", "bytearray"): bytearray,
    ("builtins", "complex"): complex,
    ("builtins", "frozenset"): frozenset,
    ("builtins", "set"): set,
    ("collections", "Counter"): Counter,
    ("collections", "OrderedDict"): OrderedDict,
    ("collections", "defaultdict"): lambda *_: {},
    ("torch", "Size"): torch.Size,
    ("torch", "Tensor"): torch.Tensor,
    ("torch", "device"): torch.device,
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module == "__builtin__":  # the name of the module in Python 2, which protocol 2 uses
            module = "builtins"
        if (module, name) == ("torch.storage", "UntypedStorage"):
            return SimpleNamespace(dtype=torch.uint8)  # torch reads only its dtype
        if (module, name) in _KNOWN:
            return _called(_KNOWN[module, name])
        dtype = getattr(torch, name, None) if module == "torch" else None
        return dtype if isinstance(dtype, torch.dtype) else _class(f"{module}.{name}")


# torch.load takes a module, and reads its name (torch/serialization.py: _check_dill_version).
_READING: Any = SimpleNamespace(Unpickler=_Unpickler, __name__=__name__)


def without_foreign_classes(path: Path) -> Any:
    """The contents of a zip file of ``torch.save``, mapped; None if they cannot be read."""
    try:
        # As safe as `find_class` above: torch calls nothing else that a pickle names.
        return torch.load(
            path, map_location="cpu", pickle_module=_READING, weights_only=False, mmap=True
        )
    except Exception as error:
        if is_out_of_memory(error):
            raise
        return None
