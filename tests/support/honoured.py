"""Whether a call on deferred tensors outside a block is honoured, or refused, or neither."""

from __future__ import annotations

import contextlib
import itertools
import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.utils import _pytree as pytree

import lateinit
from lateinit._torch import is_fake
from lateinit._torch.storage import as_bytes
from lateinit.errors import LateinitError
from tests.support.building import EAGER_POISON, LATE_POISON, poison
from tests.support.deferred_kinds import WAITING, Call, Given, build, can_be_late, given

if TYPE_CHECKING:
    from collections.abc import Iterator

EQUAL, REFUSED, RAISES, EXEMPT = "equal", "refused", "eager raises too", "exempt"
LATER = "refused when it is materialised"
HOLDS = {EQUAL, REFUSED, LATER, RAISES, EXEMPT}
NEXT_STEP = re.compile(r"lateinit\.materialize|lateinit\.deferred|materialize\(|materialise the")
STORAGES = (torch.UntypedStorage, torch.TypedStorage)
WHERE, NOTHING = frozenset({"value"}), frozenset[str]()


# -- what can be seen of tensors -------------------------------------------------------------------


def leaves(value: Any) -> list[Any]:
    if isinstance(value, nn.Module):
        value = [*held_tensors(value), type(value)]
    return list(pytree.tree_leaves(value))


def held_tensors(model: nn.Module) -> list[Tensor]:
    return [
        tensor
        for module in model.modules()
        for tensor in (
            *module._parameters.values(),
            *module._buffers.values(),
            *vars(module).values(),
        )
        if isinstance(tensor, Tensor)
    ]


class Seen:
    """What can be seen of some values: bits, layout, and which of them share what."""

    def __init__(self) -> None:
        self._storages: dict[int, int] = {}
        self._objects: dict[int, int] = {}
        self._kept: list[Any] = []

    def of(self, value: Any) -> dict[str, Any]:
        self._kept.append(value)  # so that no address is used again
        if isinstance(value, DTensor):
            own = {"class": type(value).__name__, "placements": value.placements}
            return {**own, "object": self._number(value), "local": self.of(value._local_tensor)}
        if isinstance(value, Tensor):
            return self._of_tensor(value)
        if isinstance(value, np.ndarray):
            return {"array": (value.dtype, value.shape, value.strides, value.tobytes())}
        if isinstance(value, STORAGES):
            return {"storage": (type(value).__name__, value.device, bytes(value.untyped()))}
        return {"value": re.sub(r" at 0x\w+|0x\w+", "", repr(value))}

    def _number(self, value: Tensor) -> int:
        return self._objects.setdefault(id(value), len(self._objects))

    def _of_tensor(self, value: Tensor) -> dict[str, Any]:
        seen = {
            "class": type(value).__name__,
            "dtype": value.dtype,
            "device": value.device,
            "shape": value.shape,
            "layout": value.layout,
            "requires_grad": value.requires_grad,
            "object": self._number(value),
        }
        if value.is_meta or is_fake(value):
            return seen
        if not can_be_late(value):
            return seen | {"shown": repr(value)}
        place = value.untyped_storage()
        with torch.no_grad():
            bits = bytes(as_bytes(value).numpy()) if has_memory(value) else "no memory"
        self._kept.append(place)
        storage = self._storages.setdefault(place._cdata, len(self._storages))
        pairs = zip(value.shape, value.stride(), strict=True)
        strides = [step for n, step in pairs if n > 1] if value.numel() > 1 else []
        return seen | {
            "strides": strides,
            "offset": value.storage_offset(),
            "conj, neg": (value.is_conj(), value.is_neg()),
            "storage": storage,
            "bits": bits,
        }


def has_memory(value: Tensor) -> bool:
    """Whether the storage of a tensor is as large as the tensor needs; one may be resized."""
    steps = zip(value.shape, value.stride(), strict=True)
    last = value.storage_offset() + sum((n - 1) * step for n, step in steps)
    needed = (last + 1) * value.element_size() if value.numel() else 0
    return value.untyped_storage().nbytes() >= needed


def seen_of(values: list[Any]) -> list[dict[str, Any]]:
    seen = Seen()
    return [seen.of(value) for value in values]


def difference(ours: list[Any], theirs: list[Any], unsaid: frozenset[str]) -> str | None:
    """What differs between what two calls left, if anything."""
    if len(ours) != len(theirs):
        return f"{len(theirs)} values instead of {len(ours)}"
    for a, b in zip(ours, theirs, strict=True):
        a, b = a.get("local", a) | a, b.get("local", b) | b  # noqa: PLW2901
        if a.keys() != b.keys():
            return f"kind of value: {sorted(a)} and {sorted(b)}"
        for key in a:
            if key not in unsaid and key != "local" and a[key] != b[key]:
                words = key if key == "bits" else f"{key}: {a[key]} became {b[key]}"
                return words[:200]
    return None


# -- one call --------------------------------------------------------------------------------------


@dataclass
class Ran:
    """A call that was made."""

    model: nn.Module
    given: Given
    result: Any
    error: Exception | None
    state: Tensor

    def kept(self, call: Call) -> list[Any]:
        """What there was before the call, and is deferred in a deferred model."""
        return [*(self.given[i] for i in call.late), *held_tensors(self.model)]

    def everything(self) -> list[Any]:
        tensors = [value for value in self.given if isinstance(value, Tensor)]
        return [*leaves(self.result), *tensors, *held_tensors(self.model)]


def ran(call: Call, kind: str, *, late: bool) -> Ran:
    poison(LATE_POISON if late else EAGER_POISON)
    torch.manual_seed(0)
    model = lateinit.deferred_init(build, call, kind) if late else build(call, kind)
    arguments: Given = []
    result, error = None, None
    try:
        arguments = given(call, kind, model)
        with torch.set_grad_enabled(call.grad):
            result = call.run(arguments)
    except Exception as raised:  # noqa: BLE001 - what is raised is what is asked for
        error = raised
    return Ran(model, arguments, result, error, torch.get_rng_state())


def realise(values: list[Any]) -> None:
    tensors = [value for value in values if isinstance(value, Tensor)]
    lateinit.materialize([t for t in tensors if lateinit.is_deferred(t)], check=False)


def outcome(call: Call, kind: str) -> str:
    """One of ``HOLDS``, or what is wrong with a call on deferred tensors among real ones."""
    found = ran(call, kind, late=True)
    if isinstance(found.error, LateinitError) or NEXT_STEP.search(str(found.error)):
        return refused(call, kind, found)
    expected = ran(call, kind, late=False)
    torch.set_rng_state(found.state)
    if expected.error is not None:
        return RAISES if found.error is not None else fails_later(found)
    if found.error is not None:
        return f"foreign error: {said(found.error)}"
    if any(is_meta(value) for value in leaves(found.result)):
        return "result on meta"
    try:
        realise(found.everything())
    except Exception as error:  # noqa: BLE001
        return refused_later(call, expected, found, error)
    if not (expected.state.equal(found.state) and found.state.equal(torch.get_rng_state())):
        return "wrong: random state"
    unsaid = call.unsaid | (WHERE if call.asks_device and kind in WAITING else NOTHING)
    wrong = difference(seen_of(expected.everything()), seen_of(found.everything()), unsaid)
    return EQUAL if wrong is None else f"wrong: {wrong}"


def refused_later(call: Call, expected: Ran, found: Ran, error: Exception) -> str:
    """A result may be refused when it is materialised, if nothing else is."""
    if isinstance(error, LateinitError):
        with contextlib.suppress(LateinitError):
            realise(found.kept(call))
            if same(expected.kept(call), found.kept(call)):
                return LATER
    return f"not to be materialised: {said(error)}"


def said(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:160]


def is_meta(value: Any) -> bool:
    if isinstance(value, STORAGES):
        return value.device.type == "meta"
    return isinstance(value, Tensor) and value.is_meta and not lateinit.is_deferred(value)


def fails_later(found: Ran) -> str:
    """What eager construction raises on the values, materialising has to raise too."""
    try:
        realise(found.everything())
    except Exception:  # noqa: BLE001
        return RAISES
    return "accepted, and eager raises"


def refused(call: Call, kind: str, found: Ran) -> str:
    """A refusal names the tensor and the next step, and leaves all as it was."""
    words = str(found.error)
    # A tensor that no module holds as a parameter or a buffer has no name.
    names = [f"held{i}" for i in call.late] if kind != "plain" else ["deferred tensor"]
    names = list(call.names or names)
    if not any(name in words for name in names):
        return f"refused without the name: {said(found.error)}"
    if not NEXT_STEP.search(words):
        return f"refused without the next step: {said(found.error)}"
    untouched = ran(replace(call, run=lambda _: None), kind, late=False)
    try:
        realise(found.everything())
    except LateinitError as error:
        return f"refused half-way: {said(error)}"
    if not torch.equal(untouched.state, found.state):
        return "refused half-way: random state"
    wrong = difference(seen_of(untouched.everything()), seen_of(found.everything()), frozenset())
    return REFUSED if wrong is None else f"refused half-way: {wrong}"


# -- among tensors without values ------------------------------------------------------------------


def among(call: Call, made: Given, others: str) -> Given:
    """The tensors of a call, those that are not deferred on meta or fake."""
    mode = FakeTensorMode()
    move = (lambda t: t.to("meta")) if others == "meta" else mode.from_tensor
    return [tensor if i in call.late else move(tensor) for i, tensor in enumerate(made)]


def outcome_among(call: Call, kind: str, others: str) -> str:
    """Likewise, where the tensors that are not deferred are on meta, or fake."""
    found = ran_among(call, kind, others, late=True)
    words = EXEMPT
    if isinstance(found.error, LateinitError):
        named = kind == "plain" or any(f"held{i}" in str(found.error) for i in call.late)
        words = REFUSED if named else f"refused without the name: {said(found.error)}"
    elif found.error is not None:  # eager tensors do not mix with these either
        raises = raises_among(call, kind, others)
        words = RAISES if raises else f"foreign error: {said(found.error)}"
    real = any(map(has_values, leaves(found.result)))
    try:
        realise([*found.kept(call), *leaves(found.result)])
    except Exception as error:  # noqa: BLE001
        return f"not to be materialised: {said(error)}"
    if real and not any(
        same(leaves(twin.result), leaves(found.result)) for twin in twins_among(call, kind, others)
    ):
        words = "result is real"
    untouched = ran(replace(call, run=lambda _: None), kind, late=False)
    for twin in itertools.chain([untouched], twins_among(call, kind, others)):
        if same(twin.kept(call), found.kept(call)):
            return words
    wrong = difference(seen_of(untouched.kept(call)), seen_of(found.kept(call)), NO_FLAGS)
    return f"wrong: {wrong}"


def twins_among(call: Call, kind: str, others: str) -> Iterator[Ran]:
    """The eager twins, made when asked for: all real, and likewise among meta or fake tensors."""
    yield ran(call, kind, late=False)
    yield ran_among(call, kind, others, late=False)


def ran_among(call: Call, kind: str, others: str, *, late: bool) -> Ran:
    moved = replace(call, run=lambda made: call.run(among(call, made, others)))
    return ran(moved, kind, late=late)


NO_FLAGS = frozenset({"requires_grad"})


def same(ours: list[Any], theirs: list[Any]) -> bool:
    return difference(seen_of(ours), seen_of(theirs), NO_FLAGS) is None


def has_values(value: Any) -> bool:
    if isinstance(value, DTensor):
        value = value._local_tensor
    late = isinstance(value, Tensor) and lateinit.is_deferred(value)
    return isinstance(value, Tensor) and not (late or value.is_meta or is_fake(value))


def raises_among(call: Call, kind: str, others: str) -> bool:
    """Whether torch refuses the call on real tensors, meta or fake ones alone, or both together."""
    runs = itertools.chain(
        twins_among(call, kind, others),
        (ran_among(replace(call, late=()), kind, others, late=False) for _ in range(1)),
    )
    return any(run.error is not None for run in runs)


def outcome_of(call: Call, kind: str, others: str) -> str:
    return outcome(call, kind) if others == "real" else outcome_among(call, kind, others)
