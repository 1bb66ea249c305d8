"""One architecture: built eagerly and deferred from one seed, and compared bit for bit."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import random
import re
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from unittest import mock

import numpy as np
import torch

import lateinit
from lateinit._materialize import scheduler
from lateinit._replay import chunks
from tests.support.building import EAGER_POISON, LATE_POISON, SEED, poison
from tests.support.snapshots import Snapshot, first_difference, snapshot, tensors_of
from tests.zoo import catalog, libraries
from tests.zoo.hints import default_config
from tests.zoo.shrink import RECIPES, Recipe, shrunk

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import nn

MOST_ELEMENTS = 80_000_000
SEARCH_SECONDS = 20.0
MOST_CLASSES = 3

EQUAL, DIFFERENT, REFUSED, UNBUILT = "equal", "different", "refused", "not built"


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of one class of one model type. `detail` says why it is not `EQUAL`."""

    model_type: str
    name: str
    status: str
    detail: str = ""
    recipe: str = ""
    elements: int = 0
    tensors: int = 0
    undefined: int = 0
    ops: int = 0
    draws: int = 0
    reads: int = 0
    eager: float = 0.0
    record: float = 0.0
    materialize: float = 0.0


@dataclass(frozen=True, slots=True)
class Built:
    """A model as it was found to be, and where the random generators stood afterwards."""

    seen: Snapshot
    generators: tuple[Any, ...]


def outcomes(model_type: str) -> Iterator[Outcome]:
    """Check a model type: its bare model, and one with a head where there is one.

    Or one architecture of another library, by a name such as ``timm/resnet18``.
    """
    if "/" in model_type:
        yield of_library(model_type)
        return
    try:
        bare, heads = catalog.classes(model_type)
        config = default_config(model_type)
    except Exception as error:  # noqa: BLE001 - an architecture may fail in any way
        yield Outcome(model_type, "", UNBUILT, one_line(error))
        return
    if not bare and not heads:
        yield Outcome(model_type, "", UNBUILT, "no class is built from this configuration")
    done = ""
    for names in (bare, heads):
        left = [name for name in names if name != done][:MOST_CLASSES]
        if left:
            outcome = first_built(model_type, left, config)
            done = outcome.name
            yield outcome


def first_built(model_type: str, names: list[str], config: Any) -> Outcome:
    """The outcome of the first class that can be built at all."""
    tried = []
    for name in names:
        tried.append(check(model_type, name, config))
        if tried[-1].status != UNBUILT:
            return tried[-1]
    return tried[0]


def check(model_type: str, name: str, config: Any) -> Outcome:
    """Find a size that the class can be built in, and compare."""
    cls = catalog.model_class(model_type, name)
    try:
        recipe, small = smallest(cls, config)
    except UnbuildableError as error:
        return Outcome(model_type, name, UNBUILT, str(error))
    outcome = Outcome(model_type, name, EQUAL, recipe=str(recipe))
    try:
        return compare(outcome, lambda: cls(copy.deepcopy(small)))
    except Exception as error:  # noqa: BLE001
        return dataclasses.replace(outcome, status=REFUSED, detail=one_line(error))


def of_library(name: str) -> Outcome:
    """The outcome of an architecture of another library, built as it is."""
    outcome = Outcome(name, name.partition("/")[2], EQUAL)
    try:
        build = libraries.architectures()[name]
        if not builds(build):
            return dataclasses.replace(outcome, status=UNBUILT, detail="too big")
    except Exception as error:  # noqa: BLE001 - an architecture may fail in any way
        return dataclasses.replace(outcome, status=UNBUILT, detail=one_line(error))
    try:
        return compare(outcome, build)
    except Exception as error:  # noqa: BLE001
        return dataclasses.replace(outcome, status=REFUSED, detail=one_line(error))


class UnbuildableError(Exception):
    """Eager construction fails too."""


def smallest(cls: Any, config: Any) -> tuple[Recipe, Any]:
    """The first recipe that gives a configuration which the class accepts."""
    errors, started = [], time.perf_counter()
    text = config.get_text_config(decoder=True)
    for recipe in RECIPES:
        for part in (config,) if text is config else (config, text):
            try:
                small = shrunk(part, recipe)
                if builds(lambda: cls(copy.deepcopy(small))):  # noqa: B023 - called at once
                    return recipe, small
                errors.append("too big")
            except ImportError as error:
                raise UnbuildableError(one_line(error)) from None
            except Exception as error:  # noqa: BLE001
                errors.append(one_line(error))
        if time.perf_counter() - started > SEARCH_SECONDS:
            break
    raise UnbuildableError(next((e for e in errors if e != "too big"), "too big"))


def builds(build: Callable[[], nn.Module]) -> bool:
    """Whether a model can be built, and is small; raises what its constructor raises."""
    with contextlib.suppress(NotImplementedError, RuntimeError), torch.device("meta"):
        # Where values are read, which meta does not have, the size is not known beforehand.
        if elements(build()) > MOST_ELEMENTS:
            return False
    return elements(build()) <= MOST_ELEMENTS


def elements(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def compare(outcome: Outcome, build: Callable[[], nn.Module]) -> Outcome:
    """Build three times: eagerly on two kinds of unwritten memory, and deferred on a third."""
    reference = built(build, EAGER_POISON)[0]
    again, eager = built(build, LATE_POISON)
    undefined = {
        path
        for path, fact in again.seen.tensors.items()
        if fact != reference.seen.tensors.get(path, fact)
    }
    seed(LATE_POISON)
    started = time.perf_counter()
    with lateinit.deferred() as program:
        model = build()
    recorded = time.perf_counter()
    generators = states()
    lateinit.materialize(model)
    done = time.perf_counter()
    late = Built(snapshot(model), generators)
    difference = difference_between(reference, late, undefined)
    if difference is None and (difference := in_parts(build, reference, undefined)):
        difference = f"in parts: {difference}"
    if difference is None and (difference := by_threads(build, reference, undefined)):
        difference = f"by threads: {difference}"
    return dataclasses.replace(
        outcome,
        status=DIFFERENT if difference else EQUAL,
        detail=difference or "",
        elements=elements(model),
        tensors=len(reference.seen.tensors),
        undefined=len(undefined),
        ops=len(program.ops),
        draws=sum(len(stream.ops) for stream in program.streams),
        reads=len(program.reads),
        eager=eager,
        record=recorded - started,
        materialize=done - recorded,
    )


def in_parts(build: Callable[[], nn.Module], reference: Built, undefined: set[str]) -> str | None:
    """The same once more, in four parts that are not in the order of construction."""
    seed(LATE_POISON)
    model = lateinit.deferred_init(build)
    generators = states()
    names = [name for name, tensor in tensors_of(model) if lateinit.is_deferred(tensor)]
    for first in (3, 1, 2):
        part = frozenset(names[first::4])
        lateinit.materialize(model, only=lambda fqn, _, part=part: fqn in part)
    lateinit.materialize(model)
    return difference_between(reference, Built(snapshot(model), generators), undefined)


def by_threads(build: Callable[[], nn.Module], reference: Built, undefined: set[str]) -> str | None:
    """The same by one, two and four threads, which fill these small tensors as they fill large."""
    small = (
        (chunks, "_SMALLEST", 256),
        (scheduler, "_LEAST", 1 << 12),
        (scheduler, "PIECE", 1 << 18),
    )
    for threads in (1, 2, 4):
        seed(LATE_POISON)
        model = lateinit.deferred_init(build)
        generators = states()
        with contextlib.ExitStack() as patches:
            for place, name, value in small:
                patches.enter_context(mock.patch.object(place, name, value))
            lateinit.materialize(model, threads=threads)
        found = difference_between(reference, Built(snapshot(model), generators), undefined)
        if found:
            return f"{threads}: {found}"
    return None


def built(build: Callable[[], nn.Module], byte: int) -> tuple[Built, float]:
    seed(byte)
    started = time.perf_counter()
    model = build()
    seconds = time.perf_counter() - started
    return Built(snapshot(model), states()), seconds


def seed(byte: int) -> None:
    """One start for all random generators, and memory that shows where nothing was written."""
    poison(byte)
    torch.manual_seed(SEED)
    random.seed(SEED)
    np.random.seed(SEED)  # noqa: NPY002 - the generator that constructors use


def states() -> tuple[Any, ...]:
    name, keys, *rest = np.random.get_state()  # noqa: NPY002
    return (torch.get_rng_state().tolist(), random.getstate(), (name, keys.tolist(), *rest))


def difference_between(expected: Built, found: Built, undefined: set[str]) -> str | None:
    """The first difference, where eager's own values are defined."""
    twins = [masked(side.seen, undefined) for side in (expected, found)]
    difference = first_difference(*twins)
    if difference is None and expected.generators != found.generators:
        return "the random generators end elsewhere"
    return difference


def masked(seen: Snapshot, paths: set[str]) -> Snapshot:
    tensors = {
        path: dataclasses.replace(fact, bits=b"") if path in paths else fact
        for path, fact in seen.tensors.items()
    }
    return Snapshot(tensors, seen.values)


def one_line(error: BaseException) -> str:
    """The kind of an error and the last thing that it says."""
    said = re.sub(r"\s+", " ", str(error).replace("|", "/")).strip()
    needs = re.search(r"requires the (\w+) library|No module named '(\w+)'", said)
    if isinstance(error, ImportError) and needs:
        return f"needs the package {needs.group(1) or needs.group(2)}"
    kept = said if len(said) <= 240 else f"{said[:120]} ... {said[-110:]}"
    return f"{type(error).__name__}: {kept}"
