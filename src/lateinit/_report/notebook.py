"""A summary in a notebook: folded by module, in plain HTML and without scripts."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from html import escape

from lateinit._units import format_bytes

# The most lines of a table: with more a notebook gets slow, and no reader opens so many modules.
_MOST = 1000
# With at most so many lines, all modules are open at first.
_OPEN = 24
# The dots of a name, except those in `{0..31}`, which `fold` writes.
_DOTS = re.compile(r"\.(?![^{}]*\})")

# The other columns share the rest of the width.
_WIDTHS = {
    **dict.fromkeys(("name", "module"), "minmax(0, 2fr)"),
    "dtype": "5.5em",
    "kind": "8.5em",
    "state": "5em",
    "bytes": "5.5em",
    "parameters": "8em",
    "FLOPs": "5em",
}

# All rules are under the class, so that no other output of the notebook changes. The colours suit
# a light and a dark page.
_STYLE = """<style>
.lateinit { font-size: 13px; line-height: 1.5; overflow-x: auto; }
.lateinit .line { display: grid; gap: 0 16px; padding: 2px 6px; min-width: 860px;
  border-bottom: 1px solid rgba(128, 128, 128, .22); align-items: baseline; text-align: left; }
.lateinit .head { opacity: .65; border-bottom-color: rgba(128, 128, 128, .6); }
.lateinit .line > :first-child { font-family: ui-monospace, Menlo, Consolas, monospace;
  font-size: 12.5px; overflow-wrap: anywhere; unicode-bidi: isolate; }
.lateinit .right { text-align: right; font-variant-numeric: tabular-nums; }
.lateinit summary { cursor: pointer; list-style: none; font-weight: 600; }
.lateinit summary::-webkit-details-marker { display: none; }
.lateinit summary > :first-child::before { content: "\\25b8"; display: inline-block; width: 14px;
  margin-left: -14px; opacity: .65; font-weight: 400; }
.lateinit details[open] > summary > :first-child::before { content: "\\25be"; }
.lateinit .line:hover { background: rgba(128, 128, 128, .12); }
.lateinit p { margin: 8px 6px; }
</style>"""


@dataclass(frozen=True, slots=True)
class Shown:
    """A line of a table.

    Attributes:
        name: a fully qualified name, folded or not; its last part is shown inside its module.
        cells: the cells of the line; the first has the name with its remarks.
        nbytes: the bytes that are added to the modules around it.
    """

    name: str
    cells: tuple[str, ...]
    nbytes: int = 0


@dataclass(slots=True)
class _Node:
    name: str
    line: Shown | None = None
    nbytes: int = 0
    inside: dict[str, _Node] = field(default_factory=dict)


def as_notebook(
    heads: Sequence[str], right: Iterable[str], lines: Sequence[Shown], footer: str
) -> str:
    """The table as HTML.

    Args:
        heads: the names of the columns.
        right: the columns that are flush right.
        lines: the lines, of tensors or of modules.
        footer: the totals, in words.
    """
    widths = " ".join(_WIDTHS.get(head, "minmax(0, 1fr)") for head in heads)
    style = f' style="grid-template-columns:{widths}"'
    table = _Table(heads, frozenset(right), style, is_open=len(lines) <= _OPEN)
    root = _Node("")
    for line in lines[:_MOST]:
        _add(root, line)
    body = "".join(table.shown(node, 0) for node in root.inside.values())
    if root.line is not None:
        body = table.row("div", root.line.cells, 0) + body
    more = len(lines) - _MOST
    left = f"<p>... {more:,} more lines: print() shows all ...</p>" if more > 0 else ""
    end = escape(footer).replace("\n", "<br>")
    head = table.row("div", heads, 0, "line head")
    return f'{_STYLE}<div class="lateinit">{head}{body}{left}<p>{end}</p></div>'


def _add(root: _Node, line: Shown) -> None:
    node = root
    node.nbytes += line.nbytes
    for part in _DOTS.split(line.name) if line.name else ():
        node = node.inside.setdefault(part, _Node(part))
        node.nbytes += line.nbytes
    node.line = line


@dataclass(slots=True)
class _Table:
    heads: Sequence[str]
    right: frozenset[str]
    style: str
    is_open: bool

    def shown(self, node: _Node, depth: int) -> str:
        """The HTML of a tensor, or of a module with its contents."""
        name = node.name
        while node.line is None and len(node.inside) == 1:  # `transformer.h` on one line
            (node,) = node.inside.values()
            name += f".{node.name}"
        cells = self._cells(node, name)
        if not node.inside:
            return self.row("div", cells, depth)
        inside = "".join(self.shown(part, depth + 1) for part in node.inside.values())
        opened = " open" if self.is_open or depth == 0 else ""
        return f"<details{opened}>{self.row('summary', cells, depth)}{inside}</details>"

    def _cells(self, node: _Node, name: str) -> list[str]:
        if node.line is None:
            nbytes = format_bytes(node.nbytes) if node.nbytes else ""
            return [name, *(nbytes if head == "bytes" else "" for head in self.heads[1:])]
        first, *rest = node.line.cells
        return [name + first.removeprefix(node.line.name), *rest]

    def row(self, tag: str, cells: Sequence[str], depth: int, kind: str = "line") -> str:
        """One line; the spaces separate cells if a notebook removes styles."""
        shown = " ".join(
            f"<span{_class(head in self.right)}>{escape(cell)}</span>"
            for head, cell in zip(self.heads[1:], cells[1:], strict=True)
        )
        name = f'<span style="padding-left:{14 + 16 * depth}px">{escape(cells[0])}</span>'
        return f'<{tag} class="{kind}"{self.style}>{name} {shown}</{tag}>'


def _class(right: bool) -> str:
    return ' class="right"' if right else ""
