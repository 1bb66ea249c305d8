"""Everything that can be seen of a model, as plain data, and the first difference between two."""

from __future__ import annotations

import enum
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import nn

# What a bare module carries is torch's plumbing (hooks, tables of parameters); two of it matter.
PLUMBING = frozenset(vars(nn.Module())) - {"training", "_non_persistent_buffers_set"}
PLAIN = (int, float, complex, str, bytes, type(None), enum.Enum, set, frozenset)
TORCH_PLAIN = (torch.dtype, torch.device, torch.layout, torch.memory_format)


@dataclass(frozen=True, slots=True)
class TensorFacts:
    """One tensor. `object` and `storage` name the first path that has the same one."""

    kind: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    stride: tuple[int, ...]
    requires_grad: bool
    is_leaf: bool
    is_conj: bool
    is_neg: bool
    is_inference: bool
    object: str
    storage: str
    bytes_from_first: int
    attributes: dict[str, str]
    bits: bytes


@dataclass(frozen=True, slots=True)
class Snapshot:
    tensors: dict[str, TensorFacts]
    values: dict[str, str]


def significant(tensor: torch.Tensor) -> tuple[int, ...]:
    """Strides, where they mean something: kernels and their meta twins disagree on the others."""
    if tensor.numel() == 0:
        return ()
    return tuple(s for n, s in zip(tensor.shape, tensor.stride(), strict=True) if n != 1)


def snapshot(model: nn.Module) -> Snapshot:
    """Every parameter, buffer, plain tensor attribute and plain value of `model`, by path."""
    tensors = dict(tensors_of(model))
    first_object: dict[int, str] = {}
    first_on_storage: dict[int, tuple[str, int]] = {}
    facts = {}
    for path, tensor in tensors.items():
        start = tensor.storage_offset() * tensor.element_size()
        storage, first = first_on_storage.setdefault(tensor.untyped_storage()._cdata, (path, start))
        facts[path] = TensorFacts(
            kind=type(tensor).__name__,
            shape=tuple(tensor.shape),
            dtype=tensor.dtype,
            device=tensor.device,
            stride=significant(tensor),
            requires_grad=tensor.requires_grad,
            is_leaf=tensor.is_leaf,
            is_conj=tensor.is_conj(),
            is_neg=tensor.is_neg(),
            is_inference=tensor.is_inference(),
            object=first_object.setdefault(id(tensor), path),
            storage=storage,
            bytes_from_first=start - first,
            attributes={
                k: repr(v) for k, v in vars(tensor).items() if isinstance(v, (*PLAIN, bool))
            },
            bits=bits(path, tensor),
        )
    return Snapshot(facts, {path: plain(thing) for path, thing in leaves(model) if is_plain(thing)})


def tensors_of(model: nn.Module) -> list[tuple[str, torch.Tensor]]:
    return [(path, leaf) for path, leaf in leaves(model) if isinstance(leaf, torch.Tensor)]


def bits(path: str, tensor: torch.Tensor) -> bytes:
    assert not tensor.is_meta, f"{path} has no values: it is still on meta"
    flat = tensor.detach().resolve_conj().resolve_neg().cpu().flatten()
    flat = flat.clone(memory_format=torch.contiguous_format)
    return flat.view(torch.uint8).numpy().tobytes() if len(flat) else b""


def leaves(thing: Any, path: str = "", seen: dict[int, str] | None = None) -> list[tuple[str, Any]]:
    """Paths and leaves below `thing`, in the order in which a constructor made them."""
    seen = {} if seen is None else seen
    if not isinstance(thing, (nn.Module, dict, list, tuple)):
        return [(path, thing)]
    if id(thing) in seen:
        return [(path, f"the same as {seen[id(thing)]}")]
    if not isinstance(thing, tuple):
        seen[id(thing)] = path or "the model"
    found = [(f"{path}.__class__", type(thing).__name__)]
    for name, part in parts(thing):
        found += leaves(part, f"{path}.{name}" if path else str(name), seen)
    return found


def parts(thing: Any) -> list[tuple[Any, Any]]:
    if isinstance(thing, nn.Module):
        own = {k: v for k, v in vars(thing).items() if k not in PLUMBING}
        # nn.ParameterList and its kind hold names only, so nothing is missed here.
        return [
            *thing._parameters.items(),
            *thing._buffers.items(),
            *own.items(),
            *thing._modules.items(),
        ]
    return list(thing.items()) if isinstance(thing, dict) else list(enumerate(thing))


def is_plain(thing: Any) -> bool:
    return isinstance(thing, (*PLAIN, *TORCH_PLAIN, np.ndarray, np.generic))


def plain(thing: Any) -> str:
    if isinstance(thing, np.ndarray):
        return f"array {thing.dtype} {thing.shape} {thing.tobytes().hex()}"
    if isinstance(thing, (set, frozenset)):
        return repr(sorted(map(repr, thing)))
    return repr(thing)


def first_difference(expected: Snapshot, found: Snapshot) -> str | None:
    """One sentence on the first thing that differs, or None."""
    for what, ours, theirs in (
        ("tensor", expected.tensors, found.tensors),
        ("value", expected.values, found.values),
    ):
        for path in ours.keys() ^ theirs.keys():
            side = "missing" if path in ours else "one too many"
            return f"{what} {path} is {side}"
    for path, fact in expected.tensors.items():
        if (difference := tensor_difference(fact, found.tensors[path])) is not None:
            return f"{path}: {difference}"
    for path, value in expected.values.items():
        if value != found.values[path]:
            return f"{path}: expected {value}, found {found.values[path]}"
    return None


def tensor_difference(expected: TensorFacts, found: TensorFacts) -> str | None:
    for field in fields(TensorFacts):
        ours, theirs = getattr(expected, field.name), getattr(found, field.name)
        if ours == theirs:
            continue
        if field.name == "bits":
            return f"bits: {bit_difference(expected, found)}"
        return f"{field.name}: expected {ours}, found {theirs}"
    return None


def bit_difference(expected: TensorFacts, found: TensorFacts) -> str:
    ours, theirs = (
        torch.frombuffer(bytearray(facts.bits), dtype=expected.dtype) for facts in (expected, found)
    )
    rows = [
        torch.frombuffer(bytearray(facts.bits), dtype=torch.uint8).reshape(len(ours), -1)
        for facts in (expected, found)
    ]
    wrong = (rows[0] != rows[1]).any(dim=1).nonzero().flatten()
    first = int(wrong[0])
    return (
        f"{len(wrong)} of {len(ours)} elements differ, the first at {first}: "
        f"expected {ours[first].item()!r}, found {theirs[first].item()!r}"
    )


def assert_same(expected: nn.Module | Snapshot, found: nn.Module | Snapshot) -> None:
    """Fail with the first difference between two models, or between what was kept of them."""
    ours, theirs = (s if isinstance(s, Snapshot) else snapshot(s) for s in (expected, found))
    difference = first_difference(ours, theirs)
    assert difference is None, difference
