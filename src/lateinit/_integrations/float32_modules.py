"""The tensors that ``transformers`` and ``diffusers`` keep in float32 in a half-precision model."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial

import torch
from torch import nn

_HALF = (torch.float16, torch.bfloat16)


def in_float32(
    modules: Callable[[], Mapping[str, nn.Module]],
) -> Callable[[str, torch.dtype], bool]:
    """The test whether ``from_pretrained(dtype=...)`` keeps the tensor with a name in float32.

    Args:
        modules: returns the modules of a model by name.
    """
    kept = [
        (f"{path}." if path else "", dtypes, matches)
        for path, module in modules().items()
        for dtypes, matches in _kept_by(module)
    ]

    def keeps(name: str, dtype: torch.dtype) -> bool:
        return any(
            dtype in dtypes and name.startswith(path) and matches(name[len(path) :])
            for path, dtypes, matches in kept
        )

    return keeps


def _kept_by(
    module: nn.Module,
) -> Iterator[tuple[tuple[torch.dtype, ...], Callable[[str], bool]]]:
    """The dtypes under which a module keeps tensors in float32, each with a test of their names."""
    lists = {key: _names(getattr(module, key, None)) for key in _DTYPES}
    if not any(lists.values()):
        return
    packages = {base.__module__.partition(".")[0] for base in type(module).__mro__}
    for key, names in lists.items():
        if names and "transformers" in packages:
            # transformers/core_model_loading.py: build_glob_alternation; re.search applies it.
            pattern = re.compile("|".join(name.replace("*", ".*") for name in names))
            yield _DTYPES[key], partial(_is_found, pattern)
        elif names and "diffusers" in packages:
            # diffusers/models/model_loading_utils.py: load_model_dict_into_meta
            yield _DTYPES[key], partial(_has_part, frozenset(names))


def _is_found(pattern: re.Pattern[str], name: str) -> bool:
    return pattern.search(name) is not None


def _has_part(parts: frozenset[str], name: str) -> bool:
    return not parts.isdisjoint(name.split("."))


# transformers/modeling_utils.py: _get_dtype_plan. diffusers has the first list only.
_DTYPES = {
    "_keep_in_fp32_modules": (torch.float16,),
    "_keep_in_fp32_modules_strict": _HALF,
}


def _names(given: str | Iterable[str] | None) -> list[str]:
    return [given] if isinstance(given, str) else sorted(given or ())
