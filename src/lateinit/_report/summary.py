"""``summary``: a table of a model's tensors, and how each of them will be initialised."""

from __future__ import annotations

import html
import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from rich import box
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text
from torch import Tensor

from lateinit._lazy import known_shape, show
from lateinit._program import describe_initialisation
from lateinit._report.name_folding import fold
from lateinit._report.tables import in_columns
from lateinit._tensors import Deferred, Found, Kind, Only, find_tensors, is_placeholder, select
from lateinit._torch import restoring, storage_key, without_subclass_functions
from lateinit._units import format_bytes
from lateinit.errors import listing

State = Literal["deferred", "lazy", "real", "meta"]
_HEADS = ("name", "shape", "dtype", "kind", "state", "bytes", "initialised")
# The columns that a terminal may break into several lines.
_WRAPPED = ("name", "initialised")


@dataclass(frozen=True, slots=True)
class Row:
    """One tensor.

    Attributes:
        names: all names of the tensor, the first one first.
        kind: parameter, buffer or attribute.
        persistent: whether a state dict holds it.
        shape: its shape, None for each unknown size; None if nothing is known.
        dtype: its dtype, without ``torch.``.
        device: the device it is on, or was recorded for.
        requires_grad: whether it requires gradients.
        state: deferred, lazy, real, or plain ``meta``.
        nbytes: its bytes; None if its shape is not known.
        init: how it is initialised; None if nothing was recorded.
        shares: the name of an earlier tensor on the same storage.
    """

    names: tuple[str, ...]
    kind: Kind
    persistent: bool
    shape: tuple[int | None, ...] | None
    dtype: str
    device: str
    requires_grad: bool
    state: State
    nbytes: int | None
    init: str | None
    shares: str | None

    @property
    def name(self) -> str:
        """Its first name."""
        return self.names[0]

    @property
    def numel(self) -> int:
        """How many elements it has; 0 if that is not known."""
        return _numel(self.shape)

    @property
    def notes(self) -> str:
        """Its ties and aliases, in words."""
        ties = [f"= {listing(self.names[1:], 3)}"] if len(self.names) > 1 else []
        return ", ".join([*ties, *([f"shares memory with {self.shares}"] if self.shares else [])])

    @property
    def what(self) -> str:
        """Its kind, in words, with a note if a state dict leaves it out."""
        return self.kind if self.kind != "buffer" or self.persistent else "buffer (not saved)"


@dataclass(frozen=True, slots=True)
class Totals:
    """Sums over a model, without tensors of unknown size; bytes count shared memory once."""

    tensors: int
    unsized_tensors: int
    parameters: int
    buffers: int
    bytes: int
    deferred_bytes: int
    bytes_by_dtype: dict[str, int]


@dataclass(frozen=True)
class Summary:
    """A table of a model's tensors. Print it, show it in a notebook, or take ``to_dict()``.

    Attributes:
        rows: one for each tensor, in the order of the module.
        totals: the sums.
    """

    rows: tuple[Row, ...]
    totals: Totals

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain data, one entry a tensor, nothing folded."""
        tensors = [{"name": row.name, **asdict(row)} for row in self.rows]
        return {"tensors": tensors, "totals": asdict(self.totals)}

    @cached_property
    def lines(self) -> tuple[tuple[str, ...], ...]:
        """The cells of the table as printed, with repeated layers folded."""
        return tuple(_cells(name, rows) for name, rows in fold(self.rows, _name, _alike))

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
        return "\n".join([*in_columns(_HEADS, self.lines), self.footer])

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        shown = self._columns(options.max_width)
        table = Table(*(_HEADS[i] for i in shown), box=box.SIMPLE_HEAD, pad_edge=False)
        for index, column in zip(shown, table.columns, strict=True):
            column.overflow = "fold"
            column.no_wrap = _HEADS[index] not in _WRAPPED
            column.justify = "right" if _HEADS[index] == "bytes" else "left"
        for line in self.lines:
            table.add_row(*(Text(line[i]) for i in shown))
        yield table
        yield Text(self.footer)

    def _columns(self, room: int) -> list[int]:
        """The columns that fit a width.

        Columns with the same cell in every line are left out first, then the others in a fixed
        order; ``name`` always stays.
        """
        table = [_HEADS, *self.lines]
        # Three characters for the padding and the gap between columns; a wrapped column can shrink
        # to 16.
        widths = [max(len(line[i]) for line in table) + 3 for i in range(len(_HEADS))]
        folded = [min(w, 16) if h in _WRAPPED else w for h, w in zip(_HEADS, widths, strict=True)]
        shown = list(range(len(_HEADS)))
        for head in ("state", "dtype", "kind", "bytes"):
            index = _HEADS.index(head)
            same = len({line[index] for line in self.lines}) <= 1
            if same and sum(widths[i] for i in shown) > room:
                shown.remove(index)
        for head in ("bytes", "kind", "state", "dtype", "initialised", "shape"):
            index = _HEADS.index(head)
            if index in shown and sum(folded[i] for i in shown) > room:
                shown.remove(index)
        return shown

    def _repr_html_(self) -> str:
        head = "".join(f"<th>{name}</th>" for name in _HEADS)
        body = "".join(
            f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in line)}</tr>"
            for line in self.lines
        )
        footer = html.escape(self.footer).replace("\n", "<br>")
        return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table><p>{footer}</p>"


@restoring
def summary(module: Any, *, only: Only | None = None) -> Summary:
    """A table of every tensor of a model: what it is, and how it will be initialised.

    Nothing is allocated, run or changed.

    Args:
        module: a module, a tensor, or a list, tuple or dict of them.
        only: which tensors: a glob on their fully qualified names, several globs, or a predicate
            ``(fqn, tensor) -> bool``.

    Returns:
        A ``Summary``, in the order of the module. When printed, repeated layers share a line.

    Raises:
        PatternError: a pattern of ``only`` matches no tensor.

    Example:
        >>> with lateinit.deferred():
        ...     layer = torch.nn.Linear(4, 2, bias=False)
        >>> print(lateinit.summary(layer))
        name    shape   dtype    kind       state     bytes  initialised
        ------  ------  -------  ---------  --------  -----  -------------------------
        weight  (2, 4)  float32  parameter  deferred   32 B  kaiming_uniform_(a=2.236)
        ------  ------  -------  ---------  --------  -----  -------------------------
        8 parameters, 0 elements of buffers, in 1 tensor
        32 B (float32 32 B), of which 32 B deferred
    """
    rows: list[Row] = []
    first: dict[int, str] = {}  # the first name on each storage, by its key
    sizes: dict[int, _Memory] = {}
    for found in select(find_tensors(module), only):
        row, key = _row(found, first), _storage_key(found.tensor)
        rows.append(row)
        if row.nbytes is not None:
            sizes.setdefault(key, _Memory(row)).add(row.nbytes, found.tensor)
    return Summary(tuple(rows), _totals(rows, sizes.values()))


class _Memory:
    """The bytes of one storage, as far as some tensors cover it."""

    def __init__(self, row: Row) -> None:
        self.dtype = row.dtype
        self.deferred = row.state == "deferred"
        self.nbytes = 0

    def add(self, nbytes: int, tensor: Tensor) -> None:
        """Count a tensor on this storage; views of the same bytes do not count twice."""
        self.nbytes = min(self.nbytes + nbytes, max(_storage_bytes(tensor), nbytes))


def _row(found: Found, first: dict[int, str]) -> Row:
    tensor = found.tensor
    shape = known_shape(tensor)
    state, device, init = _state(found)
    owner = first.setdefault(_storage_key(tensor), found.name)
    return Row(
        names=tuple(found.names),
        kind=found.kind,
        persistent=found.persistent,
        shape=shape,
        dtype=str(tensor.dtype).removeprefix("torch."),
        device=device,
        requires_grad=tensor.requires_grad,
        state=state,
        nbytes=None if shape is None or None in shape else _numel(shape) * tensor.dtype.itemsize,
        init=init,
        shares=owner if owner != found.name else None,
    )


def _numel(shape: tuple[int | None, ...] | None) -> int:
    """How many elements a shape has; 0 if that is not known."""
    return 0 if shape is None else math.prod(size or 0 for size in shape)


def _state(found: Found) -> tuple[State, str, str | None]:
    """The state of a tensor, its device (or the recorded one), and its initialisation."""
    tensor = found.tensor
    if is_placeholder(tensor):
        return "lazy", str(tensor.device), None
    if not found.deferred:
        return "meta" if tensor.is_meta else "real", str(tensor.device), None
    deferred = Deferred.of(tensor)
    how = describe_initialisation(deferred.program, deferred.ref)
    return "deferred", str(deferred.device), how


def _storage_key(tensor: Tensor) -> int:
    storage = _storage(tensor)
    return id(tensor) if storage is None else storage_key(storage)


def _storage_bytes(tensor: Tensor) -> int:
    storage = _storage(tensor)
    return 0 if storage is None else storage.nbytes()


def _storage(tensor: Tensor) -> torch.UntypedStorage | None:
    if is_placeholder(tensor):
        return None
    with without_subclass_functions():
        try:
            return tensor.untyped_storage()
        except (NotImplementedError, RuntimeError):  # layouts that have no storage
            return None


def _totals(rows: list[Row], memories: Iterable[_Memory]) -> Totals:
    by_dtype: Counter[str] = Counter()
    deferred = 0
    for memory in memories:
        by_dtype[memory.dtype] += memory.nbytes
        deferred += memory.nbytes if memory.deferred else 0
    return Totals(
        tensors=len(rows),
        unsized_tensors=sum(row.nbytes is None for row in rows),
        parameters=sum(row.numel for row in rows if row.kind == "parameter"),
        buffers=sum(row.numel for row in rows if row.kind == "buffer"),
        bytes=by_dtype.total(),
        deferred_bytes=deferred,
        bytes_by_dtype=dict(by_dtype.most_common()),
    )


def _name(row: Row) -> str:
    return row.name


def _alike(row: Row) -> tuple[Any, ...]:
    """What rows on one printed line have in common; a tensor with ties has its own line."""
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
