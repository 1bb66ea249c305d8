"""The two sides of a comparison: checkpoints, and deferred models read as checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from torch import Tensor, nn

from lateinit._checkpoint.formats import Reader, block_of, open_checkpoint
from lateinit._checkpoint.load import Choice, selected, translated
from lateinit._checkpoint.save import TensorComputer, batches, collect
from lateinit._integrations import model_specs
from lateinit._tensors import DTypes, casting


class ComputedReader(Reader):
    """A reader of a deferred model, which stays deferred.

    Args:
        module: the module.
        name: its name in messages.
        dtype: the dtypes to cast to, as for ``save_checkpoint(dtype=)``.
    """

    format = "model"

    def __init__(self, module: nn.Module, name: str, dtype: DTypes | None = None) -> None:
        super().__init__(Path(name))
        self.module = module
        items = collect(module, casting(None, dtype))
        self.entries = {item.entry.name: item.entry for item in items}
        self.aliases = {alias: item.entry.name for item in items for alias in item.aliases}
        self._batches = {item.entry.name: batch for batch in batches(items) for item in batch}
        self._computer = TensorComputer(None)
        self._kept: dict[str, Tensor] = {}

    def _read(
        self, name: str, offsets: tuple[int, ...], sizes: tuple[int, ...], alone: bool
    ) -> Tensor:
        if name not in self._kept:
            self._kept.clear()
            batch = self._batches[name]
            values = self._computer.of(batch)
            self._kept = {
                item.entry.name: value.to("cpu", item.entry.dtype)
                for item, value in zip(batch, values, strict=True)
            }
        block = block_of(self._kept[name], offsets, sizes)
        return block.clone() if alone else block


def opened(
    a: str, b: str, model: Callable[[str], ComputedReader], choice: Choice
) -> tuple[Reader, Reader]:
    """Two checkpoints or models, each under the names of the first.

    Args:
        a: a path, or the specification of a model.
        b: another path or specification.
        model: returns the reader of a model from its specification.
        choice: how the names of ``b`` map to those of ``a``.

    Raises:
        CorruptCheckpointError: a path is no checkpoint.
        MismatchError: ``choice`` does not fit.
        SpecError: an argument is neither a path nor a model.
    """
    left, right = (
        model(text) if (path := model_specs.path_named(text)) is None else open_checkpoint(path)
        for text in (a, b)
    )
    if choice:
        right = selected(str(left), [*left.entries, *left.aliases], right, choice) or right
    # A model of `transformers` renames the tensors of checkpoints when it loads them.
    if isinstance(left, ComputedReader):
        return left, translated(left.module, right)
    if isinstance(right, ComputedReader):
        return translated(right.module, left), right
    return left, right
