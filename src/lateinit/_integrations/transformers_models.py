"""Models of ``transformers``, from a model type or a ``config.json``, never from the hub.

Importing this module imports ``transformers``; ``model_specs`` does so on demand.
"""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import transformers
from torch import nn
from transformers.models.auto import configuration_auto, modeling_auto

from lateinit.errors import SpecError, candidates

Build = Callable[[], nn.Module]


def load_transformers(what: str, kwargs: dict[str, Any]) -> Build:
    """Find the model that ``MODEL_TYPE``, ``PATH`` or ``MODEL_TYPE_OR_PATH:CLASS`` names.

    Args:
        what: the specification, without ``transformers:``.
        kwargs: attributes of the configuration to set.

    Raises:
        SpecError: there is no such model, or ``kwargs`` do not fit it.
    """
    source, _, class_name = what.partition(":")
    path = Path(source)
    if path.suffix == ".json" or path.is_dir() or "/" in source:
        values = _read(path)
        class_name = class_name or _architecture(values, path)
        config_class = _config_class(values.get("model_type"), str(path))
    else:
        values, config_class = {}, _config_class(source, source)
    _check(kwargs, config_class)

    def configure() -> Any:
        return config_class.from_dict(values | kwargs) if values else config_class(**kwargs)

    if class_name:
        model_class = _model_class(class_name)
        return lambda: model_class._from_config(configure())
    auto_class = _auto_class(config_class, source)
    return lambda: auto_class.from_config(configure())


def _read(path: Path) -> dict[str, Any]:
    file = path / "config.json" if path.is_dir() else path
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise SpecError(
            f"there is no configuration {file}: name a config.json, a folder that holds one, or a "
            "model type such as gpt2 (nothing is downloaded)"
        ) from error
    except (OSError, ValueError) as error:
        raise SpecError(f"{file} is no JSON configuration: {error}") from error
    if not isinstance(values, dict):
        raise SpecError(f"{file} is no configuration: it holds no JSON object")
    return values


def _config_class(model_type: str | None, source: str) -> Any:
    known = configuration_auto.CONFIG_MAPPING
    if model_type is None:
        raise SpecError(f"{source} does not say its model_type, so its class is not known")
    if model_type not in known:
        raise SpecError(
            f"transformers {transformers.__version__} has no model type {model_type!r}; near: "
            f"{candidates(model_type, known.keys())}"
        )
    return known[model_type]


def _architecture(values: dict[str, Any], path: Path) -> str:
    """The class that a configuration names, or "" if it names none."""
    names = values.get("architectures") or [""]
    if "auto_map" in values and not hasattr(transformers, str(names[0])):
        raise SpecError(
            f"{path} asks for code of its own ({names[0]}), which is not run: name it as "
            "path/to/file.py:callable"
        )
    return str(names[0])


def _model_class(name: str) -> Any:
    found = getattr(transformers, name, None)
    if not (isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)):
        every = (n for n in dir(transformers) if re.search(r"Model$|For[A-Z]\w+$", n))
        raise SpecError(
            f"transformers has no model class {name!r}; near: {candidates(name, every)}"
        )
    return found


def _auto_class(config_class: Any, source: str) -> Any:
    for name in ("AutoModelForCausalLM", "AutoModel"):
        auto = getattr(modeling_auto, name)
        if config_class in auto._model_mapping:
            auto._model_mapping[config_class]  # imports its class now, not while it is built
            return auto
    modeling = config_class.__module__.replace(".configuration_", ".modeling_")
    classes = [
        name
        for name, value in vars(importlib.import_module(modeling)).items()
        if isinstance(value, type) and issubclass(value, transformers.PreTrainedModel)
        if value.__module__ == modeling
    ]
    raise SpecError(
        f"{source} is neither a causal language model nor a bare model: name its class, as in "
        f"transformers:{source}:{classes[0] if classes else 'CLASS'} (there are: "
        f"{candidates(source, classes)})"
    )


def _check(kwargs: dict[str, Any], config_class: Any) -> None:
    """Refuse unknown attributes: a configuration would accept and ignore them."""
    default = config_class()
    unknown = [key for key in kwargs if not hasattr(default, key)]
    if unknown:
        known = [key for key in default.to_dict() if not key.startswith("_")]
        near = "; ".join(f"{key!r}, near: {candidates(key, known)}" for key in unknown)
        raise SpecError(f"{config_class.__name__} has no {near}")
