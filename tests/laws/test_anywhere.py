"""Law 10: what is no parameter has its right value wherever it is kept, at its first use."""

from __future__ import annotations

import copy
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributions as dist
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import lateinit
from lateinit._tensors import waits
from lateinit.errors import DeferredTensorError, SeedError
from tests.support.building import deferred, eager, models
from tests.support.keepers import PLACES, STYLES, Data, Keeping, Slotted, directions, forget
from tests.support.keepers import X as KEPT
from tests.support.makers import WAYS, Labelled
from tests.support.snapshots import assert_same, bits, leaves, tensors_of
from tests.support.uses import USES, Scaled, seen

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.support.cases import Case


def computed() -> Tensor:
    return torch.linspace(-1, 2, 12).view(3, 4) / 7


def drawn() -> Tensor:
    return torch.randn(3, 4)


def view() -> Tensor:
    return torch.randn(5, 4)[1:4]


TABLES = {make.__name__: make for make in (computed, drawn, view)}


def table(make: Callable[[], Tensor], *, late: bool) -> Tensor:
    torch.manual_seed(1)
    made = lateinit.deferred_init(make) if late else make()
    torch.manual_seed(2)
    return made


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("make", TABLES.values(), ids=TABLES)
@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_a_table_is_used_as_eagerly(use: Callable[[Tensor], Any], make: Any) -> None:
    """Also what is left of it and of the generator is as after the eager use."""
    made = table(make, late=False)
    expected, ended = seen(use(made)), torch.get_rng_state()
    late = table(make, late=True)
    found = seen(use(late))
    assert found == expected
    assert torch.get_rng_state().equal(ended)
    assert seen(late.detach()) == seen(made.detach())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("way", sorted(WAYS))
def test_a_tensor_is_used_as_eagerly_in_whatever_way_torch_made_it(way: str) -> None:
    """No module holds it, and the real tensor that is written to asks nobody for its class."""

    def written(*, late: bool) -> Any:
        torch.manual_seed(1)
        made = lateinit.deferred_init(WAYS[way]) if late else WAYS[way]()
        tensors = [leaf for _, leaf in leaves(made) if isinstance(leaf, Tensor)]
        assert tensors
        lateinit.materialize([tensor for tensor in tensors if waits(tensor)])
        with torch.no_grad():
            return seen([torch.ones(t.shape, dtype=t.dtype).add_(t) for t in tensors])

    assert written(late=True) == written(late=False)


OF_A_CLASS: dict[str, Callable[[Tensor], Any]] = {
    "view": lambda t: (t[1:], t.T, t.data, t.view(-1)),
    "copy": lambda t: (t.clone(), t.detach(), t.double(), pickle.loads(pickle.dumps(t))),
    "arithmetic": lambda t: (t + t, t * 2, t @ t.T, torch.exp(t)),
    "write": lambda t: (t.mul_(2), t[0].zero_(), t),
    "with data": lambda t: (t * KEPT[:3, :4], torch.ones(4) + t),
}


@pytest.mark.parametrize("name", OF_A_CLASS)
def test_a_tensor_of_a_users_class_gives_others_of_it(name: str) -> None:
    def used(*, late: bool) -> Any:
        made = table(lambda: torch.randn(3, 4).as_subclass(Labelled), late=late)
        return seen(OF_A_CLASS[name](made))

    assert used(late=True) == used(late=False)


class Wrapping(Tensor):
    """A user's wrapper of another tensor, which answers ops by those of that one."""

    @staticmethod
    def __new__(cls, inner: Tensor) -> Any:
        return Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, device="cpu")

    def __init__(self, inner: Tensor) -> None:
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = pytree.tree_map_only(cls, lambda w: w.inner, (args, kwargs or {}))
        return pytree.tree_map_only(Tensor, cls, func(*args, **kwargs))


class Flattened(Wrapping):
    """The same by the protocol of wrappers."""

    def __tensor_flatten__(self) -> Any:
        return ["inner"], None


@pytest.mark.parametrize("cls", [Wrapping, Flattened])
def test_what_a_wrapper_computes_in_a_block_is_recorded(cls: Any) -> None:
    def used(*, late: bool) -> Any:
        made = table(lambda: (cls(torch.randn(3, 4)) * 2).add_(torch.rand(4)) + 1, late=late)
        received = torch.zeros(3, 4)
        received.add_(made)
        return seen([received, (made + torch.ones(4)).inner, made.inner])

    assert used(late=True) == used(late=False)


# -- where it is kept -----------------------------------------------------------------------------

MOMENTS = ("before", "between", "after")


def run(build: Callable[[], Any], moments: tuple[str, ...], *, late: bool) -> tuple[Any, Any]:
    """What is seen of a model that is used at some moments, and the generator at the end."""
    forget()
    torch.manual_seed(0)
    model = lateinit.deferred_init(build) if late else build()
    looked = [model.look()] if "before" in moments else []
    part = next(
        child for child in model.modules() if isinstance(child, nn.Linear) or child is model
    )
    if late:
        lateinit.materialize(part)
    looked += [model.look()] if "between" in moments else []
    lateinit.materialize(model)
    looked += [model.look()] if "after" in moments else []
    output = model(KEPT)
    return seen([looked, output, list(model.state_dict().values())]), torch.get_rng_state()


def assert_alike(build: Callable[[], Any], moments: tuple[str, ...]) -> None:
    expected, ended = run(build, moments, late=False)
    found, left = run(build, moments, late=True)
    assert found == expected
    assert left.equal(ended)


@pytest.mark.parametrize("moments", [MOMENTS, *((moment,) for moment in MOMENTS)], ids=str)
@pytest.mark.parametrize("drawn", [False, True], ids=["computed", "drawn"])
@pytest.mark.parametrize("place", PLACES)
def test_a_table_may_be_kept_anywhere(place: str, drawn: bool, moments: tuple[str, ...]) -> None:
    assert_alike(lambda: Keeping(place, drawn=drawn), moments)


@pytest.mark.parametrize("moments", [MOMENTS, *((moment,) for moment in MOMENTS)], ids=str)
@pytest.mark.parametrize("style", STYLES)
def test_a_model_in_the_style_of_a_library(style: Any, moments: tuple[str, ...]) -> None:
    assert_alike(style, moments)


@pytest.mark.parametrize("first", ["deferred", "eager"])
@pytest.mark.parametrize("other", STYLES)
@pytest.mark.parametrize("style", STYLES)
def test_models_share_caches(style: Any, other: Any, first: str) -> None:
    """One model is recorded and one is eager: constructors, uses and training are as eagerly."""

    def share(*, late: bool) -> Any:
        forget()
        torch.manual_seed(0)
        build = lateinit.deferred_init if late else lambda make: make()
        pair = [build(style), other()] if first == "deferred" else [other(), build(style)][::-1]
        assert not any(map(lateinit.is_deferred, pair[1].parameters()))
        looked = [pair[1].look(), pair[1](KEPT), pair[0].look()]
        optimizer = torch.optim.SGD(pair[1].parameters(), lr=0.1)
        pair[1](KEPT).sum().backward()
        optimizer.step()
        lateinit.materialize(pair[0])
        looked += [model(KEPT) for model in pair]
        return seen([looked, *(list(model.state_dict().values()) for model in pair)])

    assert share(late=True) == share(late=False)


# -- every model ----------------------------------------------------------------------------------


def joined(tensor: Tensor, other: Tensor) -> bytes:
    """The bits of a tensor that is used with real data."""
    with torch.no_grad():
        return bits("joined", torch.cat([tensor.flatten(), other.detach().clone().flatten()]))


@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("moment", ["before", "between"])
@models()
def test_what_a_model_has_beside_parameters_is_used_before_it_is_materialised(
    case: Case, moment: str, every: int
) -> None:
    twin, late = eager(case), deferred(case)
    state = torch.get_rng_state()
    if moment == "between":
        lateinit.materialize(late, only=lambda name, _: len(name) % 2 == 0)
    pairs = zip(tensors_of(twin), tensors_of(late), strict=True)
    for (path, expected), (_, found) in list(pairs)[::every]:
        if waits(found) or expected.is_sparse or expected.is_quantized:
            continue
        assert joined(found, expected) == joined(expected, expected), path
    assert torch.get_rng_state().equal(state)
    assert_same(twin, lateinit.materialize(late))


# -- draws ----------------------------------------------------------------------------------------


def two_tables() -> nn.Module:
    model = nn.Linear(4, 3)
    model.first = dist.Normal(torch.randn(4), torch.ones(4))
    model.second = [torch.randn(4)]
    model.fixed = Slotted(torch.arange(4.0))
    return model


def test_a_draw_that_was_used_is_bound_to_its_seed() -> None:
    torch.manual_seed(0)
    late = lateinit.deferred_init(two_tables)
    assert (late.fixed.table + torch.ones(4)).sum() == 10
    assert (late.second[0] + torch.ones(4)).isfinite().all()
    with pytest.raises(SeedError, match=r"seed=5 .*'second\.0' realised itself"):
        lateinit.materialize(late, seed=5)
    assert lateinit.is_deferred(late.weight)
    torch.manual_seed(0)
    twin = two_tables()
    assert lateinit.materialize(late).weight.equal(twin.weight)
    assert late.first.loc.equal(twin.first.loc)


def test_draws_that_were_not_used_are_drawn_again_under_another_seed() -> None:
    late = lateinit.deferred_init(two_tables)
    assert (late.fixed.table + torch.ones(4)).sum() == 10
    lateinit.materialize(late, seed=5)
    torch.manual_seed(5)
    twin = two_tables()
    assert seen([late.weight, late.first.loc, late.second]) == seen(
        [twin.weight, twin.first.loc, twin.second]
    )


def test_a_cache_that_materialize_does_not_find_is_of_the_seed_that_it_was_given() -> None:
    def build() -> nn.Module:
        model = Keeping("dataclass", drawn=True)
        directions(4)
        return model

    forget()
    late = lateinit.deferred_init(build)
    lateinit.materialize(late, seed=5)
    found = seen([late.kept.table, directions(4) * torch.ones(5)])
    forget()
    torch.manual_seed(5)
    twin = build()
    assert found == seen([twin.kept.table, directions(4)])


def test_what_objects_keep_is_found_and_neither_cast_nor_moved() -> None:
    forget()
    late = lateinit.deferred_init(Keeping, "helper of helpers", drawn=True)
    assert "kept" in str(lateinit.plan(late, only="kept*"))
    table = late.kept.table.table
    lateinit.materialize(late, dtype=torch.bfloat16)
    assert not lateinit.is_deferred(table)
    assert (table.dtype, late.first.weight.dtype) == (torch.float32, torch.bfloat16)


def test_what_an_object_knows_of_other_parts_is_not_materialised_with_it() -> None:
    def build() -> nn.Module:
        model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
        model[0].helper = Data(model[1].weight, [model, model.parameters])
        return model

    late = lateinit.deferred_init(build)
    lateinit.materialize(late[0])
    assert lateinit.is_deferred(late[1].weight)
    assert lateinit.is_deferred(late[1].running_mean)


# -- threads, processes ---------------------------------------------------------------------------


def test_threads_realise_the_same_tensors_and_others_at_once() -> None:
    torch.manual_seed(0)
    expected = [torch.randn(300) for _ in range(12)]
    torch.manual_seed(0)
    with lateinit.deferred():
        tables = [torch.randn(300) for _ in range(12)]
    ended, start = torch.get_rng_state(), threading.Barrier(4)

    def use(number: int) -> list[bytes]:
        start.wait()
        order = tables[number % 2 :] + tables[: number % 2]
        sums = [bits("sum", table + torch.ones(300)) for table in order]
        return sums[len(sums) - number % 2 :] + sums[: len(sums) - number % 2]

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(use, range(4)))
    assert found == [[bits("sum", t + torch.ones(300)) for t in expected]] * 4
    assert torch.get_rng_state().equal(ended)


class Rows(torch.utils.data.Dataset):
    def __init__(self, table: Tensor, kept: Data) -> None:
        self.table, self.kept = table, kept

    def __len__(self) -> int:
        return 3

    def __getitem__(self, at: int) -> Tensor:
        return self.table[at] * torch.ones(4) + self.kept.table


@pytest.mark.filterwarnings("ignore")  # Python warns of threads in a process that forks
def test_workers_of_a_loader_use_tables_of_their_parent() -> None:
    def batches(*, late: bool) -> list[bytes]:
        made = table(lambda: torch.randn(4, 4), late=late)
        rows = Rows(made[1:], Data(made[0]))
        loader = torch.utils.data.DataLoader(rows, 2, num_workers=1, multiprocessing_context="fork")
        return [bits("batch", batch) for batch in loader]

    assert batches(late=True) == batches(late=False)


# -- what stays refused ---------------------------------------------------------------------------


def learning_rate(t: Tensor) -> Any:
    p = nn.Parameter(torch.zeros(3, 4))
    p.grad = t


REFUSED: dict[str, Callable[[Tensor], Any]] = {
    # Setters of a real tensor: torch hears of them below Python.
    "data": lambda t: setattr(nn.Parameter(torch.zeros(3, 4)), "data", t),
    "grad": learning_rate,
    # torch holds the tensor before any op is heard.
    "trace": lambda t: torch.jit.trace(lambda x: x * t, torch.ones(3, 4)),
    "strict export": lambda t: torch.export.export(Scaled(t), (torch.ones(3, 4),), strict=True),
    # Of a storage.
    "element": lambda t: t.untyped_storage()[0],
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("use", REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_heard_is_refused_and_leaves_the_table_as_it_was(use: Any) -> None:
    made, late = table(drawn, late=False), table(drawn, late=True)
    with pytest.raises(RuntimeError):
        use(late)
    assert (late + 0).equal(made)
    assert (late * torch.ones(4)).equal(made)


def test_parameters_wait_and_what_is_made_of_them() -> None:
    late = lateinit.deferred_init(nn.Linear, 4, 3)
    cast = nn.Parameter(late.weight.bfloat16())
    assert lateinit.is_deferred(cast)
    for parameter in (late.weight, cast):
        with pytest.raises(DeferredTensorError, match=r"lateinit\.materialize"):
            parameter * torch.ones(4, dtype=parameter.dtype)
        assert str(parameter.device) == "meta"


def _table_and_view() -> tuple[torch.Tensor, torch.Tensor]:
    table = torch.linspace(0, 1, 6)
    return table, table[:3]


def test_view_of_a_table_that_was_used_is_read_in_a_later_block() -> None:
    table, view = lateinit.deferred_init(_table_and_view)
    expected = (table * torch.ones(6))[:3] * 2  # realises the table
    buffer = lateinit.deferred_init(lambda: view * 2)
    assert torch.equal(lateinit.materialize(buffer), expected)
    table, other = lateinit.deferred_init(_table_and_view)
    expected = torch.cat([(table * torch.ones(6))[:3] * 2, table[3:] + 0])
    lateinit.deferred_init(lambda: other.mul_(2))
    assert torch.equal(table, expected)


@pytest.mark.parametrize("pickled", [pickle.dumps, copy.deepcopy], ids=["pickle", "deepcopy"])
def test_view_of_a_table_that_was_used_is_pickled(pickled: Any) -> None:
    table, view = lateinit.deferred_init(_table_and_view)
    expected = table + torch.zeros(6)
    data = pickled((table, view))
    back = pickle.loads(data) if isinstance(data, bytes) else data
    assert torch.equal(back[0], expected)
    assert torch.equal(back[1], expected[:3])
