"""A treemap of memory: nested modules, with several ways to colour them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

# The most boxes that are shown at once, and in all. Measured: plotly took 0.5 s for 1,400 boxes,
# and 23 s for 29,000.
_BOXES, _NODES = 700, 1200
# The number of distinct colours; one more is for all other kinds.
_COLOURS = 7
_REST = "others"


@dataclass(frozen=True, slots=True)
class Part:
    """A tensor: its fully qualified name, its bytes, and its kind for each way of colouring."""

    name: str
    nbytes: int
    kinds: dict[str, str]


@dataclass(slots=True)
class _Node:
    label: str
    parent: int
    nbytes: int = 0
    kinds: dict[str, Counter[int]] = field(default_factory=dict)


def treemap_of(parts: Sequence[Part], root: str) -> dict[str, Any]:
    """The boxes as plain data, the outermost one first, and the legend of each way to colour them.

    Args:
        parts: the tensors.
        root: the name of the outermost box.
    """
    parts = [part for part in parts if part.nbytes]
    ways = {"module": _modules(parts)}
    for way in parts[0].kinds if parts else ():
        ways[way] = [part.kinds[way] for part in parts]
    legends = {way: _Legend(kinds, parts) for way, kinds in ways.items()}
    nodes = [_Node(root, -1)]
    places: dict[tuple[str, bool], int] = {}
    for number, part in enumerate(parts):
        path, above = part.name.split("."), 0
        colours = {way: legends[way].colour(ways[way][number]) for way in ways}
        _add(nodes[0], part.nbytes, colours)
        for end in range(1, len(path) + 1):
            # In a checkpoint, a tensor may have the same name as a module of another tensor.
            key = ".".join(path[:end]), end == len(path)
            if key not in places:
                places[key] = len(nodes)
                nodes.append(_Node(path[end - 1], above))
            above = places[key]
            _add(nodes[above], part.nbytes, colours)
    nodes = _largest(nodes)
    levels = _levels(nodes)
    depth = _depth(levels)
    holding = {node.parent for node in nodes}
    return {
        "labels": [node.label for node in nodes],
        "parents": [node.parent for node in nodes],
        "values": [node.nbytes for node in nodes],
        "depth": depth,
        "frames": [n in holding and level < depth - 1 for n, level in enumerate(levels)],
        "ways": {
            way: {
                "legend": legend.shown,
                # A box that contains others has the colour of most of its bytes.
                "colours": [n.kinds[way].most_common(1)[0][0] if n.kinds else 0 for n in nodes],
            }
            for way, legend in legends.items()
        },
    }


def _largest(nodes: Sequence[_Node]) -> list[_Node]:
    """The largest boxes. All others inside the same box are joined to one."""
    # The sort is stable, so a box comes after the box that contains it, which is no smaller.
    kept = sorted(range(len(nodes)), key=lambda n: -nodes[n].nbytes)[:_NODES]
    numbers = {old: new for new, old in enumerate(sorted(kept))}
    found = [replace(nodes[old], parent=numbers.get(nodes[old].parent, -1)) for old in numbers]
    opened = {node.parent for node in found}
    rests: dict[int, list[_Node]] = {}
    for old, node in enumerate(nodes):
        if old not in numbers and numbers.get(node.parent) in opened:
            rests.setdefault(numbers[node.parent], []).append(node)
    for parent, left in rests.items():
        rest = _Node(left[0].label if len(left) == 1 else f"{len(left):,} smaller", parent)
        for node in left:
            rest.nbytes += node.nbytes
            for way, kinds in node.kinds.items():
                rest.kinds.setdefault(way, Counter()).update(kinds)
        found.append(rest)
    return found


def _add(node: _Node, nbytes: int, colours: dict[str, int]) -> None:
    node.nbytes += nbytes
    for way, colour in colours.items():
        node.kinds.setdefault(way, Counter())[colour] += nbytes


def _modules(parts: Sequence[Part]) -> list[str]:
    """The module of each tensor without the numbers of layers, as deep as the colours suffice.

    The module with most bytes is divided into its children until there are enough modules.
    """
    paths = [[p for p in part.name.split(".")[:-1] if not p.isdecimal()] for part in parts]
    depths = [1] * len(paths)
    while True:
        found = [".".join(path[:depth]) for path, depth in zip(paths, depths, strict=True)]
        nbytes: Counter[str] = Counter()
        deeper: set[str] = set()
        for module, path, depth, part in zip(found, paths, depths, parts, strict=True):
            nbytes[module] += part.nbytes
            if len(path) > depth:
                deeper.add(module)
        if not deeper or len(nbytes) >= _COLOURS:
            return found
        largest = max(deeper, key=lambda module: nbytes[module])
        for number, module in enumerate(found):
            depths[number] += module == largest


class _Legend:
    """The kinds that have a colour of their own: the kinds with most bytes.

    Attributes:
        shown: each kind with its bytes, largest first, and last the sum of all others.
    """

    def __init__(self, kinds: Iterable[str], parts: Iterable[Part]) -> None:
        found: Counter[str] = Counter()
        for kind, part in zip(kinds, parts, strict=True):
            found[kind] += part.nbytes
        top = found.most_common(_COLOURS)
        left = found.total() - sum(nbytes for _, nbytes in top)
        self.shown = [*top, *([(_REST, left)] if left else [])]
        self._colours = {kind: number for number, (kind, _) in enumerate(top)}

    def colour(self, kind: str) -> int:
        """The number of the colour of a kind."""
        return self._colours.get(kind, _COLOURS)


def _levels(nodes: Sequence[_Node]) -> list[int]:
    levels = [0]
    for node in nodes[1:]:
        levels.append(levels[node.parent] + 1)
    return levels


def _depth(levels: Sequence[int]) -> int:
    """How many levels to show at once."""
    boxes, counted = 0, Counter(levels)
    for level in range(max(levels) + 1):
        boxes += counted[level]
        if boxes > _BOXES:
            return max(2, level)
    return max(levels) + 1
