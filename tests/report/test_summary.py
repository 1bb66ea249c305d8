"""What a model is said to be: words for every kind of initialisation, ties, totals, renderings."""

from __future__ import annotations

import doctest
import json
import math
import sys

import pytest
import torch
from rich.console import Console
from torch import nn

import lateinit
from lateinit import errors
from lateinit._report.name_folding import fold
from lateinit._units import format_bytes, parse_bytes
from tests.support.cases import Bag


def rows(model: nn.Module, **options: object) -> dict[str, object]:
    return {row.name: row for row in lateinit.summary(model, **options).rows}


def words(**things: object) -> dict[str, str]:
    with lateinit.deferred():
        model = Bag(**{name: make() for name, make in things.items()})
    return {row.name: row.init for row in lateinit.summary(model).rows}


def test_initialisers_are_named_with_what_differs_from_their_defaults() -> None:
    def filled(initialise, *args, **kwargs):  # type: ignore[no-untyped-def]
        return lambda: initialise(nn.Parameter(torch.empty(4, 4)), *args, **kwargs)

    init = nn.init
    assert words(
        linear=lambda: nn.Linear(3, 2).weight,
        fan_out=filled(init.kaiming_normal_, mode="fan_out", nonlinearity="relu"),
        xavier=filled(init.xavier_uniform_),
        gain=filled(init.xavier_normal_, gain=2.0),
        normal=filled(init.normal_, std=0.02),
        mean=filled(init.normal_, 1.0, 0.5),
        uniform=filled(init.uniform_, -0.1, 0.1),
        wide=filled(init.trunc_normal_, std=0.02),
        rejecting=filled(init.trunc_normal_, a=-1.0, b=1.0),
        zeros=filled(init.zeros_),
        ones=filled(init.ones_),
        fill=filled(init.constant_, 0.5),
        dirac=lambda: init.dirac_(torch.empty(3, 3, 3)),
    ) == {
        "linear": "kaiming_uniform_(a=2.236)",
        "fan_out": "kaiming_normal_(mode=fan_out, nonlinearity=relu)",
        "xavier": "xavier_uniform_()",
        "gain": "xavier_normal_(gain=2)",
        "normal": "normal_(std=0.02)",
        "mean": "normal_(mean=1, std=0.5)",
        "uniform": "uniform_(-0.1, 0.1)",
        "wide": "trunc_normal_(std=0.02)",
        "rejecting": "trunc_normal_(a=-1, b=1)",
        "zeros": "zeros",
        "ones": "ones",
        "fill": "fill(0.5)",
        "dirac": "dirac_()",
    }


def test_what_no_initialiser_made_is_described_by_its_ops() -> None:
    def part() -> torch.Tensor:
        tensor = torch.zeros(5)
        tensor[2:] = 1
        return tensor

    assert words(
        empty=lambda: torch.empty(3),
        constant=lambda: torch.tensor([1.0, 2.0]),
        arange=lambda: torch.arange(4),
        full=lambda: torch.full((3,), 0.5),
        like=lambda: torch.full_like(torch.zeros(3), 2.0),
        data=lambda: torch.empty(3).normal_(0, 0.02),
        clamped=lambda: torch.empty(3).normal_().clamp_(-1, 1),
        part=part,
        copy=lambda: torch.ones(3).clone(),
        cast=lambda: torch.randn(3).half(),
        computed=lambda: 1.0 / 10000 ** (torch.arange(0, 8, 2) / 8),
    ) == {
        "empty": "empty (uninitialised)",
        "constant": "constant",
        "arange": "arange(4)",
        "full": "fill(0.5)",
        "like": "fill(2)",
        "data": "normal_(std=0.02)",
        "clamped": "normal_(), then clamp_(-1, 1)",
        "part": "zeros, then ones in part",
        "copy": "ones",
        "cast": "normal_()",
        "computed": "computed (5 ops)",
    }


def test_a_truncated_normal_drawn_by_inversion_is_one() -> None:
    def inverted() -> torch.Tensor:
        tensor = torch.empty(4).uniform_(-0.9, 0.9)
        return tensor.erfinv_().mul_(0.02 * math.sqrt(2)).add_(0.0).clamp_(min=-2.0, max=2.0)

    def one_sided() -> torch.Tensor:
        return torch.empty(4).uniform_(-0.9, 0.9).erfinv_().mul_(0.5).add_(0.0).clamp_(max=2.0)

    assert words(tensor=inverted) == {"tensor": "trunc_normal_(std=0.02)"}
    assert words(tensor=one_sided) == {"tensor": "computed (5 ops)"}


def test_only_what_lives_counts() -> None:
    def overwritten() -> torch.Tensor:
        tensor = torch.randn(4)
        tensor.mul_(2).clamp_(-1, 1).zero_()
        return tensor

    assert words(tensor=overwritten) == {"tensor": "zeros"}


def test_a_padded_embedding_says_both_of_its_writes() -> None:
    model = lateinit.deferred_init(nn.Embedding, 4, 2, padding_idx=0)
    assert rows(model)["weight"].init == "normal_(), then zeros in part"


def test_halves_of_one_storage_are_described_apart() -> None:
    def halves() -> nn.Module:
        whole = torch.empty(8)
        whole[:4].zero_()
        whole[4:].fill_(1)
        return Bag(low=whole[:4], high=whole[4:])

    found = rows(lateinit.deferred_init(halves))
    assert found["low"].init == "zeros"
    assert found["high"].init == "ones"
    assert found["high"].shares == "low"


def test_ties_are_one_row_with_all_names() -> None:
    def tied() -> nn.Module:
        model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
        model[1].weight = model[0].weight
        return model

    table = lateinit.summary(lateinit.deferred_init(tied))
    assert table.rows[0].names == ("0.weight", "1.weight")
    assert "= 1.weight" in str(table)
    assert table.totals.parameters == 9 + 3 + 3
    assert table.totals.bytes == 4 * (9 + 3 + 3)


def test_states_kinds_and_devices() -> None:
    with lateinit.deferred():
        model = nn.BatchNorm1d(3)
        model.register_buffer("scratch", torch.zeros(2), persistent=False)
        model.on_meta = torch.empty(2, device="meta")
    model.real = torch.ones(2, dtype=torch.float64)
    lateinit.materialize(model, only="bias")
    found = rows(model)
    assert {name: row.state for name, row in found.items()} == {
        "weight": "deferred",
        "bias": "real",
        "running_mean": "deferred",
        "running_var": "deferred",
        "num_batches_tracked": "deferred",
        "scratch": "deferred",
        "on_meta": "meta",
        "real": "real",
    }
    assert found["weight"].device == "cpu"
    assert found["on_meta"].device == "meta"
    assert found["scratch"].what == "buffer (not saved)"
    assert found["real"].kind == "attribute"
    assert found["real"].init is None
    totals = lateinit.summary(model).totals
    assert totals.parameters == 6
    assert totals.deferred_bytes == totals.bytes - found["bias"].nbytes - 16 - 8


def test_lazy_tensors_show_what_is_known_of_their_shape() -> None:
    with lateinit.deferred():
        model = nn.Sequential(lateinit.nn.LazyLinear(3), nn.Linear(3, 2))
    table = lateinit.summary(model)
    found = {row.name: row for row in table.rows}
    assert found["0.weight"].state == "lazy"
    assert found["0.weight"].shape == (3, None)
    assert found["0.weight"].nbytes is None
    assert found["0.bias"].nbytes == 12
    assert "(3, ?)" in str(table)
    assert "1 of unknown size not counted" in str(table)
    assert table.totals.parameters == 3 + 6 + 2
    assert json.loads(json.dumps(table.to_dict()))["tensors"][0]["shape"] == [3, None]


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
def test_placeholders_of_torch_are_lazy_too() -> None:
    row = lateinit.summary(nn.LazyLinear(3)).rows[0]
    assert row.state == "lazy"
    assert row.shape is None


def test_memory_that_is_shared_counts_once() -> None:
    def shared() -> nn.Module:
        whole = torch.zeros(10)
        return Bag(whole=whole, head=whole[:6], tail=whole[4:])

    assert lateinit.summary(lateinit.deferred_init(shared)).totals.bytes == 40
    view = torch.zeros(1000)[:10]
    assert lateinit.summary(view).totals.bytes == 40


def test_only_takes_what_materialize_takes() -> None:
    model = lateinit.deferred_init(nn.Linear, 2, 2)
    assert list(rows(model, only="*bias")) == ["bias"]
    assert list(rows(model, only=lambda name, tensor: tensor.dim() == 2)) == ["weight"]
    with pytest.raises(errors.PatternError, match=r"matches no tensor.*bias"):
        lateinit.summary(model, only="*.biases")


def test_a_model_of_160_gib_is_described() -> None:
    def stack() -> nn.Module:
        return nn.Sequential(*[nn.Linear(32768, 32768) for _ in range(40)])

    table = lateinit.summary(lateinit.deferred_init(stack))
    assert table.totals.bytes > 150 * 2**30
    assert "{0..39}.weight  x40" in str(table)


def test_json_lists_every_tensor_and_is_json() -> None:
    model = lateinit.deferred_init(lambda: nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)))
    data = json.loads(json.dumps(lateinit.summary(model).to_dict()))
    assert [tensor["name"] for tensor in data["tensors"]] == [
        "0.weight",
        "0.bias",
        "1.weight",
        "1.bias",
    ]
    assert data["tensors"][0]["init"] == "kaiming_uniform_(a=2.236)"
    assert data["totals"]["bytes_by_dtype"] == {"float32": 48}


def test_the_notebook_view_is_escaped() -> None:
    model = nn.Module()
    model.register_buffer("<script>", torch.zeros(1))
    shown = lateinit.summary(model)._repr_html_()
    assert "<script>" not in shown
    assert "&lt;script&gt;" in shown


@pytest.mark.parametrize("width", [40, 80, 120, 200])
def test_a_console_of_any_width_shows_every_name_and_takes_no_markup(width: int) -> None:
    model = lateinit.deferred_init(nn.Linear, 2, 2)
    model.register_buffer("[red]x[/red]", torch.zeros(1))
    console = Console(width=width, record=True, file=None)
    with console.capture() as captured:
        console.print(lateinit.summary(model))
    shown = captured.get()
    assert max(map(len, shown.splitlines())) <= width
    for name in ("weight", "bias", "[red]x[/red]"):
        assert name in shown


def test_nothing_at_all_can_be_summarised() -> None:
    table = lateinit.summary(nn.Identity())
    assert table.rows == ()
    assert "0 parameters" in str(table)


def test_the_example_runs() -> None:
    module = sys.modules["lateinit._report.summary"]
    found = doctest.testmod(module, extraglobs={"lateinit": lateinit, "torch": torch})
    assert found.attempted > 0
    assert found.failed == 0


# -- folding -------------------------------------------------------------------------------------


def folded(*names: str) -> list[str]:
    return [name for name, _ in fold(names, str, lambda _: 0)]


def test_runs_of_layers_fold() -> None:
    assert folded("l.0.a", "l.0.b", "l.1.a", "l.1.b") == ["l.{0..1}.a", "l.{0..1}.b"]
    assert folded("l.0.a", "l.2.a", "l.3.a") == ["l.{0,2..3}.a"]
    assert folded("l.0.x.0", "l.0.x.1", "l.1.x.0", "l.1.x.1") == ["l.{0..1}.x.{0..1}"]
    assert folded("a", "b.1") == ["a", "b.1"]


def test_what_is_no_full_grid_folds_where_it_is_one() -> None:
    assert folded("0.0", "0.1", "1.0") == ["{0..1}.0", "0.1"]
    assert folded("0.0", "0.1", "1.1", "1.2") == ["0.0", "{0..1}.1", "1.2"]


def test_long_lists_of_gaps_are_cut() -> None:
    assert folded(*[f"{i}.w" for i in range(0, 40, 2)]) == ["{0,2,4,...,38}.w"]


def test_names_with_braces_and_other_digits_stand_for_themselves() -> None:
    assert folded("layer1.{x}.0", "layer1.{x}.1") == ["layer1.{x}.{0..1}"]


def test_unlike_rows_do_not_fold() -> None:
    kinds = {"l.0": "a", "l.1": "b"}
    assert [name for name, _ in fold(kinds, str, kinds.get)] == ["l.0", "l.1"]


# -- units ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "count"),
    [("5GB", 5 * 10**9), ("2GiB", 2 * 2**30), ("1.5 MB", 1_500_000), ("500", 500), (7, 7)],
)
def test_sizes_are_read(text: str | int, count: int) -> None:
    assert parse_bytes(text) == count


@pytest.mark.parametrize("text", ["", "GB", "5 apples", "-1", "0", "1.2.3GB", 0])
def test_what_is_no_size_is_refused(text: str | int) -> None:
    with pytest.raises(ValueError, match="is no size"):
        parse_bytes(text)


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (999_999, "1.0 MB"),
        (497_759_232, "497.8 MB"),
        (5_000_000_000_000, "5.0 TB"),
    ],
)
def test_sizes_are_written(count: int, text: str) -> None:
    assert format_bytes(count) == text
