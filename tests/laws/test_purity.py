"""``infer_shapes`` changes shapes and nothing else (law 7), wherever a model's tensors are."""

from __future__ import annotations

import copy
from collections import deque
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import nn

import lateinit
from tests.support.snapshots import assert_same

WIDTH = 5
INPUT = torch.linspace(-1, 2, 3 * WIDTH).view(3, WIDTH)


def deferred(make: Any) -> nn.Module:
    torch.manual_seed(0)
    with lateinit.deferred():
        return make()


def eager(make: Any) -> nn.Module:
    torch.manual_seed(0)
    return make()


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
