"""The notebook view of a summary: folded by module, and nothing but text in it."""

from __future__ import annotations

from html.parser import HTMLParser

import pytest
import torch
from torch import nn

import lateinit
from lateinit._report.notebook import _MOST


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.up(x))


def model() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 8), *(Block() for _ in range(4)), nn.Linear(8, 2))


class Tree(HTMLParser):
    """The lines of a view: the names from the outermost module in, and the cells."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.lines: list[tuple[tuple[str, ...], list[str]]] = []
        self.tags: set[str] = set()
        self.opened: list[bool] = []
        self._path: list[str] = []
        self._cells: list[str] = []
        self._in_cell = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        if tag == "details":
            self.opened.append(("open", None) in attrs or ("open", "") in attrs)
        if tag in {"div", "summary"}:
            self._cells = []
        if tag == "span":
            self._cells.append("")
        self._in_cell = tag == "span"

    def handle_data(self, data: str) -> None:
        if self._in_cell:
            self._cells[-1] += data

    def handle_endtag(self, tag: str) -> None:
        self._in_cell = False
        if tag in {"div", "summary"} and self._cells:
            self.lines.append(((*self._path, self._cells[0]), self._cells[1:]))
            if tag == "summary":
                self._path.append(self._cells[0].split("  ")[0])
            self._cells = []
        elif tag == "details":
            self._path.pop()


@pytest.mark.parametrize("what", ["modules", "tensors"])
def test_every_line_of_the_table_is_inside_its_module(what: str) -> None:
    found = lateinit.deferred_init(model)
    table = lateinit.summary(found, **({"depth": 9} if what == "modules" else {}))
    tree = Tree(table._repr_html_())
    shown = {(".".join(path), *cells) for path, cells in tree.lines}
    assert set(table.lines) <= shown
    assert tree.lines[0] == ((table.heads[0],), list(table.heads[1:]))


def test_a_module_has_the_bytes_of_its_tensors() -> None:
    tree = Tree(lateinit.summary(lateinit.deferred_init(model))._repr_html_())
    cells = {".".join(path): cells for path, cells in tree.lines}
    assert "4.5 kB" in cells["{1..4}"]
    assert "2.3 kB" in cells["{1..4}.up"]


def test_a_module_of_one_tensor_is_one_line() -> None:
    tree = Tree(lateinit.summary(nn.Sequential(nn.Embedding(3, 4), nn.Linear(2, 2)))._repr_html_())
    assert [path for path, _ in tree.lines[1:]] == [
        ("0.weight",),
        ("1",),
        ("1", "weight"),
        ("1", "bias"),
    ]


def test_small_models_are_open_and_large_ones_at_their_outermost_modules_alone() -> None:
    small = Tree(lateinit.summary(lateinit.deferred_init(model))._repr_html_())
    assert all(small.opened)
    large = nn.Sequential(*(nn.Sequential(nn.Linear(2, n + 1)) for n in range(20)))
    opened = Tree(
        lateinit.summary(nn.ModuleDict({"a": nn.Sequential(large, nn.Linear(2, 2))}))._repr_html_()
    ).opened
    assert opened[0]
    assert not all(opened)


def test_it_is_text_alone_without_scripts() -> None:
    hostile = '</span><script>alert("&")</script>'
    found = nn.Module()
    found.register_buffer(hostile.replace(".", ""), torch.zeros(1))
    found.add_module("{0}{", nn.Linear(2, 2))
    found.add_module("<b>", nn.Linear(2, 2))
    tree = Tree(lateinit.summary(found)._repr_html_())
    assert tree.tags == {"style", "div", "span", "details", "summary", "p", "br"}
    assert (hostile,) in [path for path, _ in tree.lines]


def test_a_very_long_table_says_what_it_leaves_out() -> None:
    found = nn.ModuleList(nn.Linear(1, n + 1) for n in range(_MOST // 2 + 3))
    shown = lateinit.summary(lateinit.deferred_init(lambda: found))._repr_html_()
    assert "... 6 more lines: print() shows all ..." in shown
    assert len(Tree(shown).lines) < 1.6 * _MOST
