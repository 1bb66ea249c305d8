"""The page of a model or a checkpoint: what is on it, and what a browser makes of it."""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import lateinit
from lateinit._report import page
from lateinit._report.excerpts import Excerpt
from lateinit._report.page.histograms import histogram_of
from lateinit._report.page.treemap import Part, treemap_of
from lateinit.cli import app
from tests.support.browser import CHROMIUM, Page, browser

pytest.importorskip("plotly")
HOSTILE = '</script><img src="http://x.example/" onerror="document.title=1"><!--<script>'


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(60, 240), nn.Linear(240, 60)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(500, 60)
        self.layers = nn.ModuleList(Block() for _ in range(6))
        self.head = nn.Linear(60, 500, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("table", torch.arange(60.0) / 7, persistent=False)


SPEC = f"{__file__}:Net"


def command(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["report", *arguments])


def report(path: Path, *arguments: str) -> Path:
    found = command(*arguments, "-o", str(path))
    assert found.exit_code == 0, found.output
    return path


def data_of(path: Path) -> Any:
    text = path.read_text(encoding="utf-8")
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    assert found
    return json.loads(found[1])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("pages")


@pytest.fixture(scope="module")
def of_model(folder: Path) -> Path:
    torch.manual_seed(1)
    state = Net().state_dict()
    del state["layers.0.up.bias"]
    torch.save(state | {"extra": torch.ones(3)}, folder / "net.pt")
    options = ("--mesh", "fsdp=4", "--train", "mixed", "--checkpoint", str(folder / "net.pt"))
    return report(folder / "model.html", SPEC, *options)


@pytest.fixture(scope="module")
def of_hostile(folder: Path) -> Path:
    """Of a checkpoint whose names are what its author liked, and whose values are odd."""
    tensors = {
        f"{HOSTILE}.weight": torch.randn(50, 40),
        "$a$ %{label} {0} & <b>": torch.tensor([math.nan, math.inf]),
        "a": torch.tensor([1e308, -1e308], dtype=torch.float64),
        "a.b": torch.empty(0, 3),
        "eight": torch.zeros(9).to(torch.float8_e4m3fn),
    }
    torch.save(tensors, folder / "hostile.pt")
    return report(folder / "hostile.html", str(folder / "hostile.pt"))


# -- what is on it -------------------------------------------------------------------------------


def test_every_tensor_is_on_the_page_once_and_folded_with_those_like_it(of_model: Path) -> None:
    data = data_of(of_model)
    names = {name for name, _ in Net().named_parameters()} | {"table"}
    assert {line["name"] for line in data["lines"]} == names
    members = [number for group in data["groups"] for number in group["members"]]
    assert sorted(members) == list(range(len(names)))
    folded = {group["name"] for group in data["groups"]}
    assert "layers.{0..5}.up.weight" in folded
    assert {"layers.0.up.bias", "layers.{1..5}.up.bias"} <= folded  # not from the same source
    assert all(data["histograms"])


def test_the_values_shown_are_those_of_the_seed(folder: Path) -> None:
    path = report(folder / "seed.html", SPEC, "--seed", "7")
    torch.manual_seed(7)
    expected = Net().layers[3].down.bias.detach()
    data = data_of(path)
    number = [line["name"] for line in data["lines"]].index("layers.3.down.bias")
    found = data["histograms"][number]
    assert found["low"] == float(expected.min())
    assert found["high"] == float(expected.max())
    assert sum(found["counts"]) == found["values"] == 60


def test_the_page_says_what_a_checkpoint_loads_initialises_and_computes(of_model: Path) -> None:
    sources = {line["name"]: line["source"] for line in data_of(of_model)["lines"]}
    assert sources.pop("layers.0.up.bias") == "initialised"
    assert sources.pop("table") == "computed"
    assert set(sources.values()) == {"loaded"}
    text = of_model.read_text(encoding="utf-8")
    assert "<b>1 unexpected</b>" in text
    assert "<li>extra (3,)</li>" in text


def test_what_is_loaded_shows_the_values_of_the_checkpoint(of_model: Path) -> None:
    torch.manual_seed(1)
    expected = Net().layers[2].up.bias.detach()
    data = data_of(of_model)
    number = [line["name"] for line in data["lines"]].index("layers.2.up.bias")
    assert data["histograms"][number]["high"] == float(expected.max())


def test_the_page_says_what_a_rank_holds(of_model: Path) -> None:
    text = of_model.read_text(encoding="utf-8")
    assert "fsdp 4: 4 ranks" in text
    assert "AdamW" in text


class _Links(HTMLParser):
    """What a page refers to."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, str]] = []
        self.policy = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {key: value or "" for key, value in attrs}
        self.found += [(tag, v) for k, v in given.items() if k in {"src", "href", "srcset"}]
        self.found += [(tag, v) for k, v in given.items() if k.startswith("on")]
        if given.get("http-equiv") == "Content-Security-Policy":
            self.policy = given["content"]


@pytest.mark.parametrize("of", ["of_hostile", "of_model"])
def test_the_page_refers_to_nothing_and_may_not(of: str, request: pytest.FixtureRequest) -> None:
    text = request.getfixturevalue(of).read_text(encoding="utf-8")
    links = _Links()
    links.feed(text)
    assert links.found == []
    assert "default-src 'none'" in links.policy
    assert "http" not in links.policy
    own = text[: text.index("<body>")] + text[text.rindex("<script>") :]
    assert not re.search(r"url\(|@import|fetch\(|XMLHttpRequest|\bimport\(", own)


def test_no_name_is_markup(of_hostile: Path) -> None:
    text = of_hostile.read_text(encoding="utf-8")
    assert "<img" not in text.replace(page.document.plotly_js(), "")
    assert text.count("<script") - page.document.plotly_js().count("<script") == 3


def test_a_title_that_is_markup_or_no_text_is_escaped(folder: Path) -> None:
    title = b"<b>\xff.pt".decode("utf-8", "surrogateescape")  # as a path may be
    path = folder / "title.html"
    page.written(page.of_model(title, lateinit.deferred_init(Net), seed=0), path)
    assert "<h1>&lt;b&gt;&#56575;.pt</h1>" in path.read_text(encoding="utf-8")


def test_a_large_model_has_few_boxes_and_all_of_its_bytes() -> None:
    parts = [Part(f"m{n % 60}.{n}.w", 10 + n, {"dtype": str(n % 12)}) for n in range(9000)]
    found = treemap_of(parts, "root")
    assert len(found["labels"]) < 1500
    for number, value in enumerate(found["values"]):
        inside = [v for v, p in zip(found["values"], found["parents"], strict=True) if p == number]
        assert not inside or sum(inside) == value
    assert found["values"][0] == sum(part.nbytes for part in parts)
    for way in found["ways"].values():
        assert sum(nbytes for _, nbytes in way["legend"]) == found["values"][0]
        assert max(way["colours"]) < len(way["legend"]) <= 8


def test_a_module_of_most_bytes_is_divided_until_the_colours_are_used() -> None:
    names = [f"model.layers.{n}.{part}.w" for n in range(4) for part in ("attn", "mlp")]
    found = treemap_of([Part(n, 100, {}) for n in [*names, "model.embed.w", "head.w"]], "root")
    legend = dict(found["ways"]["module"]["legend"])
    assert legend == {
        "model.layers.attn": 400,
        "model.layers.mlp": 400,
        "model.embed": 100,
        "head": 100,
    }


@pytest.mark.parametrize(
    ("values", "counts", "not_finite"),
    [
        ([1.0, 1.0], 1, 0),
        ([0.0, 1.0, math.nan], 41, 1),
        ([1e308, -1e308], 41, 0),
        ([1e-320, 0.0], 41, 0),
        ([math.inf], 0, 1),
        ([], 0, 0),
    ],
)
def test_a_histogram_takes_any_values(values: list[float], counts: int, not_finite: int) -> None:
    found = histogram_of([Excerpt(torch.tensor(values, dtype=torch.float64))])
    assert len(found.counts) == counts
    assert sum(found.counts) == len(values) - found.not_finite
    assert found.not_finite == not_finite
    assert bool(found.why) == (not counts)


def test_the_model_stays_deferred_and_no_generator_moves() -> None:
    torch.manual_seed(0)
    model = lateinit.deferred_init(Net)
    state = torch.get_rng_state()
    page.of_model("net", model, seed=0)
    assert torch.equal(state, torch.get_rng_state())
    assert all(lateinit.is_deferred(p) for p in model.parameters())


# -- wrong input ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("output", "said"),
    [
        ("there.html", r"exists: give --force to replace it"),
        ("no/folder.html", r"there is no folder .*no: make it first"),
        ("", r"is a folder: name a file"),
    ],
)
def test_an_output_that_cannot_be_written_is_refused_first(
    output: str, said: str, tmp_path: Path
) -> None:
    (tmp_path / "there.html").write_text("mine")
    found = command("no.such:model", "-o", str(tmp_path / output))
    assert found.exit_code == 2
    assert re.search(said, found.output.replace("\n", " "))
    assert [path.name for path in tmp_path.iterdir()] == ["there.html"]
    assert (tmp_path / "there.html").read_text() == "mine"


def test_a_link_is_followed_and_a_device_is_no_place(tmp_path: Path) -> None:
    place = tmp_path / "place.html"
    place.write_text("old")
    (tmp_path / "link.html").symlink_to(place)
    report(tmp_path / "link.html", SPEC, "--force")
    assert (tmp_path / "link.html").is_symlink()
    assert place.stat().st_size > 1_000_000
    found = command(SPEC, "-o", "/dev/null", "--force")
    assert found.exit_code == 2
    assert "/dev/null is no regular file" in found.output


def test_without_plotly_the_command_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    found = command(SPEC, "-o", str(tmp_path / "x.html"))
    assert found.exit_code == 2
    assert "pip install 'lateinit[report]'" in found.output


def test_a_model_that_cannot_be_built_leaves_no_page(tmp_path: Path) -> None:
    found = command(f"{__file__}:nothing", "-o", str(tmp_path / "x.html"))
    assert found.exit_code == 2
    assert "has no 'nothing'" in found.output
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("option", ["checkpoint", "kwargs", "mesh", "train"])
def test_options_of_models_are_refused_for_a_checkpoint(option: str, of_hostile: Path) -> None:
    checkpoint = str(of_hostile.with_name("hostile.pt"))
    found = command(checkpoint, f"--{option}", "fsdp=2", "-o", str(of_hostile), "--force")
    assert found.exit_code == 2
    assert f"--{option}" in found.output


# -- in a browser --------------------------------------------------------------------------------

needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no chromium is installed")
LINES = "[...document.querySelectorAll('#rows tr')].map(r => r.cells[0].textContent)"


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with browser(tmp_path_factory.mktemp("profile")) as found:
        yield found


@needs_browser
@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [400, 1280])
def test_a_browser_without_network_shows_all_of_it(
    width: int, dark: bool, seen: Page, of_model: Path
) -> None:
    seen.errors.clear()
    seen.requests.clear()
    seen.open(of_model, width=width, dark=dark)
    assert seen.errors == []
    assert [url for url in seen.requests if not url.startswith("data:")] == [of_model.as_uri()]
    assert seen.run("document.documentElement.scrollWidth") == width  # nothing sticks out
    assert seen.run("document.querySelectorAll('#treemap .slice').length") > 20
    assert seen.run("document.querySelectorAll('#histogram .bars path').length") == 41
    assert seen.run("document.querySelectorAll('#cards button').length") > 3
    assert seen.run(f"{LINES}.length") == seen.run("data.groups.length")
    background = seen.run("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", background))) < 200) == dark


@needs_browser
def test_the_table_sorts_filters_and_opens(seen: Page, of_model: Path) -> None:
    seen.open(of_model)
    first = seen.run(LINES)
    seen.click("#heads button[value=bytes]")
    sizes = seen.run("rows().map(r => r.bytes)")
    assert sizes == sorted(sizes, reverse=True)
    assert seen.run(f"{LINES}[0]").startswith("\u25b8layers.{0..5}.")
    seen.click("#heads button[value=bytes]")
    assert seen.run("rows().map(r => r.bytes)") == sorted(sizes)
    seen.click("#heads button[value=bytes]")
    assert seen.run(LINES) == first
    seen.type("#filter", "UP weight")
    assert seen.run(LINES) == ["\u25b8layers.{0..5}.up.weight \u00d7\u00a06"]
    assert seen.run("document.getElementById('count').textContent").startswith("6 of 26 tensors")
    seen.click("#rows button[aria-expanded]")
    assert seen.run(LINES)[1:] == [f"layers.{n}.up.weight" for n in range(6)]
    seen.type("#filter", "layers.4.up computed")
    assert seen.run(LINES) == []
    seen.type("#filter", "layers.4.up.weight")
    assert seen.run(LINES) == ["layers.4.up.weight"]


@needs_browser
def test_colours_and_histograms_are_chosen(seen: Page, of_model: Path) -> None:
    seen.open(of_model)
    for way, kind in (("init", "normal_()"), ("source", "computed"), ("dtype", "float32")):
        seen.click(f"#ways button[value={way}]")
        assert kind in seen.run("document.getElementById('legend').textContent")
    seen.click("#cards button:nth-child(2)")
    chosen = seen.run("document.querySelector('#cards button:nth-child(2)').title")
    assert seen.run("document.getElementById('which').textContent") == chosen
    assert seen.errors == []


@needs_browser
def test_hostile_names_are_text_in_a_browser(seen: Page, of_hostile: Path) -> None:
    seen.errors.clear()
    seen.requests.clear()
    seen.open(of_hostile)
    assert seen.run("document.title") == str(of_hostile.with_name("hostile.pt"))
    assert seen.run("document.querySelectorAll('img').length") == 0
    assert len(seen.requests) == 1
    assert seen.errors == []
    shown = seen.run(LINES)
    assert f"{HOSTILE}.weight" in shown
    assert "$a$ %{label} {0} & <b>" in shown
    labels = seen.run("[...document.querySelectorAll('#treemap text')].map(t => t.textContent)")
    assert any(label.startswith('</script><img src="http://x') for label in labels)
