"""``lateinit diff``: the differences between two checkpoints, or a checkpoint and a model."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import reduce
from operator import add
from typing import Any

import torch
from torch import Tensor

from lateinit._checkpoint.formats import Reader, StoredTensor
from lateinit._checkpoint.load import AS_FOUND, selected
from lateinit._lazy import show
from lateinit._progress import Progress
from lateinit._report.computed import ComputedReader
from lateinit._report.name_folding import fold
from lateinit._report.tables import printable
from lateinit._report.values import ValueDifference, blocks, comparable
from lateinit._tensors import by_globs
from lateinit._units import format_bytes
from lateinit.errors import CheckpointError, MismatchError

ONLY_A, ONLY_B = "only in A", "only in B"


@dataclass(frozen=True, slots=True)
class NameDifference:
    """A difference under one name.

    Attributes:
        name: the name.
        what: ``only in A`` or ``only in B``; or which of shape, dtype and values differ; or
            ``object`` for a value that is no tensor.
        left: the tensor of A, if there is one.
        right: the tensor of B, if there is one.
        values: the difference of the values, if they differ.
    """

    name: str
    what: tuple[str, ...]
    left: StoredTensor | None = None
    right: StoredTensor | None = None
    values: ValueDifference | None = None

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain data."""
        return {
            "name": self.name,
            "what": list(self.what),
            "a": _described(self.left),
            "b": _described(self.right),
            "values": self.values and self.values.to_dict(),
        }


@dataclass(frozen=True)
class Differences:
    """All differences. Print it, or use ``to_dict()``.

    Attributes:
        left: the name of A in messages.
        right: the name of B in messages.
        rows: the differences, one for each name that differs.
        names: the number of names in A and B together.
        nbytes: the bytes of A's tensors that B has too.
        values: whether values were compared.
        hint: the next step, if A and B have no name in common.
    """

    left: str
    right: str
    rows: tuple[NameDifference, ...]
    names: int
    nbytes: int
    values: bool
    hint: str = ""

    @property
    def equal(self) -> bool:
        """Whether nothing differs."""
        return not self.rows

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain data, with one entry for each name, nothing folded."""
        return {
            "equal": self.equal,
            "a": self.left,
            "b": self.right,
            "names": self.names,
            "values_compared": self.values,
            "differences": [row.to_dict() for row in self.rows],
        }

    def __str__(self) -> str:
        lines = [f"A  {self.left}", f"B  {self.right}"]
        lines += [_line(name, rows) for name, rows in fold(self.rows, _name, _alike)]
        names = f"{self.names:,} name{'s' * (self.names != 1)}"
        if not self.equal:
            return "\n".join([*lines, f"DIFFERENT: {len(self.rows):,} of {names}{self.hint}"])
        how = "bit for bit" if self.values else "in name, shape and dtype; values not compared"
        return "\n".join([*lines, f"equal: {names}, {format_bytes(self.nbytes)}, {how}"])


def differences(
    left: Reader,
    right: Reader,
    *,
    only: Iterable[str] | None = None,
    values: bool = True,
) -> Differences:
    """Compare two checkpoints, or models read as such, one block of a tensor at a time.

    All names of a tied tensor count as that tensor: a name is not missing if the tensor is there
    under another of its names.

    Args:
        left: A.
        right: B.
        only: globs on names.
        values: whether to compare values too.

    Raises:
        CorruptCheckpointError: a value that is no tensor cannot be read.
        PatternError: a glob matches no name on either side.

    Example:
        >>> from lateinit._checkpoint.formats import open_checkpoint
        >>> from lateinit._report.differences import differences
        >>> for n, name in enumerate("ab"):
        ...     torch.save({"x": torch.tensor([1.0, 2.0 + n])}, tmp_path / name)
        >>> readers = [open_checkpoint(tmp_path / name) for name in "ab"]
        >>> print(differences(*readers).rows[0].values)
        1 of 2 elements differ, by 1 at most (relative 0.333); at (1,): 2.0, 3.0
    """
    a, b = _Side(left), _Side(right)
    # In the order of the model, if one side is a model, so that its batches are computed once.
    sides = (b, a) if isinstance(right, ComputedReader) else (a, b)
    chosen = list(dict.fromkeys(name for side in sides for name in side.stored))
    if only is not None:
        chosen = by_globs(chosen, only, lambda name: [name])
    # Two names of one tensor on both sides make one pair.
    pairs = {a.pair_with(b, name): name for name in reversed(chosen)}
    nbytes = sum(left.entries[ours].nbytes for ours, _ in pairs if ours)
    with Progress("compare", nbytes if values else None) as bar:
        compared = [
            _compared(a, b, name, values, bar)
            for name in chosen
            if pairs[a.pair_with(b, name)] == name
        ]
    return Differences(
        left=str(left),
        right=str(right),
        rows=tuple(row for row in compared if row.what),
        names=len(chosen),
        nbytes=nbytes,
        values=values,
        hint="" if a.stored.keys() & b.stored.keys() else _hint(a, b),
    )


class _Side:
    """The names of a checkpoint.

    Attributes:
        reader: the checkpoint.
        stored: every name, with the name of its tensor, which is empty for a value that is none.
        tied: the names of each tensor.
    """

    def __init__(self, reader: Reader) -> None:
        self.reader = reader
        self.stored = {name: name for name in reader.entries} | reader.aliases
        self.stored |= dict.fromkeys(reader.objects, "")
        self.tied: dict[str, list[str]] = {}
        for name, stored in self.stored.items():
            self.tied.setdefault(stored or name, []).append(name)

    def entry(self, name: str) -> StoredTensor | None:
        """The tensor of this name, if it is one."""
        return self.reader.entries.get(self.stored.get(name, ""))

    def pair_with(self, other: _Side, name: str) -> tuple[str, str]:
        """The tensors with this name on both sides; or the name, if not both are tensors."""
        ours, theirs = self.stored.get(name), other.stored.get(name)
        return (ours, theirs) if ours and theirs else ("", name)

    def lacks(self, name: str, other: _Side) -> bool:
        """Whether this side has neither a name of the other side nor one tied to it there."""
        return not any(tied in self.stored for tied in other.tied[other.stored[name] or name])


def _compared(a: _Side, b: _Side, name: str, values: bool, bar: Progress) -> NameDifference:
    left, right = a.entry(name), b.entry(name)
    what: tuple[str, ...] = ()
    if name not in b.stored:
        what = (ONLY_A,) if b.lacks(name, a) else ()
    elif name not in a.stored:
        what = (ONLY_B,) if a.lacks(name, b) else ()
    elif left is not None and right is not None:
        return _compared_tensors(a.reader, b.reader, name, (left, right), values, bar)
    elif (left or right) is not None:
        what = ("kind",)
    elif values and not _same(a.reader.objects[name], b.reader.objects[name]):
        what = ("object",)
    return NameDifference(name, what, left, right)


def _compared_tensors(
    a: Reader,
    b: Reader,
    name: str,
    entries: tuple[StoredTensor, StoredTensor],
    values: bool,
    bar: Progress,
) -> NameDifference:
    left, right = entries
    what = ["shape"] * (left.shape != right.shape) + ["dtype"] * (left.dtype != right.dtype)
    found = ValueDifference()
    if values and left.shape == right.shape:
        if not comparable(left.dtype, right.dtype):
            raise CheckpointError(
                f"{name}: torch cannot compare {left.dtype} with {right.dtype}: leave it out by "
                "--only, or all values by --no-values"
            )
        for offsets, sizes in blocks(left.shape):
            block = a.read(left.name, offsets, sizes)
            found.add(block, b.read(right.name, offsets, sizes), offsets)
            bar.advance(block.nbytes)
    what += ["values"] * (found.different > 0)
    return NameDifference(name, tuple(what), left, right, found if found.different else None)


def _same(ours: Any, theirs: Any) -> bool:
    """Whether two values that are no plain tensors are equal: plain data, with tensors in it."""
    if type(ours) is not type(theirs):
        return False
    if isinstance(ours, dict):
        return ours.keys() == theirs.keys() and all(_same(v, theirs[k]) for k, v in ours.items())
    if isinstance(ours, (list, tuple)):
        return len(ours) == len(theirs) and all(map(_same, ours, theirs))
    if isinstance(ours, Tensor):
        return _saved(ours) == _saved(theirs)
    return bool(ours == theirs) or (ours != ours and theirs != theirs)  # noqa: PLR0124 - a NaN


def _saved(tensor: Tensor) -> bytes:
    """The bytes of ``torch.save`` for a tensor of any layout, in memory of its own."""
    file = io.BytesIO()
    torch.save(tensor.detach().clone(), file)
    return file.getvalue()


def _hint(a: _Side, b: _Side) -> str:
    """The next step, if the two have no name in common."""
    for one, other, first in ((a, b, ""), (b, a, "exchange A and B and ")):
        with contextlib.suppress(MismatchError):
            part = selected(str(one.reader), one.stored.keys(), other.reader, AS_FOUND)
            if part is not None and part.under:
                there = f"they have one name after another if {part.under!r} is left out"
                return f". No name is in both; {there}: {first}give it as --key and --prefix"
    return ". No name is in both"


def _described(entry: StoredTensor | None) -> dict[str, Any] | None:
    if entry is None:
        return None
    return {"shape": list(entry.shape), "dtype": _dtype(entry)}


def _dtype(entry: StoredTensor) -> str:
    return str(entry.dtype).removeprefix("torch.")


def _name(row: NameDifference) -> str:
    return row.name


def _alike(row: NameDifference) -> tuple[Any, ...]:
    """The key that rows on one printed line have in common."""
    return (row.what, *((e.shape, e.dtype) if e else None for e in (row.left, row.right)))


def _line(name: str, rows: list[NameDifference]) -> str:
    times = f"  x{len(rows)}" if len(rows) > 1 else ""
    return f"  {printable(name)}{times}: {'; '.join(_told(rows))}"


def _told(rows: list[NameDifference]) -> Iterator[str]:
    """The differences of rows that print on one line, in words."""
    left, right, what = rows[0].left, rows[0].right, rows[0].what
    one = left or right
    if what[0] in {ONLY_A, ONLY_B}:
        yield f"{what[0]}, {f'{show(one.shape)} {_dtype(one)}' if one else 'no tensor'}"
    elif what == ("kind",):
        yield f"a tensor in {'A' if left else 'B'}, and none in the other"
    elif what == ("object",):
        yield "no tensor, and not the same"
    if left is None or right is None:
        return
    if "shape" in what:
        yield f"shapes {show(left.shape)}, {show(right.shape)}"
    if "dtype" in what:
        yield f"dtypes {_dtype(left)}, {_dtype(right)}"
    found = [row.values for row in rows if row.values is not None]
    if found:
        yield str(found[0] if len(found) == 1 else reduce(add, found))
