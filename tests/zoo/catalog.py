"""Which architectures there are: every model type that `transformers` can name, and its classes."""

from __future__ import annotations

import importlib
import inspect
from functools import lru_cache
from typing import Any

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


def classes(model_type: str) -> list[str]:
    """The names of the base model of a type and of one with a head."""
    base = _named("MODEL", model_type)
    heads = (name for head in HEADS for name in _named(f"MODEL_FOR_{head}", model_type))
    others = [name for name in _own(model_type) if name not in base]
    base = base or others[:1]
    head = next((name for name in (*heads, *others) if name not in base), None)
    return [*base[:1], *([head] if head else [])]


def model_class(model_type: str, name: str) -> Any:
    module = _modeling(model_type)
    if module is not None and hasattr(module, name):
        return getattr(module, name)
    return getattr(importlib.import_module("transformers"), name)


def _named(mapping: str, model_type: str) -> list[str]:
    from transformers.models.auto import modeling_auto

    names = getattr(modeling_auto, f"{mapping}_MAPPING_NAMES").get(model_type, ())
    return [names] if isinstance(names, str) else list(names)


def _own(model_type: str) -> list[str]:
    """Classes that say that they are built from this type's configuration, the basic ones first."""
    module, config = _modeling(model_type), config_class(model_type)
    if module is None:
        return []
    found = [
        name
        for name, value in vars(module).items()
        if inspect.isclass(value)
        and getattr(value, "config_class", None) is config
        and value.__module__ == module.__name__
        and not name.endswith("PreTrainedModel")
    ]
    return sorted(found, key=lambda name: ("For" in name, len(name)))


@lru_cache(maxsize=None)
def _modeling(model_type: str) -> Any:
    home = config_class(model_type).__module__
    try:
        return importlib.import_module(home.replace(".configuration_", ".modeling_"))
    except ImportError:
        return None
