"""``summary``: a table of a model's tensors, and how each of them will be initialised."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from torch import nn

from lateinit._identity import IdentityMap
from lateinit._lazy import show
from lateinit._report import by_module
from lateinit._report.name_folding import fold
from lateinit._report.notebook import Shown, as_notebook
from lateinit._report.rows import Entry, Row, Totals, entries, totals
from lateinit._report.tables import in_columns
from lateinit._tensors import Init, Only
from lateinit._terminal import Console, ConsoleOptions, RenderResult, Table, Text, box
from lateinit._text import folded
from lateinit._torch import name_of_class, restoring
from lateinit._units import format_bytes

_HEADS = ("name", "shape", "dtype", "kind", "state", "bytes", "initialised")
_RIGHT = ("bytes", "parameters", "FLOPs")
# The columns that a terminal may break into several lines.
_WRAPPED = ("name", "initialised", "module", "input", "output")
# The columns that are left out on a narrow terminal, in this order.
_SPARED = (
    *("buffers", "bytes", "kind", "state", "dtype", "initialised", "shape"),
    *("input", "class", "output", "parameters"),
)


@dataclass(frozen=True)
class Summary:
    """A table of a model's tensors, or of its modules.

    At a prompt it shows itself, the middle of a long one left out, and in a notebook folded by
    module. ``print`` shows all of it, and ``to_dict()`` gives the data.

    Attributes:
        rows: one for each tensor, in the order of the model.
        totals: the sums.
        modules: one for each module down to ``depth``; empty if neither ``depth`` nor ``example``
            was given. Then the table is that of the tensors.
    """

    rows: tuple[Row, ...]
    totals: Totals
    modules: tuple[by_module.Module, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain data, with one entry for each tensor and module, nothing folded."""
        tensors = [{"name": row.name, **asdict(row)} for row in self.rows]
        modules = {"modules": [asdict(module) for module in self.modules]} if self.modules else {}
        return {"tensors": tensors, "totals": asdict(self.totals), **modules}

    @property
    def _of_pass(self) -> bool:
        return any(module.calls is not None for module in self.modules)

    @property
    def heads(self) -> tuple[str, ...]:
        """The names of the columns."""
        if not self.modules:
            return _HEADS
        return (*by_module.HEADS, *(by_module.HEADS_OF_PASS if self._of_pass else ()))

    @cached_property
    def _shown(self) -> tuple[Shown, ...]:
        if self.modules:
            return tuple(
                Shown(name, by_module.cells(name, modules, of_pass=self._of_pass))
                for name, modules in by_module.folded(self.modules)
            )
        return tuple(
            Shown(name, _cells(name, rows), sum(row.nbytes or 0 for row in rows if not row.shares))
            for name, rows in fold(self.rows, _name, _alike)
        )

    @property
    def lines(self) -> tuple[tuple[str, ...], ...]:
        """The cells of the table as printed, with repeated layers folded."""
        return tuple(line.cells for line in self._shown)

    @property
    def footer(self) -> str:
        """The totals, in words."""
        t = self.totals
        dtypes = ", ".join(f"{k} {format_bytes(v)}" for k, v in t.bytes_by_dtype.items())
        tensors = f"{t.tensors:,} tensor{'s' * (t.tensors != 1)}"
        return (
            f"{t.parameters:,} parameters, {t.buffers:,} elements of buffers, in {tensors}\n"
            f"{format_bytes(t.bytes)} ({dtypes or 'nothing'}), of which "
            f"{format_bytes(t.deferred_bytes)} deferred"
        ) + (f"; {t.unsized_tensors:,} of unknown size not counted" if t.unsized_tensors else "")

    def __str__(self) -> str:
        return "\n".join([*in_columns(self.heads, self.lines, _RIGHT), self.footer])

    def __repr__(self) -> str:
        return "\n".join(folded(str(self).splitlines()))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        heads, shown = self.heads, self._columns(options.max_width)
        table = Table(*(heads[i] for i in shown), box=box.SIMPLE_HEAD, pad_edge=False)
        for index, column in zip(shown, table.columns, strict=True):
            column.overflow = "fold"
            column.no_wrap = heads[index] not in _WRAPPED
            column.justify = "right" if heads[index] in _RIGHT else "left"
        for line in self.lines:
            table.add_row(*(Text(line[i]) for i in shown))
        yield table
        yield Text(self.footer)

    def _columns(self, room: int) -> list[int]:
        """The columns that fit a width.

        Columns with the same cell in every line are left out first, then the others in a fixed
        order; the first always stays.
        """
        heads, table = self.heads, [self.heads, *self.lines]
        # Three characters for the padding and the gap between columns; a wrapped column can shrink
        # to 16.
        widths = [max(len(line[i]) for line in table) + 3 for i in range(len(heads))]
        narrow = [min(w, 16) if h in _WRAPPED else w for h, w in zip(heads, widths, strict=True)]
        shown = list(range(len(heads)))
        for index in (heads.index(h) for h in ("state", "dtype", "kind", "bytes") if h in heads):
            same = len({line[index] for line in self.lines}) <= 1
            if same and sum(widths[i] for i in shown) > room:
                shown.remove(index)
        for index in (heads.index(h) for h in _SPARED if h in heads):
            if index in shown and sum(narrow[i] for i in shown) > room:
                shown.remove(index)
        return shown

    def _repr_html_(self) -> str:
        return as_notebook(self.heads, _RIGHT, self._shown, self.footer)


@restoring
def summary(
    module: Any,
    *,
    only: Only | None = None,
    init: Init | None = None,
    depth: int | None = None,
    example: Any = None,
    real: bool = False,
) -> Summary:
    """A table of every tensor of a model, or of its modules, and how each will be initialised.

    Nothing is allocated, run or changed. With an example, a forward pass runs on shapes alone, as
    ``infer_shapes`` runs it: the model may be deferred and its modules lazy, and stay so.

    Args:
        module: a module, a tensor, or a list, tuple or dict of them.
        only: the tensors to show: a glob on their fully qualified names, several globs, or a
            predicate ``(fqn, tensor) -> bool``.
        init: initialisers by name, as for ``materialize``; they are shown.
        depth: show modules, with the totals of each, down to this many levels below the model.
        example: the input of ``forward``, on ``meta`` or real; several as a tuple or list, or by
            name in a dict. The modules are shown, with the shapes of their inputs and outputs and
            with the floating-point operations that ``torch.utils.flop_counter`` counts (those of
            matrix products, convolutions and attention).
        real: compute the pass with the values of the example, for a model whose control flow


    Raises:
        PatternError: a pattern of ``only`` or ``init`` matches no tensor.
        InitError: a value of ``init`` is no initialiser.
        NeedsValuesError: the pass depends on values; the message names the line.
        ShapeError: the example does not fit a lazy module.
        TypeError: ``example`` holds no tensor, or ``depth`` or ``example`` is given although
            ``module`` is no module.
        ValueError: ``depth`` is no whole number, or negative.

    Example:
        >>> with lateinit.deferred():
        ...     layer = torch.nn.Linear(4, 2, bias=False)
        >>> lateinit.summary(layer)
        name    shape   dtype    kind       state     bytes  initialised
        ------  ------  -------  ---------  --------  -----  -------------------------
        weight  (2, 4)  float32  parameter  deferred   32 B  kaiming_uniform_(a=2.236)
        ------  ------  -------  ---------  --------  -----  -------------------------
        8 parameters, 0 elements of buffers, in 1 tensor
        32 B (float32 32 B), of which 32 B deferred
        >>> found = lateinit.summary(layer, example=torch.empty(3, 4, device="meta"))
        >>> found.modules[0].outputs, found.modules[0].flops
        (((3, 2),), 48)
    """
    level: object = depth
    if level is not None and not (isinstance(level, int) and level >= 0):
        raise ValueError(
            f"depth={depth!r} is no level: 0 shows the model alone, 1 its children too"
        )
    if (depth is not None or example is not None) and not isinstance(module, nn.Module):
        raise TypeError(f"depth= and example= are for a module, not {type(module)}")
    found = entries(module, only, init)
    rows = tuple(row for row, _, _ in found)
    modules: tuple[by_module.Module, ...] = ()
    if depth is not None or example is not None:
        calls = None if example is None else by_module.observed(module, example, real=real)
        modules = tuple(_modules(module, found, depth, calls))
    return Summary(rows, totals(found), modules)


def _modules(
    model: nn.Module,
    found: list[Entry],
    depth: int | None,
    calls: IdentityMap[nn.Module, by_module.Calls] | None,
) -> Iterator[by_module.Module]:
    """The modules of a model down to a depth, with the totals of the tensors below each."""
    below: dict[str, list[Entry]] = {}
    for entry in found:
        parents = {
            ".".join(parts[:end])
            for parts in (name.split(".") for name in entry[0].names)
            for end in range(len(parts))
        }
        for parent in parents:
            below.setdefault(parent, []).append(entry)
    for name, part in model.named_modules():
        if depth is not None and name and name.count(".") >= depth:
            continue
        sums = totals(below.get(name, []))
        met = None if calls is None else calls.get(part)
        yield by_module.Module(
            name=name,
            kind=name_of_class(part),
            parameters=sums.parameters,
            buffers=sums.buffers,
            nbytes=sums.bytes,
            **({} if met is None else asdict(met)),
        )


def _name(row: Row) -> str:
    return row.name


def _alike(row: Row) -> tuple[Any, ...]:
    """The key that rows on one printed line have in common; a tied tensor has its own line."""
    own = row.name if row.notes else ""
    return (own, row.shape, row.dtype, row.what, row.state, row.init)


def _cells(name: str, rows: list[Row]) -> tuple[str, ...]:
    first = rows[0]
    times = f"  x{len(rows)}" if len(rows) > 1 else ""
    notes = f"  ({first.notes})" if first.notes else ""
    nbytes = sum(row.nbytes or 0 for row in rows)
    return (
        f"{name}{times}{notes}",
        show(first.shape),
        first.dtype,
        first.what,
        first.state,
        "?" if first.nbytes is None else format_bytes(nbytes),
        first.init or "",
    )
