"""The names that ``transformers`` gives to the tensors of a checkpoint: which become which.

Its models rename, split and join what a checkpoint holds while it is loaded, and undo it when they
are saved. Its own tables say how; they are not documented, so what is used of them is looked for,
and whatever is not as it was known is an ``UnknownTablesError``.
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
        first: the name that ``transformers`` knows it by, of one of the results.
        sources: the names in the checkpoint, each with the pattern that it matched.
    """

    first: str
    converter: Any
    module: nn.Module
    sources: list[tuple[str, str]] = field(default_factory=list)

    def run(self, read: Callable[[str], Tensor]) -> dict[str, Tensor]:
        """The results by name, computed from what ``read`` gives for each source."""
        converter = copy.deepcopy(self.converter)
        for name, pattern in self.sources:
            converter.add_tensor(self.first, name, pattern, read(name))
        found = converter.convert(self.first, model=self.module, config=self.module.config)
        return {name: t[0] if isinstance(t, list) else t for name, t in found.items()}


@dataclass(slots=True)
class Translation:
    """What becomes of the names of a checkpoint.

    Attributes:
        renamed: names in the checkpoint by name in the model; more than one cannot be.
        conversions: what takes more than another name.
        strangers: names in the checkpoint that lead nowhere.
    """

    renamed: dict[str, list[str]] = field(default_factory=dict)
    conversions: list[Conversion] = field(default_factory=list)
    strangers: list[str] = field(default_factory=list)


def is_theirs(module: nn.Module) -> bool:
    """Whether a module is a model of ``transformers``."""
    library = sys.modules.get("transformers.modeling_utils")  # imported by whoever made one
    base = getattr(library, "PreTrainedModel", None)
    return isinstance(base, type) and isinstance(module, base)


def version() -> str:
    """The version of ``transformers``, for messages."""
    return f"transformers {getattr(sys.modules.get('transformers'), '__version__', '')}".strip()


def left_out(
    module: nn.Module, missing: Iterable[str], unexpected: Iterable[str]
) -> tuple[set[str], set[str]]:
    """The names that a model's class says may be missing, or may be there too."""
    info = SimpleNamespace(missing_keys=set(missing), unexpected_keys=set(unexpected))
    before = set(info.missing_keys), set(info.unexpected_keys)
    adjust = getattr(module, "_adjust_missing_and_unexpected_keys", None)
    if adjust is None or not is_theirs(module):
        return set(), set()
    try:
        adjust(info)
    except Exception:  # noqa: BLE001 - another version's: then every name counts
        return set(), set()
    return before[0] - set(info.missing_keys), before[1] - set(info.unexpected_keys)


def translate(module: nn.Module, state: Mapping[str, Any], names: Iterable[str]) -> Translation:
    """What ``from_pretrained`` of a model makes of the names of a checkpoint.

    Args:
        module: a model of ``transformers``.
        state: its state dict, of which the names count.
        names: the names in the checkpoint.

    Raises:
        UnknownTablesError: this version keeps its tables in another way.
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
    # The order in which tensors are stacked, and in which some renamings look at them.
    for name in sorted(names, key=_natural):
        new, pattern = core.rename_source_key(name, renamings, converters, prefix, state)
        if new not in state and name in state:
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
    """The two modules of ``transformers`` that are made use of, if they are what is known."""
    tables = sys.modules.get("transformers.conversion_mapping")
    core = sys.modules.get("transformers.core_model_loading")
    if tables is None or core is None:
        raise UnknownTablesError("it has no conversion_mapping")
    return tables, core


def _natural(name: str) -> list[tuple[int, int | str, int]]:
    """Numbers in the order of their values, before words; numbers that end a word likewise."""
    found: list[tuple[int, int | str, int]] = []
    for part in name.split("."):
        word, digits = re.fullmatch(r"(.*?)(\d*)", part, re.DOTALL).groups()  # type: ignore[union-attr]
        if part.isdigit():
            found.append((0, int(part), 0))
        else:
            found.append((1, word, int(digits) if digits else -1))
    return found


def tied_targets(module: nn.Module) -> Iterable[str]:
    """The names that a ``transformers`` model expects not to find in a checkpoint, as patterns."""
    tied = getattr(module, "all_tied_weights_keys", None)
    if tied is not None:
        return [re.escape(name) for name in tied]
    return getattr(module, "_tied_weights_keys", None) or ()


def preferred_name(names: list[str], targets: Iterable[str]) -> str:
    """The name that tied tensors are written under."""
    for name in names:
        if not any(re.fullmatch(pattern, name) for pattern in targets):
            return name
    return names[0]


def saved_config(config: Any, module: nn.Module, dtype: torch.dtype | None) -> str:
    """A configuration that names the class and the dtype that were saved."""
    config = copy.deepcopy(config)
    config.architectures = [type(module).__name__]
    if dtype is not None:
        config.dtype = str(dtype).removeprefix("torch.")
    text: str = config.to_json_string()
    return text
