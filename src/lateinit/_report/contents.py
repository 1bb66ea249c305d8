"""The contents of a checkpoint, without a model: names, shapes, dtypes, sizes, files, metadata."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lateinit._checkpoint.formats import Reader, StoredFile, open_checkpoint
from lateinit._lazy import show
from lateinit._report.name_folding import fold
from lateinit._report.tables import in_columns, printable
from lateinit._tensors import by_globs
from lateinit._terminal import Console, ConsoleOptions, RenderResult, Text
from lateinit._units import format_bytes
from lateinit.errors import listing


@dataclass(frozen=True, slots=True)
class StoredRow:
    """One tensor of a checkpoint.

    Attributes:
        name: its name.
        aliases: its further names, under which it was not written.
        shares: the name of an earlier tensor in the same memory.
        shape: its shape.
        dtype: its dtype, without ``torch.``.
        nbytes: its bytes.
        files: the files that hold it, relative to the checkpoint's folder.
    """

    name: str
    aliases: tuple[str, ...]
    shares: str | None
    shape: tuple[int, ...]
    dtype: str
    nbytes: int
    files: tuple[str, ...]

    @property
    def notes(self) -> str:
        """Its ties and aliases, in words."""
        ties = [f"= {listing(self.aliases, 3)}"] if self.aliases else []
        return ", ".join([*ties, *([f"shares memory with {self.shares}"] if self.shares else [])])


@dataclass(frozen=True, slots=True)
class Totals:
    """Sums over the tensors; bytes count shared memory once."""

    tensors: int
    elements: int
    bytes: int
    bytes_by_dtype: dict[str, int]


@dataclass(frozen=True)
class Contents:
    """The contents of a checkpoint. Print it, or use ``to_dict()``.

    Attributes:
        path: the checkpoint.
        format: the name of its format.
        rows: one for each tensor, in the order of the files.
        objects: the names of values that are no plain tensors.
        files: the files, relative to the checkpoint's folder.
        totals: the sums.
    """

    path: Path
    format: str
    rows: tuple[StoredRow, ...]
    objects: tuple[str, ...]
    files: Mapping[str, StoredFile]
    totals: Totals

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain data, with one entry for each tensor, nothing folded."""
        return {
            "path": str(self.path),
            "format": self.format,
            "tensors": [asdict(row) for row in self.rows],
            "objects": list(self.objects),
            "files": [{"name": name, **asdict(file)} for name, file in self.files.items()],
            "totals": asdict(self.totals),
        }

    def __str__(self) -> str:
        folded = fold(self.rows, lambda row: row.name, _alike)
        heads = ["name", "shape", "dtype", "bytes", "file"]
        lines = [_cells(name, rows) for name, rows in folded]
        if len({row.files for row in self.rows}) < 2:
            heads, lines = heads[:-1], [line[:-1] for line in lines]
        return "\n".join([*in_columns(heads, lines), *self._footer()])

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield Text(str(self))

    def _footer(self) -> Iterable[str]:
        t = self.totals
        dtypes = ", ".join(f"{k} {format_bytes(v)}" for k, v in t.bytes_by_dtype.items())
        tensors = f"{t.tensors:,} tensor{'s' * (t.tensors != 1)}"
        nbytes = f"{format_bytes(t.bytes)} ({dtypes or 'nothing'})"
        yield f"{t.elements:,} elements in {tensors}, {nbytes}"
        if self.objects:
            yield f"no tensors, {len(self.objects):,}: {listing(map(printable, self.objects))}"
        on_disk = format_bytes(sum(file.nbytes for file in self.files.values()))
        files = f"{len(self.files):,} file{'s' * (len(self.files) != 1)}"
        yield f"{self.format}, {files}, {on_disk}: {listing(self.files)}"
        told: dict[str, list[str]] = {}
        for name, file in self.files.items():
            words = listing(
                f"{_short(key)}={_short(value)}" for key, value in file.metadata.items()
            )
            told.setdefault(words, []).append(name)
        for words, names in told.items():
            if words:
                yield f"metadata of {listing(names, 2)}: {words}"


def contents(path: Path, *, only: Iterable[str] | None = None) -> Contents:
    """The contents of a checkpoint, without reading its data.

    Files that ``torch.save`` wrote before torch 1.6, which cannot be mapped, are read whole.

    Args:
        path: any checkpoint that ``load_checkpoint`` reads.
        only: globs on the names of tensors.

    Raises:
        CorruptCheckpointError: this is no checkpoint, or an incomplete one.
        PatternError: a glob matches no name.

    Example:
        >>> from lateinit._report.contents import contents
        >>> _ = lateinit.save_checkpoint(torch.nn.Linear(4, 2), tmp_path / "one.safetensors")
        >>> contents(tmp_path / "one.safetensors").totals.elements
        10
    """
    return contents_of(open_checkpoint(path), path, only=only)


def contents_of(reader: Reader, path: Path, *, only: Iterable[str] | None = None) -> Contents:
    """The contents of an open checkpoint; see ``contents``."""
    folder = path if path.is_dir() else path.parent
    kept: dict[str, list[str]] = {}
    for alias, name in reader.aliases.items():
        kept.setdefault(name, []).append(alias)
    rows = [_row(reader, name, kept.get(name, []), folder) for name in reader.entries]
    if only is not None:
        rows = by_globs(rows, only, lambda row: (row.name, *row.aliases))
    return Contents(
        path=path,
        format=reader.format,
        rows=tuple(rows),
        objects=tuple(reader.objects),
        files={str(file.relative_to(folder)): about for file, about in reader.files.items()},
        totals=_totals(rows, reader),
    )


def _row(reader: Reader, name: str, aliases: list[str], folder: Path) -> StoredRow:
    entry = reader.entries[name]
    first = reader.shared.get(name, [name])[0]
    return StoredRow(
        name=name,
        aliases=tuple(aliases),
        shares=first if first != name else None,
        shape=entry.shape,
        dtype=str(entry.dtype).removeprefix("torch."),
        nbytes=entry.nbytes,
        files=tuple(str(file.relative_to(folder)) for file in reader.files_of(name)),
    )


def memory_of(rows: Iterable[StoredRow], reader: Reader) -> list[int]:
    """The bytes of each row, without the bytes that it shares with an earlier row."""
    # Tensors that share a storage count at most the bytes of that storage, as in `summary`.
    left = {reader.shared[name][0]: nbytes for name, nbytes in reader.memory.items()}
    found = []
    for row in rows:
        first = row.shares or row.name
        found.append(min(row.nbytes, left.get(first, row.nbytes)))
        if first in left:
            left[first] -= found[-1]
    return found


def _totals(rows: list[StoredRow], reader: Reader) -> Totals:
    by_dtype: Counter[str] = Counter()
    for row, nbytes in zip(rows, memory_of(rows, reader), strict=True):
        by_dtype[row.dtype] += nbytes
    return Totals(
        tensors=len(rows),
        elements=sum(math.prod(row.shape) for row in rows),
        bytes=by_dtype.total(),
        bytes_by_dtype=dict(by_dtype.most_common()),
    )


def _alike(row: StoredRow) -> tuple[Any, ...]:
    """The key that rows on one printed line have in common; a tied tensor has its own line."""
    return (row.name if row.notes else "", row.shape, row.dtype)


def _cells(name: str, rows: list[StoredRow]) -> tuple[str, ...]:
    first = rows[0]
    times = f"  x{len(rows)}" if len(rows) > 1 else ""
    notes = f"  ({first.notes})" if first.notes else ""
    files = sorted({file for row in rows for file in row.files})
    return (
        f"{name}{times}{notes}",
        show(first.shape),
        first.dtype,
        format_bytes(sum(row.nbytes for row in rows)),
        files[0] if len(files) == 1 else f"{len(files)} files",
    )


def _short(value: Any) -> str:
    """A value of the metadata, which may be a long text."""
    text = printable(str(value))
    return text if len(text) <= 60 else f"{text[:57]}..."
