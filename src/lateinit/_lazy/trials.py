"""Layouts: the known part of a module's structure while its sizes are not known.

A class is constructed with trial sizes, in recordings that are discarded, and the results are
compared. A dim that stays the same is known. A dim that changes is assumed to be a linear function
of the sizes, so that the sizes can be solved for from a checkpoint's shapes (``solve``). This
module chooses the trial sizes; ``declare.py`` turns a layout into placeholders.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn

from lateinit._lazy.placeholders import Shape, known_shape
from lateinit._lazy.rules import Rule, size
from lateinit._lazy.scratch_recording import Settings, aside
from lateinit._lazy.signature import call_with
from lateinit._torch import OWN_ATTRIBUTES, own_buffers, own_parameters
from lateinit.errors import RuleError

Name = tuple[str, str]  # the path of a module, and the name of a tensor or attribute on it
# Trial sizes for a class that divides them by numbers which are not among its arguments: 48 is 3 x
# 16, and 5040 a multiple of every number up to 10.
_STEPS = (48, 5040)


@dataclass(frozen=True)
class LazySpec:
    """The class, rules and arguments of a lazy module.

    Attributes:
        cls: the plain class.
        rules: the rule for each missing argument.
        arguments: the given arguments.
        settings: the default dtype and device in force when it was declared.
    """

    cls: type[nn.Module]
    rules: Mapping[str, Rule]
    arguments: Mapping[str, Any]
    settings: Settings

    def construct(self, sizes: Mapping[str, Any]) -> nn.Module:
        """Construct the plain module with these sizes."""
        args, kwargs = call_with(self.cls, {**self.arguments, **sizes})
        with self.settings.in_force():
            return self.cls(*args, **kwargs)

    def construct_on(self, module: nn.Module, sizes: Mapping[str, Any]) -> None:
        """Run the constructor of the plain class on an existing module."""
        args, kwargs = call_with(self.cls, {**self.arguments, **sizes})
        with self.settings.in_force():
            self.cls.__init__(module, *args, **kwargs)


@dataclass(frozen=True)
class Trial:
    """One trial construction: its sizes, and the tensors and attributes of the module."""

    sizes: dict[str, Any]
    shapes: dict[Name, Shape | None]
    buffers: frozenset[Name]
    attributes: dict[Name, Any]


@dataclass(frozen=True)
class Family:
    """A base trial, and further trials that each differ from it in one size only.

    ``moved[unknown]`` is the trial in which ``unknown`` differs. An unknown is an argument and a
    place in it (-1 if it is no tuple), or None for all of them together.
    """

    base: Trial
    moved: dict[tuple[str, int] | None, Trial] = field(default_factory=dict)


@dataclass(frozen=True)
class ModuleLayout:
    """The part of a module's structure that all trials have in common.

    Attributes:
        families: the families of trials. In the last one all sizes are equal.
        known: the shape of each tensor, with None for each dim that varies, or None alone if its
            rank varies.
        buffers: which of the tensors are buffers.
        varying: the plain attributes that differ between trials.
    """

    families: tuple[Family, ...]
    known: dict[Name, Shape | None]
    buffers: frozenset[Name]
    varying: frozenset[Name]


def trial_sizes(rules: Mapping[str, Rule], values: Iterator[int]) -> dict[str, Any]:
    """Take from ``values`` a trial size for each rule: a number, or a tuple for several dims."""
    sizes: dict[str, Any] = {}
    for name, rule in rules.items():
        count = len(rule.dims) if isinstance(rule, size) else 1
        sizes[name] = next(values) if count == 1 else tuple(itertools.islice(values, count))
    return sizes


def unknowns(sizes: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    """Each single size: an argument, and the place in it (-1 if it is no tuple)."""
    for name, value in sizes.items():
        yield from (
            ((name, i) for i in range(len(value))) if isinstance(value, tuple) else [(name, -1)]
        )


def with_size(sizes: Mapping[str, Any], unknown: tuple[str, int], value: int) -> dict[str, Any]:
    """A copy of ``sizes`` in which one unknown has another value."""
    name, place = unknown
    old = sizes[name]
    return {**sizes, name: value if place < 0 else (*old[:place], value, *old[place + 1 :])}


def measure(spec: LazySpec) -> ModuleLayout:
    """Construct a class with trial sizes, and compare the results.

    Raises:
        RuleError: the class can be constructed with none of the trial sizes.
    """
    failure: Exception | None = None
    for step in _steps(spec.arguments):
        try:
            return _measure(spec, step)
        except Exception as error:  # noqa: BLE001 - any class of the user's may fail in any way
            failure = error
    names = ", ".join(spec.rules)
    raise RuleError(
        f"{spec.cls.__name__} cannot be made lazy in {names}: constructing it with trial sizes "
        f"failed with {type(failure).__name__}: {failure}"
    ) from failure


def _steps(arguments: Mapping[str, Any]) -> list[int]:
    """Trial sizes that are divisible by the arguments given, such as heads or groups."""
    numbers = [n for value in arguments.values() for n in _integers(value)]
    # Large arguments (a vocabulary, a width) are seldom divisors and would make large trial sizes.
    # So multiples of the arguments up to 64 are tried first, and of all arguments last, if below
    # 2**30.
    small = math.lcm(*(n for n in numbers if n <= 64))
    every = math.lcm(*numbers)
    return list(dict.fromkeys([math.lcm(small, 16), *_STEPS, min(every, 1 << 30)]))


def _integers(value: Any) -> list[int]:
    if isinstance(value, (tuple, list)):
        return [n for item in value for n in _integers(item)]
    return [value] if isinstance(value, int) and not isinstance(value, bool) and value > 1 else []


def _measure(spec: LazySpec, step: int) -> ModuleLayout:
    equal = trial_sizes(spec.rules, itertools.repeat(step))
    twice = trial_sizes(spec.rules, itertools.repeat(2 * step))
    every = list(unknowns(equal))
    together = Family(_try(spec, equal), {None: _try(spec, twice)})
    if len(every) == 1:
        return _compare((Family(together.base, {every[0]: together.moved[None]}),))
    # With all sizes different, each can be solved for alone. A class that requires some of them to
    # be equal has only the family in which all change together.
    apart = _apart(spec, step)
    return _compare((apart, together) if apart is not None else (together,))


def _apart(spec: LazySpec, step: int) -> Family | None:
    """A family in which all sizes differ, or None if the class refuses such sizes."""
    # Multiples of the step, so that they are divisible as the step is. The changed size is 30
    # steps, which is none of the first 27 multiples.
    base = trial_sizes(spec.rules, itertools.count(3 * step, step))
    try:
        return Family(
            _try(spec, base),
            {u: _try(spec, with_size(base, u, 30 * step)) for u in unknowns(base)},
        )
    except Exception:  # noqa: BLE001 - any class of the user's may fail in any way
        return None


def _try(spec: LazySpec, sizes: dict[str, Any]) -> Trial:
    with aside():
        module = spec.construct(sizes)
        return look(module, sizes)


def look(module: nn.Module, sizes: dict[str, Any]) -> Trial:
    """The trial of a constructed module: the shapes of its tensors, and its plain attributes."""
    shapes: dict[Name, Any] = {}
    buffers, attributes = set(), {}
    for path, part in module.named_modules(remove_duplicate=False):
        for name, tensor in own_parameters(part).items():
            if tensor is not None:
                shapes[path, name] = known_shape(tensor)
        for name, buffer in own_buffers(part).items():
            if buffer is not None:
                shapes[path, name] = known_shape(buffer)
                buffers.add((path, name))
        for name, value in part.__dict__.items():
            if name not in OWN_ATTRIBUTES:
                attributes[path, name] = value
    return Trial(sizes, shapes, frozenset(buffers), attributes)


def _compare(families: tuple[Family, ...]) -> ModuleLayout:
    trials = [t for f in families for t in (f.base, *f.moved.values())]
    names = dict.fromkeys(n for t in trials for n in t.shapes)
    known = {n: _common([t.shapes[n] for t in trials if n in t.shapes]) for n in names}
    attributes = dict.fromkeys(n for t in trials for n in t.attributes)
    varying = frozenset(n for n in attributes if _varies([t.attributes.get(n) for t in trials]))
    buffers = frozenset(n for t in trials for n in t.buffers)
    return ModuleLayout(tuple(_bare(family) for family in families), known, buffers, varying)


def _bare(family: Family) -> Family:
    """The family without attributes, which may keep anything alive; they are compared by now."""
    moved = {unknown: replace(trial, attributes={}) for unknown, trial in family.moved.items()}
    return Family(replace(family.base, attributes={}), moved)


def _common(shapes: list[Shape | None]) -> Shape | None:
    known = [shape for shape in shapes if shape is not None and len(shape) == len(shapes[0] or ())]
    if len(known) < len(shapes):
        return None
    return tuple(
        dims[0] if all(d == dims[0] for d in dims) else None for dims in zip(*known, strict=True)
    )


def _varies(values: list[Any]) -> bool:
    first = values[0]
    return any(type(v) is not type(first) or not _equal(v, first) for v in values[1:])


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) or _holds_tensors(a):
        return False
    try:
        return bool(a == b)
    except Exception:  # noqa: BLE001 - objects of the user's may fail to compare in any way
        return False


def _holds_tensors(value: Any) -> bool:
    if isinstance(value, dict):
        return any(isinstance(v, Tensor) or _holds_tensors(v) for v in value.values())
    if isinstance(value, (list, tuple)):
        return any(isinstance(v, Tensor) or _holds_tensors(v) for v in value)
    return False


Solved = dict[str, Any]


def solve(layout: ModuleLayout, shapes: Callable[[Name], tuple[int, ...] | None]) -> Solved | None:
    """The sizes that give the tensors these shapes; None if they do not follow from the shapes.

    Args:
        layout: the layout of the lazy module.
        shapes: returns the shape of a tensor in the checkpoint, None if it is not there.
    """
    # First the family with the most tensors in the checkpoint.
    for family in sorted(
        layout.families, key=lambda f: -sum(shapes(n) is not None for n in f.base.shapes)
    ):
        found = {u: _solve_one(family, u, shapes) for u in family.moved}
        if all(value is not None for value in found.values()):
            sizes = dict(family.base.sizes)
            for unknown, value in found.items():
                assert value is not None
                for each in unknowns(sizes) if unknown is None else [unknown]:
                    sizes = with_size(sizes, each, value)
            return sizes
    return None


def _solve_one(
    family: Family,
    unknown: tuple[str, int] | None,
    shapes: Callable[[Name], tuple[int, ...] | None],
) -> int | None:
    """One size, from the first dim that depends on this size and on no other."""
    base, moved = family.base, family.moved[unknown]
    others = [t for u, t in family.moved.items() if u != unknown]
    before = _single(base.sizes, unknown)
    run = _single(moved.sizes, unknown) - before
    for name, shape in base.shapes.items():
        found = shapes(name)
        if found is None or shape is None or len(found) != len(shape):
            continue
        for dim, here in enumerate(shape):
            rise = _dim(moved, name, dim, here)
            if rise and not any(_dim(t, name, dim, here) for t in others):
                # Solve on the line through two trials. A dim off the line (a checkpoint of another
                # configuration) gives no whole number.
                exact = before + (found[dim] - (here or 0)) * run / rise
                return int(exact) if exact == int(exact) else None
    return None


def _single(sizes: Mapping[str, Any], unknown: tuple[str, int] | None) -> int:
    name, place = unknown if unknown is not None else next(unknowns(sizes))
    value: int = sizes[name] if place < 0 else sizes[name][place]
    return value


def _dim(trial: Trial, name: Name, dim: int, before: int | None) -> int:
    """How much a dim changed between the base trial and ``trial``."""
    shape = trial.shapes.get(name)
    if shape is None or len(shape) <= dim:
        return 0
    return (shape[dim] or 0) - (before or 0)
