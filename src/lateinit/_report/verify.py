"""Check that a checkpoint holds the values of a seed, bit for bit, batch by batch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lateinit._checkpoint.formats import Reader, open_checkpoint
from lateinit._checkpoint.load import AS_FOUND, selected, translated
from lateinit._checkpoint.save import Item, TensorComputer, batches, collect
from lateinit._progress import Progress
from lateinit._report.comparison import Comparison
from lateinit._report.parity import values_differ
from lateinit._tensors import DTypes, Init, casting
from lateinit._torch import as_bytes
from lateinit._units import format_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Verification(Comparison):
    """The result of comparing a checkpoint with the values of a seed."""

    path: Path

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain data."""
        return Comparison.to_dict(self) | {"path": str(self.path)}

    def __str__(self) -> str:
        size = f"{self.path}: {self.tensors} tensors, {format_bytes(self.nbytes)}"
        equal = f"equal, bit for bit, to what seed {self.seed} gives"
        return "\n".join([size, *self.told(equal)])


def verify(
    module: nn.Module,
    path: Path,
    *,
    seed: int,
    dtype: DTypes | None = None,
    init: Init | None = None,
) -> Verification:
    """Compare a checkpoint with the values of a deferred module, which stays deferred.

    Only a few tensors at a time are in memory.

    Args:
        module: a module that was recorded from ``seed``.
        path: any checkpoint that ``load_checkpoint`` reads.
        seed: the seed, for the report.
        dtype: cast floating-point tensors first, as ``save_checkpoint(dtype=)`` does.
        init: initialisers by name, as ``save_checkpoint(init=)`` takes them.

    Raises:
        CorruptCheckpointError: this is no checkpoint, or an incomplete one.

    Example:
        >>> from lateinit._report.verify import verify
        >>> _ = torch.manual_seed(0)
        >>> layer = lateinit.deferred_init(torch.nn.Linear, 4, 2)
        >>> _ = lateinit.save_checkpoint(layer, tmp_path / "verified.safetensors")
        >>> verify(layer, tmp_path / "verified.safetensors", seed=0).equal
        True
    """
    items = collect(module, casting(None, dtype), init=init)
    known = {name for item in items for name in (item.entry.name, *item.aliases)}
    reader = open_checkpoint(path)
    if reader.homes:
        reader = selected(type(module).__name__, known, reader, AS_FOUND) or reader
    reader = translated(module, reader)
    differences = [(name, "not in the model") for name in reader.entries if name not in known]
    values = TensorComputer(None)
    nbytes = sum(item.entry.nbytes for item in items)
    with Progress("compare", nbytes) as bar:
        for batch in batches(items):
            for item, value in zip(batch, values.of(batch), strict=True):
                differences += _differences(reader, item, value)
                bar.advance(item.entry.nbytes)
    return Verification(
        path=path,
        differences=tuple(differences),
        tensors=len(items),
        nbytes=nbytes,
        seed=seed,
    )


def _differences(reader: Reader, item: Item, value: Tensor) -> Iterator[tuple[str, str]]:
    """The differences of a tensor, under each of its names in the checkpoint."""
    names = [name for name in (item.entry.name, *item.aliases) if name in reader.entries]
    if not names:
        yield item.entry.name, "not in the checkpoint"
    for name in names:
        entry = reader.entries[name]
        if entry.shape != item.entry.shape:
            yield name, f"the checkpoint has the shape {entry.shape}, the model {item.entry.shape}"
        elif entry.dtype != item.entry.dtype:
            dtypes = f"the checkpoint has the dtype {entry.dtype}, the model {item.entry.dtype}"
            yield name, f"{dtypes}: give the --dtype that it was written with"
        else:
            expected, found = value.to("cpu", item.entry.dtype), reader.read(name, alone=True)
            if not torch.equal(as_bytes(expected), as_bytes(found)):
                told = values_differ(expected, found, ("seed", "checkpoint"))
                yield name, f"values differ: {told}"
