"""Law 6, of what outlives a model: a table keeps no more of the recording than it needs."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
import tracemalloc
import weakref
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn

import lateinit
from lateinit._program import Program
from lateinit._torch import operators
from tests.support.snapshots import assert_same, bits

if TYPE_CHECKING:
    from collections.abc import Callable


class Tables:
    """What outlives a model, recorded at its beginning, in its middle and at its end."""

    def __init__(self, build: Callable[[], nn.Module]) -> None:
        self.kept = [torch.linspace(0, 1, 5), torch.randn(3)]
        model = build()
        self.kept.append(torch.randn(4, 5) + self.kept[1].sum())
        self.kept += [torch.randn(33), build.__doc__ and torch.zeros(2)]
        self.model: Any = nn.ModuleList([model, nn.Linear(3, 5)])
        self.kept.append(torch.randn(7)[2:])

    def used(self) -> list[bytes]:
        tables = [table for table in self.kept if table is not None]
        return [bits("table", torch.cat([table.flatten(), torch.ones(1)])) for table in tables]


def linears() -> nn.Module:
    return nn.Sequential(*(nn.Linear(6, 7) for _ in range(40)))


def odd_normals() -> nn.Module:
    """Below 16 elements a second sample of a pair stays in the generator."""
    return nn.ParameterList([torch.randn(n % 5 + 1) for n in range(40)])


def redrawn() -> nn.Module:
    """How much these draw is known only when they are drawn."""
    drawn = [nn.init.trunc_normal_(torch.empty(30), a=-1.0, b=1.2) for _ in range(4)]
    return nn.ParameterList([*drawn, *linears().parameters()])


def of_values() -> nn.Module:
    """How much is drawn depends on values that were drawn before."""
    rates = torch.rand(20) * 5
    drawn = [torch.poisson(rates), torch.bernoulli(torch.poisson(rates * 2).clamp(max=1))]
    return nn.ParameterList([*drawn, *linears().parameters()])


def own_generators() -> nn.Module:
    generator = torch.Generator().manual_seed(4)
    drawn = [torch.randn(n % 3 + 1, generator=generator) for n in range(40)]
    with torch.random.fork_rng(devices=[]):
        drawn.append(torch.randn(9))
    return nn.ParameterList(drawn)


MODELS = {build.__name__: build for build in (linears, odd_normals, redrawn, of_values)}
MODELS["own_generators"] = own_generators


def recorded(build: Callable[[], nn.Module], seed: int = 0) -> tuple[Tables, Program]:
    torch.manual_seed(seed)
    with lateinit.deferred() as program:
        tables = Tables(build)
    return tables, program


def eager(build: Callable[[], nn.Module], seed: int = 0) -> Tables:
    torch.manual_seed(seed)
    return Tables(build)


def forget(tables: Tables) -> None:
    tables.model = None
    gc.collect()


def left(program: Program) -> int:
    """How many ops a program still has."""
    return sum(op.name != operators.REFUSED for op in program.ops)


@pytest.mark.parametrize("way", ["dropped", "in parts", "materialised", "loaded"])
@pytest.mark.parametrize("build", MODELS.values(), ids=MODELS)
def test_tables_outlive_a_model_with_their_values(build: Any, way: str) -> None:
    tables, program = recorded(build)
    recorded_ops = len(program.ops)
    if way == "materialised":
        lateinit.materialize(tables.model)
    elif way == "loaded":
        tables.model.load_state_dict(eager(build, 3).model.state_dict())
    elif way == "in parts":
        while len(tables.model):
            tables.model.pop(0)
            gc.collect()
    forget(tables)
    assert left(program) < recorded_ops / 2
    assert tables.used() == eager(build).used()


@pytest.mark.parametrize("build", [linears, odd_normals], ids=["linears", "odd_normals"])
def test_another_seed_is_honoured_for_tables_that_outlive_a_model(build: Any) -> None:
    tables, _ = recorded(build)
    forget(tables)
    lateinit.materialize(tables.kept, seed=5)
    assert tables.used() == eager(build, 5).used()


def test_a_program_is_recorded_into_when_a_model_of_it_is_gone() -> None:
    def more(tables: Tables) -> Tensor:
        return torch.randn(3) * tables.kept[1] + torch.randn(2).sum()

    twin = eager(linears)
    expected = bits("more", more(twin))
    tables, _ = recorded(linears)
    forget(tables)
    with lateinit.deferred():
        made = more(tables)
    assert bits("more", made + torch.zeros(3)) == expected
    assert tables.used() == twin.used()


def test_copies_and_pickles_outlive_the_model() -> None:
    tables, _ = recorded(linears)
    copied = copy.deepcopy(tables.model)
    read = pickle.loads(pickle.dumps(tables))
    forget(tables)
    late = pickle.loads(pickle.dumps(tables.kept))
    twin = eager(linears)
    assert_same(twin.model, lateinit.materialize(copied))
    assert_same(twin.model, lateinit.materialize(read.model))
    forget(read)
    assert tables.used() == read.used() == twin.used()
    tables.kept = late
    assert tables.used() == twin.used()


def test_lazy_modules_are_filled_when_the_model_around_them_is_gone() -> None:
    def build() -> nn.Module:
        return nn.Sequential(linears(), lateinit.nn.LazyLinear(3), linears())

    def given() -> nn.Module:
        return nn.Sequential(linears(), nn.Linear(4, 3), linears())

    tables, _ = recorded(build)
    lazy = tables.model[0][1]
    forget(tables)
    lateinit.infer_shapes(lazy, torch.zeros(2, 4))
    twin = eager(given)
    assert_same(twin.model[0][1], lateinit.materialize(lazy))
    assert tables.used() == twin.used()


def test_real_data_that_only_the_model_needs_is_not_kept() -> None:
    held = [torch.ones(1 << 19)]  # 2 MiB: less is copied, or too little to be looked for

    def build() -> nn.Module:
        return nn.ParameterList([torch.zeros(1 << 19) + held[0], torch.zeros(3)])

    tables, program = recorded(build)
    data = weakref.ref(held.pop())
    assert data() is program.constants[0].tensor
    forget(tables)
    assert data() is None
    assert tables.used()


def test_a_table_keeps_little_memory_of_a_large_model() -> None:
    def build() -> nn.Module:
        return nn.Sequential(*(nn.Linear(64, 64) for _ in range(300)))

    forget(recorded(linears)[0])
    tracemalloc.start()
    try:
        start = tracemalloc.get_traced_memory()[0]
        tables, _ = recorded(build)
        forget(tables)
        kept = tracemalloc.get_traced_memory()[0] - start
    finally:
        tracemalloc.stop()
    assert kept < 250_000  # 700 kB with all ops, of which 150 kB are not of the program
    assert tables.used() == eager(build).used()


def test_threads_forget_models_of_one_program() -> None:
    torch.manual_seed(0)
    expected = [Tables(linears).used() for _ in range(4)]
    torch.manual_seed(0)
    with lateinit.deferred():
        several = [Tables(linears) for _ in range(4)]
    found: list[Any] = [None] * 4

    def use(number: int) -> None:
        tables = several[number]
        lateinit.materialize(tables.model[0][:20])
        forget(tables)
        found[number] = tables.used()

    threads = [threading.Thread(target=use, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == expected
