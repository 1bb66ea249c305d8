"""The names that ``transformers`` gives to the tensors of a checkpoint.

Its models rename, split and join tensors when they load a checkpoint, and do the reverse when they
save one. The tables for this (transformers/conversion_mapping.py) and the code that applies them
(core_model_loading.py) are not documented. Any other form of them raises ``UnknownTablesError``.
"""

from __future__ import annotations

import copy
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn


class UnknownTablesError(Exception):
    """This version of ``transformers`` translates names in a way that is not known here."""


@dataclass(slots=True)
class Conversion:
    """Tensors of a checkpoint that are joined, split or rearranged together.

    Attributes:
        first: the name of one of the results, by which ``transformers`` calls the conversion.
        converter: the ``WeightConverter`` of ``transformers``.
        module: the model.
        sources: the names in the checkpoint, each with the pattern that it matched.
    """

    first: str
    converter: Any
    module: nn.Module
    sources: list[tuple[str, str]] = field(default_factory=list)

    def run(self, read: Callable[[str], Tensor]) -> dict[str, Tensor]:
        """Compute the results, by name.

        Args:
            read: returns the tensor of a source.
        """
        # A converter keeps the tensors that it is given, and one pattern serves several layers.
        converter = copy.deepcopy(self.converter)
        for name, pattern in self.sources:
            converter.add_tensor(self.first, name, pattern, read(name))
        found = converter.convert(self.first, model=self.module, config=self.module.config)
        return {name: t[0] if isinstance(t, list) else t for name, t in found.items()}


@dataclass(slots=True)
class Translation:
    """How the names of a checkpoint map to the names of a model.

    Attributes:
        renamed: for each name in the model, its names in the checkpoint, of which there should be
            one.
        conversions: tensors that need more than another name.
        strangers: names in the checkpoint that have no place in the model.
    """

    renamed: dict[str, list[str]] = field(default_factory=dict)
    conversions: list[Conversion] = field(default_factory=list)
    strangers: list[str] = field(default_factory=list)


def is_theirs(module: nn.Module) -> bool:
    """Whether a module is a model of ``transformers``."""
    library = sys.modules.get("transformers.modeling_utils")  # imported if there is such a model
    base = getattr(library, "PreTrainedModel", None)
    return isinstance(base, type) and isinstance(module, base)


def version() -> str:
    """``transformers`` and its version, for messages."""
    return f"transformers {getattr(sys.modules.get('transformers'), '__version__', '')}".strip()


def left_out(
    module: nn.Module, missing: Iterable[str], unexpected: Iterable[str]
) -> tuple[set[str], set[str]]:
    """The missing and the unexpected names that the model's class declares irrelevant.

    ``PreTrainedModel._adjust_missing_and_unexpected_keys`` decides: it removes such names from a
    loading report.
    """
    info = SimpleNamespace(missing_keys=set(missing), unexpected_keys=set(unexpected))
    before = set(info.missing_keys), set(info.unexpected_keys)
    adjust = getattr(module, "_adjust_missing_and_unexpected_keys", None)
    if adjust is None or not is_theirs(module):
        return set(), set()
    try:
        adjust(info)
    except Exception:  # noqa: BLE001 - another version: then every name counts
        return set(), set()
    return before[0] - set(info.missing_keys), before[1] - set(info.unexpected_keys)


def translate(module: nn.Module, state: Mapping[str, Any], names: Iterable[str]) -> Translation:
    """Map the names of a checkpoint to those of a model, as ``from_pretrained`` does.

    Args:
        module: a model of ``transformers``.
        state: its state dict; only the names and shapes are read.
        names: the names in the checkpoint.

    Raises:
        UnknownTablesError: this version has other tables, or applies them in another way.
    """
    try:
        return _translate(module, state, names)
    except Exception as error:
        raise UnknownTablesError(f"{type(error).__name__}: {error}") from error


def _translate(module: nn.Module, state: Mapping[str, Any], names: Iterable[str]) -> Translation:
    tables, core = _tables()
    mapping = tables.get_model_conversion_mapping(module)
    converters = [entry for entry in mapping if isinstance(entry, core.WeightConverter)]
    renamings = [entry for entry in mapping if isinstance(entry, core.WeightRenaming)]
    by_pattern = {pattern: c for c in converters for pattern in c.source_patterns}
    found = Translation()
    conversions: dict[str, Conversion] = {}
    prefix = module.base_model_prefix
    # As in `core_model_loading`: tensors are stacked in this order, and some renamings depend on it
    # (the first match of a group of renamings enables the group).
    for name in sorted(names, key=_natural):
        new, pattern = core.rename_source_key(name, renamings, converters, prefix, state)
        if new not in state and name in state:
            # The name is right already; only the model's prefix may be missing.
            new, pattern = core.rename_source_key(name, [], [], prefix, state)
        if new not in state:
            found.strangers.append(name)
        elif pattern is None:
            found.renamed.setdefault(new, []).append(name)
        else:
            if new not in conversions:
                conversions[new] = Conversion(new, by_pattern[pattern], module)
            conversions[new].sources.append((name, pattern))
    found.conversions = list(conversions.values())
    return found


def _tables() -> tuple[Any, Any]:
    """The two modules of ``transformers`` that hold and apply the tables."""
    tables = sys.modules.get("transformers.conversion_mapping")
    core = sys.modules.get("transformers.core_model_loading")
    if tables is None or core is None:
        raise UnknownTablesError("it has no conversion_mapping")
    return tables, core


def _natural(name: str) -> list[tuple[int, int | str, int]]:
    """The sort key of ``core_model_loading.dot_natural_key``, in a form that mypy accepts.

    Numbers come first and in numerical order; a number at the end of a word counts as a number.
    """
    found: list[tuple[int, int | str, int]] = []
    for part in name.split("."):
        word, digits = re.fullmatch(r"(.*?)(\d*)", part, re.DOTALL).groups()  # type: ignore[union-attr]
        if part.isdigit():
            found.append((0, int(part), 0))
        else:
            found.append((1, word, int(digits) if digits else -1))
    return found


def tied_targets(module: Any) -> Iterable[str]:
    """Patterns of the names that a ``transformers`` model leaves out of a checkpoint, as tied."""
    # Version 5 has names in full here; version 4 has patterns in `_tied_weights_keys`.
    tied = getattr(module, "all_tied_weights_keys", None)
    if tied is not None:
        return [re.escape(name) for name in tied]
    return getattr(module, "_tied_weights_keys", None) or ()


def preferred_name(names: list[str], targets: Iterable[str]) -> str:
    """The name, among the names of a tied tensor, under which it is written."""
    for name in names:
        if not any(re.fullmatch(pattern, name) for pattern in targets):
            return name
    return names[0]


def saved_config(config: Any, module: nn.Module, dtype: torch.dtype | None) -> str:
    """The JSON text of a configuration that names the saved class and dtype."""
    config = copy.deepcopy(config)
    config.architectures = [type(module).__name__]
    if dtype is not None:
        config.dtype = str(dtype).removeprefix("torch.")
    text: str = config.to_json_string()
    return text
