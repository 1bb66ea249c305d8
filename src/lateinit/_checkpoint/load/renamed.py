"""A checkpoint under the names of a ``transformers`` model.

``from_pretrained`` renames, joins and splits the tensors of a checkpoint. ``translated`` wraps a
reader in another reader that does the same, with the tables of
``_integrations.transformers_names``.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import Tensor, nn

from lateinit._checkpoint.formats import Reader, Renamed, StoredTensor, block_of
from lateinit._checkpoint.load.compatibility import same_bits
from lateinit._integrations import Conversion, transformers_names
from lateinit._tensors import is_placeholder
from lateinit.errors import MismatchError, listing

# The most source names that a message shows.
_SHOWN = 3


def translated(module: nn.Module, reader: Reader, state: Mapping[str, Any] | None = None) -> Reader:
    """A checkpoint under the names of a module, if its library renames checkpoints on loading.

    Only headers are read: the shapes and dtypes of joined and split tensors are found on ``meta``.

    Args:
        module: the module.
        reader: the checkpoint.
        state: the module's state dict, if the caller has it.

    Raises:
        MismatchError: a tensor of the checkpoint cannot be brought into the form of the model.
    """
    if not transformers_names.is_theirs(module):
        return reader
    if state is None:
        state = module.state_dict(keep_vars=True)
    if all(name in state and _fits(state[name], entry) for name, entry in reader.entries.items()):
        return reader  # it already has the names and shapes of the state dict
    try:
        names = transformers_names.translate(module, state, reader.entries)
    except transformers_names.UnknownTablesError as error:
        reader.hint = (
            f"(if it was written by save_pretrained: {transformers_names.version()} renames "
            f"weights in a way that lateinit cannot follow, {error}; "
            f"{type(module).__name__}.from_pretrained can)"
        )
        return reader
    if not names.conversions and all([k] == v for k, v in names.renamed.items()):
        return reader
    return Translated(module, reader, names)


def _fits(tensor: Any, entry: StoredTensor) -> bool:
    return is_placeholder(tensor) or tuple(getattr(tensor, "shape", ())) == entry.shape


class Translated(Renamed):
    """A reader whose tensors have other names, or are made from several stored ones.

    A conversion runs when one of its results is read. Its other results are kept until another
    conversion runs.
    """

    def __init__(
        self, module: nn.Module, reader: Reader, names: transformers_names.Translation
    ) -> None:
        plain = {new: old[0] for new, old in names.renamed.items()}
        plain |= {name: name for name in names.strangers}
        others = {name: name for name in (*reader.objects, *reader.aliases)}
        super().__init__(reader, others | plain)
        self.versions = reader.versions
        self._computed: dict[str, Conversion] = {}
        self._kept: dict[str, Tensor] = {}
        problems = [*self._doubled(names), *self._add(names.conversions)]
        if problems:
            raise MismatchError(
                f"{self.path} cannot be loaded into {type(module).__name__}, which is left as it "
                "was:\n  " + "\n  ".join(problems)
            )
        self.origins |= {
            new: [name for name, _ in conversion.sources]
            for new, conversion in self._computed.items()
        }

    def _doubled(self, names: transformers_names.Translation) -> list[str]:
        """Problems with two names that become one; no problem if both have the same bits."""
        wrong = []
        for new, (first, *others) in names.renamed.items():
            wrong += [
                f"{new}: the checkpoint has two tensors for it, {first} and {other}"
                for other in others
                if not same_bits(self._reader, first, other)
            ]
        return wrong

    def _add(self, conversions: list[Conversion]) -> list[str]:
        """Find the results of each conversion on ``meta``."""
        wrong = []
        for conversion in conversions:
            try:
                found = conversion.run(self._stand)
            except Exception as error:  # noqa: BLE001 - their code, on what any checkpoint holds
                wrong.append(_failed(conversion, self._reader, error))
                continue
            for name, tensor in found.items():
                if name in self.entries:
                    others = listing((n for n, _ in conversion.sources), _SHOWN)
                    wrong.append(f"{name}: the checkpoint has several tensors for it, {others}")
                self.entries[name] = StoredTensor(name, tensor.dtype, tuple(tensor.shape))
                self._computed[name] = conversion
        return wrong

    def _stand(self, name: str) -> Tensor:
        return self._reader.entries[name].layout()

    def _read(
        self, name: str, offsets: tuple[int, ...], sizes: tuple[int, ...], alone: bool
    ) -> Tensor:
        if name not in self._computed:
            return super()._read(name, offsets, sizes, alone)
        found = self._kept.pop(name, None)  # not kept: it may become a parameter's memory
        if found is None:
            self._kept.clear()
            self._kept = self._computed[name].run(partial(self._reader.read, alone=alone))
            found = self._kept.pop(name)
        return block_of(found, offsets, sizes)


def _failed(conversion: Conversion, reader: Reader, error: Exception) -> str:
    sources = listing(
        (f"{name} {tuple(reader.entries[name].shape)}" for name, _ in conversion.sources), _SHOWN
    )
    return (
        f"{conversion.first}: {transformers_names.version()} cannot make it of {sources}: "
        f"{type(error).__name__}: {error}"
    )
