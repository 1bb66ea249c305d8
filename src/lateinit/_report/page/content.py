"""The data of the page of a model or of a checkpoint."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lateinit._checkpoint.formats import open_checkpoint
from lateinit._checkpoint.load import Loaded, LoadPlan
from lateinit._distributed.mesh_cost import Share
from lateinit._identity import IdentityMap
from lateinit._lazy import show
from lateinit._progress import Progress
from lateinit._report.contents import StoredRow, contents_of, memory_of
from lateinit._report.excerpts import Excerpt, excerpt_of, excerpt_of_stored
from lateinit._report.name_folding import fold
from lateinit._report.page.histograms import Histogram, histogram_of
from lateinit._report.page.treemap import Part, treemap_of
from lateinit._report.rows import Row, entries, totals
from lateinit._units import format_bytes
from lateinit._version import __version__

# The most tensors with a histogram. A jump of the generator takes 15 ms without the C kernels.
_MOST_EXCERPTS = 2000
_LEAST_OF_GROUP = 3


@dataclass(frozen=True, slots=True)
class Line:
    """One tensor.

    Attributes:
        name: its name.
        notes: its ties and aliases, in words.
        shape: its shape, in words.
        numel: its elements.
        dtype: its dtype, without ``torch.``.
        kind: parameter, buffer or attribute; not known for a checkpoint.
        nbytes: its bytes; None if its shape is not known.
        memory: the bytes of its memory; shared memory counts at one of its tensors only.
        init: how it is initialised, in words.
        source: the source of its values.
    """

    name: str
    notes: str
    shape: str
    numel: int
    dtype: str
    kind: str
    nbytes: int | None
    memory: int
    init: str
    source: str

    @property
    def alike(self) -> tuple[Any, ...]:
        """The key that tensors of one group have in common; a tied tensor has its own group."""
        own = self.name if self.notes else ""
        return own, self.shape, self.dtype, self.kind, self.init, self.source


@dataclass(frozen=True, slots=True)
class Group:
    """Tensors of one kind, whose names differ only in the numbers of layers.

    Attributes:
        name: their names, folded.
        members: their indices among the lines.
        histogram: the histogram of the values of those members that were sampled.
        seen: the number of members that were sampled.
    """

    name: str
    members: tuple[int, ...]
    histogram: Histogram
    seen: int


@dataclass(frozen=True)
class Content:
    """The data of a page.

    Attributes:
        title: the specification or the path.
        subtitle: a description of the model or checkpoint.
        facts: figures for the head of the page: a name, a figure and a remark each.
        lines: the tensors.
        histograms: the histogram of each line; None if it was not sampled.
        groups: the tensors again, folded.
        about: the versions and other facts on which the figures depend.
        share: a rank's share of the model on a mesh.
        loaded: the predicted result of loading a checkpoint.
    """

    title: str
    subtitle: str
    facts: tuple[tuple[str, str, str], ...]
    lines: tuple[Line, ...]
    histograms: tuple[Histogram | None, ...]
    groups: tuple[Group, ...]
    about: str
    share: Share | None = None
    loaded: Loaded | None = None

    def treemap(self) -> dict[str, Any]:
        """The treemap of memory, as plain data."""
        ways = [w for w in ("dtype", "init", "source") if any(getattr(x, w) for x in self.lines)]
        parts = [
            Part(line.name, line.memory, {way: getattr(line, way) for way in ways})
            for line in self.lines
        ]
        return treemap_of(parts, self.title)


def of_model(
    title: str,
    model: nn.Module,
    *,
    seed: int,
    share: Share | None = None,
    plan: LoadPlan | None = None,
) -> Content:
    """The data of the page of a deferred model, which stays deferred.

    Args:
        title: its specification.
        model: the model, recorded from ``seed``.
        seed: the seed, for the head of the page.
        share: a rank's share of the model on a mesh.
        plan: the plan to load a checkpoint into the model.
    """
    found = entries(model, None)
    memory = _memory(found)
    loaded = None if plan is None else plan.foreseen()
    stored = {} if plan is None else _stored(plan, found)
    sources = {} if loaded is None else _sources(loaded)
    lines = tuple(_line(row, memory[i], sources) for i, (row, _, _) in enumerate(found))

    def excerpt(number: int) -> Excerpt:
        row, _, tensor = found[number]
        if plan is not None and number in stored:
            return excerpt_of_stored(plan.reader, stored[number])
        if lines[number].source == "loaded":
            return replace(_NOTHING, why="a hook of load_state_dict computes it")
        return excerpt_of(tensor, row.state)

    sums = totals(found)
    ties = sum(len(row.names) - 1 for row, _, _ in found)
    histograms, groups = _looked_at(lines, excerpt)
    return Content(
        title=title,
        subtitle=f"{type(model).__name__}, recorded and not built",
        facts=(
            ("parameters", *_count(sums.parameters)),
            ("memory", format_bytes(sums.bytes), _dtypes(sums.bytes_by_dtype)),
            ("tensors", f"{sums.tensors:,}", _unsized(sums.unsized_tensors)),
            ("tied names", f"{ties:,}", "more names than tensors" if ties else "none"),
            ("seed", f"{seed}", f"as torch.manual_seed({seed})"),
        ),
        lines=lines,
        histograms=histograms,
        groups=groups,
        about=_versions(),
        share=share,
        loaded=loaded,
    )


def of_checkpoint(title: str, path: Path) -> Content:
    """The data of the page of a checkpoint alone; only a few blocks of its tensors are read.

    Args:
        title: the name of the checkpoint.
        path: any checkpoint that ``load_checkpoint`` reads.
    """
    reader = open_checkpoint(path)
    found = contents_of(reader, path)
    rows = zip(found.rows, memory_of(found.rows, reader), strict=True)
    lines = tuple(_stored_line(row, memory) for row, memory in rows)
    histograms, groups = _looked_at(
        lines, lambda number: excerpt_of_stored(reader, lines[number].name)
    )
    ties = sum(len(row.aliases) for row in found.rows)
    objects = f"and {len(found.objects):,} that are none" if found.objects else ""
    on_disk = format_bytes(sum(file.nbytes for file in found.files.values()))
    return Content(
        title=title,
        subtitle=f"a checkpoint in the format {found.format}, of which a few blocks were read",
        facts=(
            ("elements", *_count(found.totals.elements)),
            ("memory", format_bytes(found.totals.bytes), _dtypes(found.totals.bytes_by_dtype)),
            ("tensors", f"{found.totals.tensors:,}", objects),
            ("tied names", f"{ties:,}", "not written again" if ties else "none"),
            ("files", f"{len(found.files):,}", on_disk),
        ),
        lines=lines,
        histograms=histograms,
        groups=groups,
        about=_versions(),
    )


_NOTHING = Excerpt(torch.empty(0, dtype=torch.float64, device="cpu"))


def _line(row: Row, memory: int, sources: dict[str, str]) -> Line:
    found = next((sources[name] for name in row.names if name in sources), "")
    return Line(
        name=row.name,
        notes=row.notes,
        shape=show(row.shape),
        numel=row.numel,
        dtype=row.dtype,
        kind=row.what,
        nbytes=row.nbytes,
        memory=memory,
        init=row.init or row.state,
        source=found,
    )


def _stored_line(row: StoredRow, memory: int) -> Line:
    return Line(
        name=row.name,
        notes=row.notes,
        shape=show(row.shape),
        numel=math.prod(row.shape),
        dtype=row.dtype,
        kind="",
        nbytes=row.nbytes,
        memory=memory,
        init="",
        source="",
    )


def _memory(found: Sequence[tuple[Row, int, Tensor]]) -> list[int]:
    """The bytes of each tensor's storage, counted at the first tensor on it."""
    places: dict[int, list[int]] = {}
    for number, (_, key, _) in enumerate(found):
        places.setdefault(key, []).append(number)
    sums = [0] * len(found)
    for numbers in places.values():
        sums[numbers[0]] = totals([found[number] for number in numbers]).bytes
    return sums


def _stored(plan: LoadPlan, found: Sequence[tuple[Row, int, Tensor]]) -> dict[int, str]:
    """The name in the checkpoint from which each tensor gets its values, if it is a single one."""
    copies: IdentityMap[Tensor, str] = IdentityMap()
    for target, source in plan.rehearsal.copies:
        if isinstance(source, str):
            copies[target] = source
    return {n: copies[tensor] for n, (_, _, tensor) in enumerate(found) if tensor in copies}


def _sources(loaded: Loaded) -> dict[str, str]:
    kinds = {
        "initialised": loaded.initialised,
        "computed": loaded.computed,
        "loaded": loaded.loaded,
    }
    return {entry.name: kind for kind, tensors in kinds.items() for entry in tensors}


def _looked_at(
    lines: Sequence[Line], excerpt: Callable[[int], Excerpt]
) -> tuple[tuple[Histogram | None, ...], tuple[Group, ...]]:
    """The histograms of the lines, and the groups with their histograms."""
    numbered = list(enumerate(lines))
    folds = fold(numbered, lambda each: each[1].name, lambda each: each[1].alike)
    folded = [(name, [number for number, _ in each]) for name, each in folds]
    most = max(_LEAST_OF_GROUP, _MOST_EXCERPTS // max(1, len(folded)))
    histograms: list[Histogram | None] = [None] * len(lines)
    groups = []
    chosen = [_spread(members, most) for _, members in folded]
    with Progress("sample", sum(map(len, chosen))) as bar:
        for (name, members), some in zip(folded, chosen, strict=True):
            excerpts = [excerpt(number) for number in some]
            for number, values in zip(some, excerpts, strict=True):
                histograms[number] = histogram_of([values])
            pooled = histogram_of(excerpts, of_all=len(some) == len(members))
            groups.append(Group(name, tuple(members), pooled, len(some)))
            bar.advance(len(some))
    return tuple(histograms), tuple(groups)


def _spread(members: Sequence[int], most: int) -> list[int]:
    """At most ``most`` of the members, evenly spread, from the first to the last."""
    if len(members) <= most:
        return [*members]
    return [members[(len(members) - 1) * i // (most - 1)] for i in range(most)]


def _count(number: int) -> tuple[str, str]:
    """A count in words, such as ``70.6 billion``, and in figures if the words are rounded."""
    for word, size in (("trillion", 10**12), ("billion", 10**9), ("million", 10**6)):
        if number >= size:
            return f"{number / size:,.1f} {word}", f"{number:,}"
    return f"{number:,}", ""


def _dtypes(by_dtype: dict[str, int]) -> str:
    if len(by_dtype) == 1:
        return next(iter(by_dtype))
    return ", ".join(f"{dtype} {format_bytes(nbytes)}" for dtype, nbytes in by_dtype.items())


def _unsized(count: int) -> str:
    return f"{count:,} of unknown size not counted" if count else ""


def _versions() -> str:
    return f"lateinit {__version__}, torch {torch.__version__}"
