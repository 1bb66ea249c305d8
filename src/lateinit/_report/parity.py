"""Check that a deferred model, once materialised, equals its eager twin: law 1, for one seed.

``check_parity`` serves ``lateinit check``. ``facts`` and ``compare`` define equality, for the tests
too.
"""

from __future__ import annotations

import gc
import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from lateinit._materialize.materialize import materialize
from lateinit._progress import Progress
from lateinit._recording import deferred_init
from lateinit._report.comparison import Comparison
from lateinit._rng import RandomStates, seed_all
from lateinit._tensors import Found, Init, call_rules, find_tensors, is_placeholder, rule_states
from lateinit._torch import as_bytes, in_a_row, sparse_parts, storage_key
from lateinit._units import format_bytes
from lateinit.errors import LateinitError

Build = Callable[[], nn.Module]


@dataclass(frozen=True, slots=True)
class TensorFacts:
    """The facts about one tensor that are compared.

    Attributes:
        memory: the first name on its storage, and the distance in bytes from the first element of
            the tensor with that name.
        bits: a digest of its values.
    """

    names: tuple[str, ...]
    kind: str
    persistent: bool
    type: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    stride: tuple[int, ...]
    requires_grad: bool
    memory: tuple[str, int]
    bits: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Parity(Comparison):
    """The result of comparing twins, with the seconds that each stage took."""

    parameters: int
    seconds: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain data."""
        more = {"parameters": self.parameters, "seconds": self.seconds}
        return Comparison.to_dict(self) | more

    def __str__(self) -> str:
        size = f"{self.tensors:,} tensors, {self.parameters:,} parameters"
        equal = (
            "equal, bit for bit: every parameter, buffer and tensor attribute, every tie, alias, "
            "stride and dtype, and the random state afterwards"
        )
        lines = [
            f"{size}, {format_bytes(self.nbytes)}, seed {self.seed}",
            *(f"  {what:<12}{seconds:8.2f} s" for what, seconds in self.seconds.items()),
        ]
        return "\n".join([*lines, *self.told(equal)])


def check_parity(build: Build, *, seed: int = 0, init: Init | None = None) -> Parity:
    """Build a model eagerly and deferred from one seed, materialise it, and compare every bit.

    Only one of the two models is in memory at a time, unless values differ. Python's and numpy's
    global generators are seeded too. All global generators are left as they were.

    Args:
        build: constructs the model; called twice, or three times if values differ, and with
            ``init`` once more for each eager model.
        seed: the seed of all generators before each construction.
        init: initialisers by name, as for ``materialize``; they are called on the eager model too.

    Example:
        >>> from lateinit._report import parity
        >>> parity.check_parity(lambda: torch.nn.Linear(4, 2)).equal
        True
    """
    states = RandomStates()
    try:
        return _check(_ruled(build, init), build, seed, init)
    finally:
        states.restore()


def _ruled(build: Build, init: Init | None) -> Build:
    """The same construction, with rules called afterwards.

    A deferred twin tells in which random states: they depend on what its recording named.
    """
    if init is None:
        return build

    def building() -> nn.Module:
        before = RandomStates()
        try:
            states = rule_states(deferred_init(build), init)
        except LateinitError:
            raise
        except Exception:  # noqa: BLE001 - `_check` records it again, and tells
            states = {}
        before.restore()
        model = build()
        call_rules(model, init, states)
        return model

    return building


def _check(eagerly: Build, build: Build, seed: int, init: Init | None) -> Parity:
    seconds: dict[str, float] = {}
    seed_all(seed)
    eager = _timed(seconds, "eager", eagerly)
    with Progress("digest", None):
        expected, state = facts(eager), torch.get_rng_state()
    del eager
    gc.collect()  # modules have reference cycles: free the eager twin now
    seed_all(seed)
    try:
        late = _timed(seconds, "record", lambda: deferred_init(build))
    except LateinitError:
        raise
    except Exception as error:  # noqa: BLE001 - what eager construction does not raise
        cause = error.__cause__ or error
        what = f"eager succeeds, deferred raises {type(cause).__name__}: {cause}"
        return _parity([("(construction)", what)], [], seed, seconds)
    found_state = torch.get_rng_state()
    _timed(seconds, "materialise", lambda: materialize(late, only=_has_shape, init=init))
    with Progress("digest", None):
        differences = compare(expected, facts(late))
    if any("values" in what for _, what in differences):
        seed_all(seed)
        differences = _with_values(differences, eagerly(), late)
    if not torch.equal(state, found_state):
        differences.append(("(random state)", "the generator is in another state than after eager"))
    if not torch.equal(found_state, torch.get_rng_state()):
        differences.append(("(random state)", "materialising moved the generator"))
    return _parity(differences, find_tensors(late), seed, seconds)


def _parity(
    differences: list[tuple[str, str]], found: list[Found], seed: int, seconds: dict[str, float]
) -> Parity:
    return Parity(
        differences=tuple(differences),
        tensors=len(found),
        parameters=sum(_numel(f.tensor) for f in found if f.kind == "parameter"),
        nbytes=sum(_numel(f.tensor) * f.tensor.element_size() for f in found),
        seed=seed,
        seconds=seconds,
    )


def _has_shape(_: str, tensor: Tensor) -> bool:
    return not is_placeholder(tensor)


def _numel(tensor: Tensor) -> int:
    return 0 if is_placeholder(tensor) else tensor.numel()


def _timed(seconds: dict[str, float], what: str, call: Callable[[], Any]) -> Any:
    start = time.perf_counter()
    with Progress(what, None):
        result = call()
    seconds[what] = round(time.perf_counter() - start, 3)
    return result


def facts(module: nn.Module) -> dict[str, TensorFacts]:
    """The facts of every tensor of a module, by the tensor's first name."""
    first: dict[int, tuple[str, int]] = {}
    return {found.name: _facts(found, first) for found in find_tensors(module)}


def _facts(found: Found, first: dict[int, tuple[str, int]]) -> TensorFacts:
    tensor = found.tensor
    lazy = is_placeholder(tensor)
    strided = not lazy and tensor.layout is torch.strided
    memory = (found.name, 0)
    if strided:
        start = int(tensor.storage_offset()) * tensor.element_size()
        owner, its_start = first.setdefault(
            storage_key(tensor.untyped_storage()), (found.name, start)
        )
        memory = owner, start - its_start
    return TensorFacts(
        names=tuple(found.names),
        kind=found.kind,
        persistent=found.persistent,
        type=type(tensor).__name__,
        shape=() if lazy else tuple(tensor.shape),
        dtype=tensor.dtype,
        device=tensor.device,
        stride=tensor.stride() if strided else (),
        requires_grad=tensor.requires_grad,
        memory=memory,
        bits="lazy" if lazy else _digest(tensor),
    )


def _digest(tensor: Tensor) -> str:
    if tensor.is_meta:
        return "on meta"
    digest = hashlib.sha256()
    for part in [tensor] if tensor.layout is torch.strided else _components(tensor):
        digest.update(as_bytes(part.cpu()).numpy().data)
    return digest.hexdigest()


def _components(tensor: Tensor) -> list[Tensor]:
    """The dense tensors that hold the values of a tensor of another layout."""
    if tensor.layout is torch.sparse_coo:
        return sparse_parts(tensor)
    return [tensor.to_dense()]


def compare(
    expected: dict[str, TensorFacts], found: dict[str, TensorFacts]
) -> list[tuple[str, str]]:
    """The differences between two models' facts: pairs of a name and a description."""
    differences = [(name, "missing") for name in expected if name not in found]
    differences += [(name, "one too many") for name in found if name not in expected]
    for name, ours in expected.items():
        theirs = found.get(name)
        if theirs is not None and theirs != ours:
            wrong = [
                f.name
                for f in fields(TensorFacts)
                if getattr(ours, f.name) != getattr(theirs, f.name)
            ]
            told = [
                "values differ"
                if field == "bits"
                else f"{field}: eager {getattr(ours, field)}, deferred {getattr(theirs, field)}"
                for field in wrong
            ]
            differences.append((name, "; ".join(told)))
    return differences


def _with_values(
    differences: list[tuple[str, str]], eager: nn.Module, late: nn.Module
) -> list[tuple[str, str]]:
    """The same differences, with the first wrong value of each tensor."""
    ours = {found.name: found.tensor for found in find_tensors(eager)}
    theirs = {found.name: found.tensor for found in find_tensors(late)}
    return [
        (name, f"{what}: {values_differ(ours[name], theirs[name])}" if "values" in what else what)
        for name, what in differences
    ]


def values_differ(
    expected: Tensor, found: Tensor, sides: tuple[str, str] = ("eager", "deferred")
) -> str:
    """The number of elements that differ in their bits, and the first of them, in words.

    Args:
        expected: the right values.
        found: the values to compare with them.
        sides: the names of the two sides.
    """
    if found.is_meta or expected.is_meta or expected.shape != found.shape:
        return "they cannot be compared"
    ours, theirs = in_a_row(expected.cpu()), in_a_row(found.cpu())
    if ours.dtype != theirs.dtype or not ours.numel():
        return "they cannot be compared"
    rows = [t.view(torch.uint8).view(t.numel(), -1) for t in (ours, theirs)]
    wrong = (rows[0] != rows[1]).any(dim=1).nonzero().view(-1)
    if not wrong.numel():
        return "they were equal in another eager construction: it is not reproducible"
    first = int(wrong[0])
    return (
        f"{wrong.numel():,} of {ours.numel():,}, the first at {first}: "
        f"{sides[0]} {ours[first].item()!r}, {sides[1]} {theirs[first].item()!r}"
    )
