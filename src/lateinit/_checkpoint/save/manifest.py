"""The tensors of a module's checkpoint, and how they are divided among files."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lateinit._checkpoint.formats import DTYPES, OWN_KEYS, RESERVED, StoredTensor
from lateinit._integrations import preferred_name, tied_targets
from lateinit._tensors import (
    AS_IT_IS,
    Casting,
    Casts,
    Deferred,
    Init,
    Rules,
    find_tensors,
    held,
    is_deferred_tensor,
    is_placeholder,
    window_key,
)
from lateinit._torch import is_dtensor, is_wrapper
from lateinit.errors import CheckpointError, NotRecordedError, listing


@dataclass(frozen=True, slots=True)
class Item:
    """One tensor of a checkpoint.

    Attributes:
        entry: its name, and the dtype and shape in the file.
        tensor: the module's tensor.
        aliases: the further names of a tied tensor.
        deferred: the handle on it; None for a real tensor.
    """

    entry: StoredTensor
    tensor: Tensor
    aliases: tuple[str, ...]
    deferred: Deferred | None


@dataclass(frozen=True, slots=True)
class ShardFile:
    """One file of a checkpoint."""

    file: str
    items: tuple[Item, ...]

    @property
    def nbytes(self) -> int:
        """The bytes of its tensors."""
        return sum(item.entry.nbytes for item in self.items)


def collect(
    module: nn.Module | Mapping[str, Tensor],
    casting: Casting | None = None,
    *,
    sharded: bool = False,
    init: Init | None = None,
    seed: int | None = None,
) -> list[Item]:
    """The tensors of a module's state dict, tied ones once.

    Args:
        module: the module, or a dict in place of its state dict.
        casting: the dtypes to cast to; by default each tensor keeps its own.
        sharded: whether tensors may be shards.
        init: the initialisers that act on finished values.
        seed: replaces the recorded random state for these initialisers.

    Raises:
        CheckpointError: the module holds a value that safetensors cannot.
        NotRecordedError: a tensor is on ``meta`` and was never recorded.
    """
    state: Mapping[str, Any]
    found = find_tensors(module)
    casts, rules = (casting or AS_IT_IS).over(module, found), Rules(init, found)
    if isinstance(module, nn.Module):
        # Before `state_dict()`, since pytorch-pfn-extras leaves out lazy parameters there, and the
        # method of another class may fail on them.
        lazy = {n: p for n, p in module.named_parameters() if is_placeholder(p)}
        _check(lazy, casts, sharded=sharded)
        state = module.state_dict(keep_vars=True)
    else:
        state = module
    _check(state, casts, sharded=sharded)
    tied: dict[Any, list[str]] = {}
    for name, tensor in state.items():
        key = id(tensor) if is_dtensor(tensor) else window_key(tensor)
        # A name among OWN_KEYS cannot be an alias in the metadata, so it gets an entry of its own.
        tied.setdefault(name if name in OWN_KEYS else key, []).append(name)
    targets = tied_targets(module)
    items = [_item(preferred_name(names, targets), names, state, casts) for names in tied.values()]
    written = [item.deferred for item in items if item.deferred is not None]
    rules.extend(written, seed)
    return items


def _item(name: str, names: list[str], state: Mapping[str, Tensor], casts: Casts) -> Item:
    tensor = state[name]
    return Item(
        entry=StoredTensor(name, _saved_dtype(name, tensor, casts), tuple(tensor.shape)),
        tensor=tensor,
        aliases=tuple(other for other in names if other != name),
        deferred=Deferred.of(tensor) if is_deferred_tensor(tensor) else None,
    )


def _saved_dtype(name: str, tensor: Tensor, casts: Casts) -> torch.dtype:
    dtype = casts.of_saved(name, tensor).dtype
    return dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype


def _check(state: Mapping[str, Any], casts: Casts, *, sharded: bool) -> None:
    """Collect everything that cannot be written, and raise once."""
    problems = (_problem(name, value, casts, sharded) for name, value in state.items())
    wrong = [problem for problem in problems if problem is not None]
    if wrong:
        raise CheckpointError(f"a checkpoint cannot hold this: {listing(wrong)}")
    unknown = [
        name
        for name, value in state.items()
        if not is_deferred_tensor(value) and held(value).is_meta
    ]
    if unknown:
        raise NotRecordedError(
            f"on meta, and without a recorded construction: {listing(unknown)}. Build the model "
            "inside `with lateinit.deferred():` instead of on torch.device('meta')"
        )


def _problem(name: Any, value: Any, casts: Casts, sharded: bool) -> str | None:
    """The reason why a value cannot be in a checkpoint, in words."""
    if not isinstance(name, str) or name == RESERVED:
        return f"{name!r} is no name of a tensor"
    if not isinstance(value, Tensor):
        return f"{name} has the type {type(value).__name__}, which is no tensor"
    if is_placeholder(value):
        return f"{name} is lazy: lateinit.infer_shapes() first"
    if is_wrapper(value) and not (sharded and is_dtensor(value)):
        return f"{name} is a {type(value).__name__}"
    if value.layout is not torch.strided or value.is_quantized:
        return f"{name} has the layout {value.layout}"
    if _saved_dtype(name, value, casts) not in DTYPES:
        return f"{name} is {value.dtype}"
    if is_deferred_tensor(value) and _is_cast(value):
        return f"{name} shares its memory with a tensor that was materialised cast"
    return None


def _is_cast(tensor: Tensor) -> bool:
    real = Deferred.of(tensor).slot.real
    return real is not None and real.recorded is not None


def divide(
    items: Iterable[Item], limit: int | None, file: str | None, stem: str = "model"
) -> list[ShardFile]:
    """Divide tensors among files of at most ``limit`` bytes; a larger tensor has its own file.

    Args:
        items: the tensors, in the order of the state dict.
        limit: the most bytes for a file; None for one file.
        file: the name of a single file. By default the names are those of the Hugging Face hub:
            ``model.safetensors``, or ``model-00001-of-00003.safetensors`` and so on.
        stem: the beginning of these names, such as ``model``.
    """
    groups: list[list[Item]] = [[]]
    room = limit
    for item in items:
        if room is not None and item.entry.nbytes > room and groups[-1]:
            groups.append([])
            room = limit
        groups[-1].append(item)
        room = None if room is None else room - item.entry.nbytes
    return [
        ShardFile(file or _file_name(stem, number, len(groups)), tuple(_aligned(group)))
        for number, group in enumerate(groups, 1)
    ]


def _file_name(stem: str, number: int, count: int) -> str:
    part = f"-{number:05}-of-{count:05}" if count > 1 else ""
    return f"{stem}{part}.safetensors"


def _aligned(items: list[Item]) -> list[Item]:
    """Sort by element size, largest first, so that every tensor starts at a multiple of its own.

    Otherwise a reader could not map the tensor, and would have to copy.
    """
    return sorted(items, key=lambda item: -item.entry.dtype.itemsize)
