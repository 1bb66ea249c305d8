"""``infer_shapes`` changes shapes and nothing else (law 7), wherever a model's tensors are."""

from __future__ import annotations

import copy
import random
from collections import UserDict, defaultdict, deque
from dataclasses import dataclass, field
from functools import partial
from types import MappingProxyType, SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutput

import lateinit
from tests.support.snapshots import assert_same
from tests.support.twins import deferred, eager

WIDTH = 5
INPUT = torch.linspace(-1, 2, 3 * WIDTH).view(3, WIDTH)


def lazy_first(lazy: bool) -> nn.Module:
    first = lateinit.nn.LazyLinear(9) if lazy else nn.Linear(WIDTH, 9)
    return nn.Sequential(first, nn.Linear(9, 7), nn.Linear(7, 3))


def lazy_twice(lazy: bool) -> nn.Module:
    made = (lateinit.nn.LazyLinear(9), lateinit.nn.LazyLinear(7))
    first, second = made if lazy else (nn.Linear(WIDTH, 9), nn.Linear(9, 7))
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), first, nn.Linear(9, 9), second, nn.Linear(7, 3))


def lazy_normals(lazy: bool) -> nn.Module:
    model = lazy_twice(lazy)
    nn.init.normal_(model[2].weight)
    nn.init.trunc_normal_(model[4].weight, a=-1.0, b=0.5)
    return model


@pytest.mark.parametrize("make", [lazy_first, lazy_twice, lazy_normals])
@pytest.mark.parametrize("real", [[True], [True, True], [False, True], [True, False]])
def test_a_forward_pass_with_values_does_not_move_what_is_drawn_later(
    make: Any, real: list[bool]
) -> None:
    model = deferred(lambda: make(True))
    for each in real:
        lateinit.infer_shapes(model, INPUT, real=each)
    assert_same(eager(lambda: make(False)), lateinit.materialize(model))


@pytest.mark.parametrize("make", [lazy_first, lazy_twice, lazy_normals])
def test_a_forward_pass_with_values_that_fails_moves_nothing(make: Any) -> None:
    model = deferred(lambda: make(True))
    with pytest.raises(RuntimeError, match="dtype"):
        lateinit.infer_shapes(model, INPUT.double(), real=True)
    lateinit.infer_shapes(model, INPUT)
    assert_same(eager(lambda: make(False)), lateinit.materialize(model))


class Windows(nn.Module):
    """A parameter, and other windows on its memory that a forward pass computes with."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.arange(1.0, 11.0))
        self.b = self.a.data.view(2, WIDTH)
        self.register_buffer("c", self.a.data[WIDTH:])
        self.lazy = lateinit.nn.LazyLinear(3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen = [self.a.detach().double().clone(), self.b.double().clone(), self.c.double()]
        self.report(self.seen)
        return self.lazy(x[:, : int(self.b.double().sum()) // 11])

    report: Any = staticmethod(lambda seen: None)


@pytest.mark.parametrize("only", ["a", "b", "c", ["a", "c"]])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float64])
def test_memory_that_was_cast_is_read_as_it_is_now(only: Any, dtype: torch.dtype | None) -> None:
    model = deferred(Windows)
    lateinit.materialize(model, only=only, dtype=dtype)
    real = {name: t for name, t in vars_of(model).items() if not lateinit.is_deferred(t)}
    sizes = {name: tensor.untyped_storage().nbytes() for name, tensor in real.items()}
    seen: list[Any] = []
    model.report = seen.append
    lateinit.infer_shapes(model, INPUT, real=True)
    expected = torch.arange(1.0, 11.0, dtype=torch.float64)
    wanted = [expected, expected.view(2, WIDTH), expected[WIDTH:]]
    assert all(torch.equal(a, b) for a, b in zip(seen[0], wanted, strict=True))
    assert model.lazy.in_features == 5
    assert sizes == {name: tensor.untyped_storage().nbytes() for name, tensor in real.items()}


def vars_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {"a": model.a, "b": model.b, "c": model.c}


class Writes(nn.Module):
    """A forward pass that writes to all that it holds, also through other windows."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(WIDTH)
        self.scale = nn.Parameter(torch.randn(WIDTH))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.register_buffer("table", torch.randn(2, WIDTH))
        self.row = self.table[1]
        self.lazy = lateinit.nn.LazyLinear(3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.steps += 1
        self.scale.data.mul_(2)
        self.row.add_(1)
        with torch.no_grad():
            self.scale.clamp_(max=0.1)
        return self.lazy(self.norm(x) * self.scale + self.table.sum(0))


def through_the_state_dict(model: nn.Module) -> None:
    lateinit.materialize([t for n, t in model.state_dict().items() if not n.startswith("lazy")])


def through_data(model: nn.Module) -> None:
    found = (*model.parameters(), *model.buffers())
    lateinit.materialize([t.data for t in found if lateinit.is_deferred(t)])


def all_but_the_lazy_one(model: nn.Module) -> None:
    lateinit.materialize(model, only=lambda name, _: not name.startswith("lazy"))


WAYS = [through_the_state_dict, through_data, all_but_the_lazy_one, lambda model: None]


@pytest.mark.parametrize("real", [False, True])
@pytest.mark.parametrize("materialize_some", WAYS)
def test_real_memory_is_not_written_whatever_made_it_real(
    materialize_some: Any, real: bool
) -> None:
    model, twin = deferred(Writes), eager(Writes)
    materialize_some(model)
    lateinit.infer_shapes(model, INPUT, real=real)
    twin.lazy = model.lazy
    assert_same(twin, lateinit.materialize(model))


@pytest.mark.parametrize("real", [False, True])
def test_real_memory_of_an_eager_model_is_not_written(real: bool) -> None:
    model = eager(Writes)
    twin = copy.deepcopy(model)
    lateinit.infer_shapes(model, INPUT, real=real)
    twin.lazy = model.lazy
    assert_same(twin, model)


class Cache:
    """A plain helper object, as rotary tables and key-value caches are kept in."""

    def __init__(self) -> None:
        self.table = torch.arange(float(WIDTH))
        self.last: Any = None
        self.calls = 0
        self.array = torch.zeros(2).numpy()
        self.queue: deque[Any] = deque([torch.ones(WIDTH)], maxlen=2)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        self.array += 1
        if self.last is None:
            self.last = x.new_ones(x.shape[-1])
        self.table = self.table * 2
        self.queue.append(x)
        return x + self.last + self.table + self.queue[0].sum()


class Slotted:
    """Likewise, without a dictionary."""

    __slots__ = ("last", "table")

    def __init__(self) -> None:
        self.table, self.last = torch.ones(WIDTH), None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        self.last = x if self.last is None else self.last
        self.table += x[0]
        return x + self.table + self.last


@dataclass
class Nested:
    """An object in an object, in a list, in a tuple."""

    parts: list[Any] = field(default_factory=lambda: [(Cache(), {"inner": Slotted()})])

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        cache, more = self.parts[0]
        return more["inner"](cache(x))


def closed_over() -> Any:
    table, calls, last = torch.ones(WIDTH), 0, None

    def add(x: torch.Tensor) -> torch.Tensor:
        nonlocal calls, last, table
        calls, last, table = calls + 1, x if last is None else last, table + 1
        return x + table + last

    return add


class OnItsClass(nn.Module):
    """A module whose class holds what a forward pass writes."""

    cache: Any = None
    table = torch.ones(WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        cls = type(self)
        cls.cache = x if cls.cache is None else cls.cache
        return x + cls.cache + self.table


class Helped(nn.Module):
    def __init__(self, helper: Any) -> None:
        super().__init__()
        self.helper = helper()
        self.lazy = lateinit.nn.LazyLinear(3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.lazy(self.helper(x))


HELPERS = [Cache, Slotted, Nested, closed_over, OnItsClass]


@pytest.mark.parametrize("real", [False, True])
@pytest.mark.parametrize("helper", HELPERS)
@pytest.mark.parametrize("block", [False, True])
def test_helper_objects_are_as_they_were(helper: Any, block: bool, real: bool) -> None:
    OnItsClass.cache = None
    twin = eager(lambda: Helped(helper))
    model = (deferred if block else eager)(lambda: Helped(helper))
    lateinit.infer_shapes(model, INPUT, real=real)
    lateinit.materialize([model, *tensors_in(model.helper)])
    twin.lazy = copy.deepcopy(model.lazy)
    with torch.no_grad():
        expected, found = [], []
        for results, each in ((expected, twin), (found, model)):
            OnItsClass.cache = None
            results += [each(INPUT), each(INPUT)]
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


def tensors_in(helper: Any) -> list[torch.Tensor]:
    """The deferred tensors of a helper, which no module leads to."""
    if isinstance(helper, Cache):
        return [helper.table, *helper.queue]
    if isinstance(helper, Slotted):
        return [helper.table]
    if isinstance(helper, Nested):
        return [
            t
            for part in (helper.parts[0][0], helper.parts[0][1]["inner"])
            for t in tensors_in(part)
        ]
    cells = getattr(helper, "__closure__", None) or ()
    return [cell.cell_contents for cell in cells if isinstance(cell.cell_contents, torch.Tensor)]


class HeldList(list):  # type: ignore[type-arg]
    """A list with attributes."""


class HeldTuple(tuple):  # type: ignore[type-arg]  # noqa: SLOT001 - it has attributes
    """A tuple of a class of its own."""


class OnClass:
    """A helper whose class holds what is written."""

    log: ClassVar[list[Any]] = []
    calls = 0


def as_attribute(t: torch.Tensor) -> Any:
    held = HeldList()
    held.tensor = t
    return held


def as_default(t: torch.Tensor) -> Any:
    def give(held: torch.Tensor = t) -> torch.Tensor:
        return held

    return give


# How a tensor is held, and how a forward pass comes to it.
HOLDERS: dict[str, tuple[Any, Any]] = {
    "frozenset": (lambda t: frozenset([t]), lambda h: next(iter(h))),
    "struct sequence": (lambda t: torch.stack([t, t]).max(0), lambda h: h.values),
    "tuple of a class": (lambda t: HeldTuple((t,)), lambda h: h[0]),
    "attribute of a list": (as_attribute, lambda h: h.tensor),
    "mapping proxy": (lambda t: MappingProxyType({"t": t}), lambda h: h["t"]),
    "partial": (lambda t: partial(lambda held: held, t), lambda h: h()),
    "default argument": (as_default, lambda h: h()),
    "array of objects": (lambda t: np.array([t, None], dtype=object), lambda h: h[0]),
    "distribution": (lambda t: torch.distributions.Normal(t, t), lambda h: h.loc),
    "bound method": (lambda t: t.mul, lambda h: h.__self__),
    "user's dict": (lambda t: UserDict({"t": t}), lambda h: h["t"]),
    "namespace": (lambda t: SimpleNamespace(t=t), lambda h: h.t),
}


class Holding(nn.Module):
    def __init__(self, holder: str) -> None:
        super().__init__()
        hold, self.get = HOLDERS[holder]
        self.held = hold(torch.ones(WIDTH))
        self.lazy = lateinit.nn.LazyLinear(3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            self.get(self.held).add_(1)
        return self.lazy(x + self.get(self.held))


@pytest.mark.parametrize("real", [False, True])
@pytest.mark.parametrize("holder", HOLDERS)
def test_what_holds_a_tensor_does_not_matter(holder: str, real: bool) -> None:
    model = Holding(holder)
    before = model.get(model.held)
    lateinit.infer_shapes(model, INPUT, real=real)
    after = model.get(model.held)
    assert torch.equal(after, torch.ones(WIDTH))
    assert after.untyped_storage().data_ptr() == before.untyped_storage().data_ptr()


class Batch(dict):  # type: ignore[type-arg]
    """A dictionary of a class of its own, as tokenizers return."""


@pytest.mark.parametrize("real", [False, True])
@pytest.mark.parametrize("holder", [SimpleNamespace, UserDict, Batch])
def test_inputs_are_not_written_whatever_holds_them(holder: Any, real: bool) -> None:
    class Writes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lazy = lateinit.nn.LazyLinear(3)

        def forward(self, batch: Any) -> torch.Tensor:
            x = batch.x if isinstance(batch, SimpleNamespace) else batch["x"]
            batch.seen = True
            return self.lazy(x.add_(1))

    x = torch.ones(2, WIDTH)
    batch = holder(x=x)
    lateinit.infer_shapes(Writes(), batch, real=real)
    assert torch.equal(x, torch.ones(2, WIDTH))
    assert not hasattr(batch, "seen")


def read_only(m: Any, x: torch.Tensor) -> None:
    m.array.setflags(write=False)


def resized(m: Any, x: torch.Tensor) -> None:
    m.plain.resize(9, refcheck=False)


def shaped(m: Any, x: torch.Tensor) -> None:
    m.plain.shape = (1, 4)


def in_a_slot(m: Any, x: torch.Tensor) -> None:
    m.slotted.last = x
    m.slot = m.slot + 1


def on_a_class(m: Any, x: torch.Tensor) -> None:
    OnClass.calls += 1
    OnClass.log.append(x)


def another_class(m: Any, x: torch.Tensor) -> None:
    m.cache.__class__ = OnClass
    m.tagged.__dict__ = {"x": x}


def default_factory(m: Any, x: torch.Tensor) -> None:
    m.counted.default_factory = list
    m.counted["x"].append(1)


def settings(m: Any, x: torch.Tensor) -> None:
    torch.set_default_dtype(torch.float64)
    torch.use_deterministic_algorithms(True, warn_only=True)


def unparametrized(m: Any, x: torch.Tensor) -> None:
    nn.utils.parametrize.remove_parametrizations(m.spectral, "weight")


def of_a_distribution(m: Any, x: torch.Tensor) -> None:
    m.normal.loc = x.mean(0)


WORK = [
    *(read_only, resized, shaped, in_a_slot, on_a_class, another_class, default_factory),
    *(settings, unparametrized, of_a_distribution),
]


class SlottedModule(nn.Module):
    """A module with a slot beside its dictionary."""

    __slots__ = ("slot",)


class Works(SlottedModule):
    def __init__(self, work: Any) -> None:
        super().__init__()
        self.slot = torch.ones(WIDTH)
        self.work = work
        self.array, self.plain = np.ones(3), np.arange(4.0)
        self.slotted, self.cache, self.tagged = Slotted(), Cache(), HeldList()
        self.on_class = OnClass()
        self.counted: Any = defaultdict(int)
        self.spectral = nn.utils.parametrizations.weight_norm(nn.Linear(WIDTH, WIDTH))
        self.normal = torch.distributions.Normal(torch.zeros(WIDTH), torch.ones(WIDTH))
        self.entropy = random.SystemRandom()
        self.output = BaseModelOutput(last_hidden_state=torch.ones(WIDTH))
        self.lazy = lateinit.nn.LazyLinear(3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.work(self, x)
        return self.lazy(self.spectral(x.float()))


def state_of(model: Any) -> Any:
    arrays = [(a.tolist(), a.shape, a.flags.writeable) for a in (model.array, model.plain)]
    slots = [hasattr(model.slotted, "extra"), model.slotted.last, id(model.slot)]
    classes = [type(model.cache), vars(model.tagged), type(model.spectral), OnClass.calls]
    others = [list(OnClass.log), model.counted.default_factory, dict(model.counted)]
    kept = [id(p) for p in model.parameters()], id(model.normal.loc), id(model.output[0])
    process = torch.get_default_dtype(), torch.are_deterministic_algorithms_enabled()
    return arrays, slots, classes, others, kept, process


@pytest.mark.parametrize("real", [False, True])
@pytest.mark.parametrize("work", WORK)
def test_whatever_a_forward_pass_does_is_undone(work: Any, real: bool) -> None:
    model = Works(work)
    lazy, model.lazy = model.lazy, nn.Identity()
    before = state_of(model)
    model.lazy = lazy
    lateinit.infer_shapes(model, INPUT, real=real)
    model.lazy = nn.Identity()
    assert state_of(model) == before
    assert model.spectral(INPUT).shape == INPUT.shape


def test_an_object_that_cannot_be_put_back_keeps_no_other_from_it() -> None:
    class Stubborn:
        def __setattr__(self, name: str, value: Any) -> None:
            object.__setattr__(self, name, value)

    class Metaclass(type):
        def __setattr__(cls, name: str, value: Any) -> None:
            if cls.__dict__.get("sealed"):
                raise TypeError("this class is sealed now")
            super().__setattr__(name, value)

    class Sealed(metaclass=Metaclass):
        sealed = False
        count = 0

    class Seals(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.helper, self.weight = Sealed(), nn.Parameter(torch.ones(WIDTH))
            self.lazy = lateinit.nn.LazyLinear(3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            Sealed.count = 1
            Sealed.sealed = True
            return self.lazy(x * self.weight)

    model = Seals()
    weight = model.weight
    with pytest.raises(TypeError, match="sealed"):
        lateinit.infer_shapes(model, INPUT)
    assert model.weight is weight
    assert not weight.is_meta
