"""Which architectures there are: every model type that `transformers` can name, and its classes."""

from __future__ import annotations

import importlib
import inspect
from functools import cache
from pathlib import Path
from typing import Any

from torch import nn

HEADS = (
    "CAUSAL_LM",
    "MASKED_LM",
    "IMAGE_CLASSIFICATION",
    "SEQ_TO_SEQ_CAUSAL_LM",
    "IMAGE_TEXT_TO_TEXT",
    "CTC",
    "SPEECH_SEQ_2_SEQ",
    "AUDIO_CLASSIFICATION",
    "OBJECT_DETECTION",
    "SEMANTIC_SEGMENTATION",
    "UNIVERSAL_SEGMENTATION",
    "DEPTH_ESTIMATION",
    "VIDEO_CLASSIFICATION",
    "PRETRAINING",
)


def model_types() -> list[str]:
    """Every model type, in alphabetical order."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    return sorted(CONFIG_MAPPING_NAMES)


def config_class(model_type: str) -> Any:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    return CONFIG_MAPPING[model_type]


def classes(model_type: str) -> tuple[list[str], list[str]]:
    """The names of a type's classes, the likeliest first: of the bare model, and with a head."""
    bare = _named("MODEL", model_type)
    heads = [name for head in HEADS for name in _named(f"MODEL_FOR_{head}", model_type)]
    own = _own(model_type)
    bare = [*bare, *(name for name in own if "For" not in name)] or own
    heads = [name for name in (*heads, *own) if name not in bare[:1]]
    return list(dict.fromkeys(bare)), list(dict.fromkeys(heads))


def model_class(model_type: str, name: str) -> Any:
    for module in _modeling(model_type):
        if hasattr(module, name):
            return getattr(module, name)
    return getattr(importlib.import_module("transformers"), name)


def _named(mapping: str, model_type: str) -> list[str]:
    from transformers.models.auto import modeling_auto

    names = getattr(modeling_auto, f"{mapping}_MAPPING_NAMES").get(model_type, ())
    return [names] if isinstance(names, str) else list(names)


def _own(model_type: str) -> list[str]:
    """Classes that say that they are built from this type's configuration, the basic ones first.

    Where there is none, the module that is named as the configuration is.
    """
    config = config_class(model_type)
    bare_name = config.__name__.removesuffix("Config")
    found, named = [], []
    for module in _modeling(model_type):
        for name, value in vars(module).items():
            if not inspect.isclass(value) or value.__module__ != module.__name__:
                continue
            if name == bare_name and issubclass(value, nn.Module):
                named.append(name)
            own = getattr(value, "config_class", None) is config
            if own and not name.endswith("PreTrainedModel"):
                found.append(name)
    return sorted(found, key=lambda name: ("For" in name, len(name))) or named


@cache
def _modeling(model_type: str) -> tuple[Any, ...]:
    """The modules in which a type's models are written."""
    package = importlib.import_module(config_class(model_type).__module__.rpartition(".")[0])
    names = sorted(path.stem for path in Path(package.__path__[0]).glob("modeling_*.py"))
    return tuple(importlib.import_module(f"{package.__name__}.{name}") for name in names)
