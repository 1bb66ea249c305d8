"""``summary`` by module: totals, and what a forward pass of an example gives each module to do."""

from __future__ import annotations

import contextlib
import json
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import nn

import lateinit
from lateinit import errors
from lateinit._report.by_module import Module
from tests.support.snapshots import assert_same


def modules(model: nn.Module, **options: Any) -> dict[str, Module]:
    return {each.name: each for each in lateinit.summary(model, **options).modules}


def lazy_net() -> nn.Module:
    return nn.Sequential(
        lateinit.nn.LazyConv2d(6, 3), nn.BatchNorm2d(6), nn.Flatten(), lateinit.nn.LazyLinear(5)
    )


IMAGES = torch.empty(2, 3, 9, 9, device="meta")


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor, *, times: int = 1) -> torch.Tensor:
        for _ in range(times):
            found = self.head(self.embed(ids))
        return found


def test_shapes_and_flops_are_those_of_the_pass() -> None:
    found = modules(lazy_net(), example=IMAGES)
    assert found["0"].inputs == ((2, 3, 9, 9),)
    assert found["0"].outputs == ((2, 6, 7, 7),)
    assert found["0"].flops == 2 * (2 * 6 * 7 * 7) * (3 * 3 * 3)
    assert found["3"].flops == 2 * 2 * (6 * 7 * 7) * 5
    assert found["1"].flops == 0
    assert found[""].flops == found["0"].flops + found["3"].flops
    assert found[""].outputs == ((2, 5),)


@pytest.mark.parametrize("deferred", [False, True])
@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
def test_the_model_stays_what_it_was(deferred: bool) -> None:
    def built() -> nn.Module:
        torch.manual_seed(0)
        with lateinit.deferred() if deferred else torch.random.fork_rng():
            return nn.Sequential(lazy_net(), nn.LazyLinear(3), nn.Dropout())

    model, expected = built(), built()
    flags, state = model.training, torch.get_rng_state()
    before = {id(part): {**vars(part)} for part in model.modules()}
    lateinit.summary(model, example=IMAGES)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training is flags
    for part in model.modules():
        assert vars(part).keys() == before[id(part)].keys()
        assert [*part._forward_pre_hooks] == [*before[id(part)]["_forward_pre_hooks"]]
        assert not part._forward_hooks
    for each in (model, expected):
        lateinit.infer_shapes(each, IMAGES)
        lateinit.materialize(each)
    if deferred:
        assert_same(expected, model)


def test_nothing_is_allocated_for_a_large_model() -> None:
    with lateinit.deferred():
        model = nn.Sequential(*[nn.Linear(30_000, 30_000) for _ in range(9)])
    found = modules(model, example=torch.empty(1000, 30_000, device="meta"))
    assert found[""].flops == 9 * 2 * 1000 * 30_000**2
    assert lateinit.is_deferred(model)


def test_a_tensor_of_two_modules_counts_once_in_what_holds_both() -> None:
    found = modules(Tied(), depth=1)
    assert [each.parameters for each in found.values()] == [28, 28, 28]
    assert [each.nbytes for each in found.values()] == [112, 112, 112]


def test_memory_that_modules_share_counts_once() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = nn.Parameter(model[0].weight.data[:2])
    assert [each.nbytes for each in modules(model, depth=1).values()] == [36 + 24, 48, 36]


def test_inputs_may_come_by_name_and_calls_are_counted() -> None:
    ids = torch.zeros(5, dtype=torch.long)
    found = modules(Tied(), example={"ids": ids, "times": 3})
    assert found["head"].calls == 3
    assert found["head"].flops == 3 * 2 * 5 * 4 * 7
    assert found[""].inputs == ((5,),)
    assert "(5, 4) (x3)" in str(lateinit.summary(Tied(), example={"ids": ids, "times": 3}))


def test_a_module_that_is_not_called_says_so() -> None:
    class Sparing(nn.Linear):
        def __init__(self) -> None:
            super().__init__(3, 2)
            self.spare = nn.ModuleList([nn.Linear(2, 2)])

    model = Sparing()
    found = modules(model, example=torch.ones(1, 3))
    assert found["spare.0"].calls is None
    assert "not called" in str(lateinit.summary(model, example=torch.ones(1, 3)))


@pytest.mark.parametrize(
    ("depth", "names"),
    [
        (
            0,
            [
                "",
            ],
        ),
        (1, ["", "0", "1"]),
        (2, ["", "0", "0.0", "1"]),
    ],
)
def test_depth_bounds_what_is_shown_and_not_what_counts(depth: int, names: list[str]) -> None:
    model = nn.Sequential(nn.Sequential(nn.Linear(2, 2)), nn.Linear(2, 3))
    found = modules(model, depth=depth)
    assert [*found] == names
    assert found[""].parameters == 6 + 9


def test_a_module_that_calls_itself_counts_once() -> None:
    class Again(nn.Linear):
        def forward(self, x: torch.Tensor, left: int = 2) -> torch.Tensor:
            return self(super().forward(x), left - 1) if left else x

    found = modules(Again(3, 3), example=torch.ones(2, 3))[""]
    assert (found.flops, found.calls) == (2 * 36, 3)


def test_a_call_that_fails_and_is_caught_counts_what_it_did() -> None:
    class Failing(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise KeyError(super().forward(x).shape)

    class Catching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.failing = nn.Linear(3, 3), Failing(3, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.first(x)
            for _ in range(2):
                with contextlib.suppress(KeyError):
                    self.failing(x)
            return x

    found = modules(Catching(), example=torch.ones(2, 3))
    assert {name: each.flops for name, each in found.items()} == {
        "": 3 * 36,
        "first": 36,
        "failing": 2 * 36,
    }
    assert found["failing"].outputs == ()


def test_a_named_tuple_is_one_input() -> None:
    packed = nn.utils.rnn.pack_sequence([torch.ones(2, 3)])
    assert modules(nn.LSTM(3, 4), example=packed)[""].calls == 1


def test_repeated_modules_share_a_line() -> None:
    model = nn.Sequential(*[nn.Linear(3, 3) for _ in range(40)])
    shown = str(lateinit.summary(model, example=torch.ones(2, 3)))
    assert "{0..39}  x40" in shown
    assert "480" in shown


def test_values_are_used_where_they_are_asked_for() -> None:
    class Choosing(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) if (x * self.weight.sum()).sum() > 0 else x

    model = Choosing(2, 2)
    with pytest.raises(errors.NeedsValuesError, match="real=True"):
        lateinit.summary(model, example=torch.ones(1, 2))
    assert modules(model, example=torch.ones(1, 2), real=True)[""].calls == 1


def test_the_data_are_json() -> None:
    data = json.loads(json.dumps(lateinit.summary(lazy_net(), example=IMAGES).to_dict()))
    assert data["modules"][1]["outputs"] == [[2, 6, 7, 7]]
    assert len(data["tensors"]) == 9


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"depth": -1}, ValueError, "depth=-1"),
        ({"depth": 1.5}, ValueError, "depth=1.5"),
        ({"depth": "1"}, ValueError, "depth='1'"),
        ({"example": (1, 3, 9, 9)}, TypeError, "holds no tensor"),
        ({"example": {}}, TypeError, "holds no tensor"),
        ({"example": IMAGES[0, 0, 0]}, errors.ShapeError, "0: "),
    ],
)
def test_what_is_no_example_is_refused(
    options: dict[str, Any], error: type[Exception], said: str
) -> None:
    model = lazy_net()
    with pytest.raises(error, match=said):
        lateinit.summary(model, **options)
    assert not model[0]._forward_hooks
    assert lateinit.infer_shapes(model, IMAGES) == []


def test_only_a_module_has_modules() -> None:
    with pytest.raises(TypeError, match="are for a module"):
        lateinit.summary(torch.ones(2), depth=1)


@pytest.mark.parametrize("width", [30, 80, 160])
def test_a_console_of_any_width_shows_every_module(width: int) -> None:
    console = Console(width=width, file=None)
    with console.capture() as captured:
        console.print(lateinit.summary(lazy_net(), example=IMAGES))
    assert max(map(len, captured.get().splitlines())) <= width
    assert "(model)" in captured.get()


# -- at a prompt ---------------------------------------------------------------------------------


def long_model() -> nn.Module:
    return lateinit.deferred_init(lambda: nn.ModuleList([nn.Linear(3, i + 1) for i in range(100)]))


def test_a_prompt_shows_the_table() -> None:
    table = lateinit.summary(nn.Linear(3, 2))
    assert repr(table) == str(table)
    plan = lateinit.plan(lateinit.deferred_init(nn.Linear, 3, 2))
    assert repr(plan) == str(plan)


@pytest.mark.parametrize("make", [lateinit.plan, lateinit.summary], ids=["plan", "summary"])
def test_a_prompt_leaves_out_the_middle_of_a_long_table(make: Any) -> None:
    made = make(long_model())
    shown, whole = repr(made).splitlines(), str(made).splitlines()
    assert len(whole) > 190
    assert len(shown) == 60
    assert f"... {len(whole) - 59:,} more lines" in shown[40]
    assert [*shown[:40], *shown[41:]] == [*whole[:40], *whole[-19:]]


def test_a_plan_is_plain_data_too() -> None:
    plan = lateinit.plan(lateinit.deferred_init(nn.Linear, 3, 2))
    data = json.loads(json.dumps(plan.to_dict()))
    assert data["bytes"] == 32
    assert [step["gives"] for step in data["steps"]] == [["weight"], ["bias"]]
    assert len(data["steps"][0]["ops"]) == 1
