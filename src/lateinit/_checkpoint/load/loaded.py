"""The result of ``load_checkpoint``: the source of the values of each tensor."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from lateinit._checkpoint.formats import Reader, StoredTensor
from lateinit._checkpoint.load.compatibility import Fit, TensorNames
from lateinit._lazy import known_shape
from lateinit._tensors import Found
from lateinit._units import format_bytes


@dataclass(frozen=True, slots=True)
class Loaded:
    """The result of ``load_checkpoint``: tensors by name, with dtype, shape and bytes.

    Attributes:
        path: the checkpoint.
        loaded: the names with values from the checkpoint, tied names included.
        initialised: the names that the checkpoint lacks. A deferred tensor was initialised by its
            recorded construction; a real tensor was left as it was.
        computed: deferred tensors that no checkpoint holds, such as non-persistent buffers.
        unexpected: the tensors of the checkpoint that the model lacks.
        nbytes: the bytes that were loaded, tied tensors counted once.
        under: the beginning of the checkpoint's names that the module's names lack: the keys that
            lead to the state dict in the file, and a prefix.
    """

    path: Path
    loaded: tuple[StoredTensor, ...]
    initialised: tuple[StoredTensor, ...]
    computed: tuple[StoredTensor, ...]
    unexpected: tuple[StoredTensor, ...]
    nbytes: int
    under: str = ""

    def __str__(self) -> str:
        under = f" (under {self.under!r})" if self.under else ""
        size = format_bytes(self.nbytes)
        lines = [f"{self.path}{under}: {len(self.loaded)} tensors loaded, {size}"]
        for what, entries in (
            ("initialised", self.initialised),
            ("computed", self.computed),
            ("unexpected", self.unexpected),
        ):
            if entries:
                size = format_bytes(sum(entry.nbytes for entry in entries))
                lines.append(f"  {what}: {len(entries)}, {size}")
                lines += [
                    f"    {entry.name} {entry.shape} {str(entry.dtype).removeprefix('torch.')}"
                    for entry in entries
                ]
        return "\n".join(lines)


def report(
    names: TensorNames, path: Path, reader: Reader, fitting: Fit, computed: list[Found]
) -> Loaded:
    loaded = _entries(names, fitting.loaded)
    distinct = {names.key(names.found[entry.name].tensor): entry.nbytes for entry in loaded}
    return Loaded(
        path=path,
        loaded=loaded,
        initialised=_entries(names, fitting.missing),
        computed=_entries(names, [found.name for found in computed]),
        unexpected=tuple(reader.entries[n] for n in fitting.unexpected if n in reader.entries),
        nbytes=sum(distinct.values()),
        under=reader.under,
    )


def computed_alone(names: TensorNames, fitting: Fit) -> list[Found]:
    """The deferred tensors that a checkpoint never holds, such as non-persistent buffers."""
    known = {*fitting.loaded, *fitting.missing}
    return [f for f in names.distinct if f.deferred and not known.intersection(f.names)]


def _entries(names: TensorNames, wanted: Iterable[str]) -> tuple[StoredTensor, ...]:
    return tuple(
        StoredTensor(name, tensor.dtype, tuple(size or 0 for size in known_shape(tensor) or ()))
        for name in wanted
        if name in names.found and (tensor := names.found[name].tensor) is not None
    )
