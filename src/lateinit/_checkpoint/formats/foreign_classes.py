"""Read a pickle in which other libraries' classes stand beside tensors; none of them is called.

Training runs save their configuration that way (the ``hyper_parameters`` of Lightning). Each such
class, and each function that is not known here, is replaced by an inert class of its own, which
takes whatever it is given and keeps none of it but the items of a dict. So nothing is imported and
no code of the file is run, as "Restricting Globals" of Python's ``pickle`` asks. What a module
would take from such an object is refused by name.
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
    """Stands for an object of a class that is not unpickled.

    A dict, so that tensors in another library's dict are found.
    """

    path = ""

    def __new__(cls, *_: Any, **__: Any) -> Foreign:
        return super().__new__(cls)

    def __init__(self, *_: Any, **__: Any) -> None:
        super().__init__()

    def __setstate__(self, state: Any) -> None: ...
    def __reduce__(self) -> Any:
        return _instance, (self.path,)

    # As an object of any class, it may be a key.
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
    """The classes of what stands in a value for objects that were not unpickled."""
    if isinstance(value, Foreign):
        yield value.path
    elif isinstance(value, dict):
        for pair in value.items():
            yield from foreign_in(pair)
    elif isinstance(value, (list, tuple, set, frozenset)):
        for item in value:
            yield from foreign_in(item)


def _of_kind(build: Callable[..., Any], kind: Any, args: tuple[Any, ...], _: Any) -> Any:
    """A tensor without its attributes; of a subclass, what stands for an object of that."""
    return kind() if isinstance(kind, type) else build(*args)


def _called(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of its own for each time that one is named: a pickle may set attributes of it."""

    def call(*args: Any) -> Any:
        return function(*args)

    return call


_KNOWN: Mapping[tuple[str, str], Callable[..., Any]] = {
    REBUILD_PARAMETER: rebuild(REBUILD_PARAMETER),
    REBUILD_PARAMETER_WITH_STATE: lambda *args: rebuild(REBUILD_PARAMETER)(*args[:3]),
    REBUILD_TENSOR: rebuild(REBUILD_TENSOR),
    REBUILD_TENSOR_WITH_ATTRIBUTES: _of_kind,
    REBUILD_TENSOR_WITH_DTYPE: rebuild(REBUILD_TENSOR_WITH_DTYPE),
    ("_codecs", "encode"): codecs.encode,  # has bytes in protocol 2
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
        if module == "__builtin__":  # of Python 2, as in protocol 2
            module = "builtins"
        if (module, name) == ("torch.storage", "UntypedStorage"):
            return SimpleNamespace(dtype=torch.uint8)  # all that torch asks of it
        if (module, name) in _KNOWN:
            return _called(_KNOWN[module, name])
        dtype = getattr(torch, name, None) if module == "torch" else None
        return dtype if isinstance(dtype, torch.dtype) else _class(f"{module}.{name}")


# torch.load takes a module, and asks for its name (torch/serialization.py: _check_dill_version).
_READING: Any = SimpleNamespace(Unpickler=_Unpickler, __name__=__name__)


def without_foreign_classes(path: Path) -> Any:
    """What a zip file of ``torch.save`` holds, mapped; None if it cannot be read even so."""
    try:
        # Safe as `find_class` above is: torch calls nothing else that a pickle names.
        return torch.load(
            path, map_location="cpu", pickle_module=_READING, weights_only=False, mmap=True
        )
    except Exception as error:
        if is_out_of_memory(error):
            raise
        return None
