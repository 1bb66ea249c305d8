"""A reader for a part of a checkpoint under other names."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

from torch import Tensor

from lateinit._checkpoint.formats.base import Objects, Reader, StoredTensor


class Renamed(Reader):
    """A reader whose tensors and objects have other names than in the files.

    Args:
        reader: the checkpoint.
        names: the name of each tensor, alias and object in ``reader``, by its new name. All others
            are left out.
    """

    def __init__(self, reader: Reader, names: Mapping[str, str]) -> None:
        super().__init__(reader.path)
        self._reader = reader
        self._old = {new: old for new, old in names.items() if old in reader.entries}
        self.under, self.hint, self.headers = reader.under, reader.hint, reader.headers
        self.versions = _versions(reader.versions, names.items())
        self.entries = {
            new: StoredTensor(new, reader.entries[old].dtype, reader.entries[old].shape)
            for new, old in self._old.items()
        }
        self.objects = Objects(
            {
                new: partial(reader.objects.__getitem__, old)
                for new, old in names.items()
                if old in reader.objects
            }
        )
        self.origins = {new: reader.origins.get(old, [old]) for new, old in names.items()}
        forward = {old: new for new, old in self._old.items()}
        self.shared = {
            new: [forward[other] for other in reader.shared[old] if other in forward]
            for old, new in forward.items()
            if old in reader.shared
        }
        self.aliases = {
            new: forward[kept]
            for new, old in names.items()
            if (kept := reader.aliases.get(old)) in forward and new not in self.entries
        }

    def _read(
        self, name: str, offsets: tuple[int, ...], sizes: tuple[int, ...], alone: bool
    ) -> Tensor:
        return self._reader.read(self._old[name], offsets, sizes, alone=alone)


def _versions(
    versions: Mapping[str, Any] | None, names: Iterable[tuple[str, str]]
) -> Mapping[str, Any] | None:
    """The ``_metadata`` of a state dict, by the new paths of its modules.

    A tensor is equally deep below its module under its new name as under its old one.
    """
    if versions is None:
        return None
    found: dict[str, Any] = {}
    for name, stored in names:
        new, old = name, stored
        while new:
            new, old = new.rpartition(".")[0], old.rpartition(".")[0]
            if old in versions:
                found.setdefault(new, versions[old])
    return found
