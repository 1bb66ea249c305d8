"""The files in which the library of a model looks for its weights and its configuration."""

from __future__ import annotations

import sys
from typing import Any

import torch

from lateinit._integrations.transformers_names import saved_config


def weights_stem(model: Any) -> str:
    """The name of the file with the weights of a model, without ``.safetensors``."""
    # diffusers/utils/constants.py: SAFETENSORS_WEIGHTS_NAME; shards and index are named after it.
    return "diffusion_pytorch_model" if _is_of_diffusers(model) else "model"


def config_text(model: Any, dtype: torch.dtype | None) -> str | None:
    """The ``config.json`` that belongs beside the weights, if the model has a configuration.

    Args:
        model: the model.
        dtype: the dtype of its floating-point weights.
    """
    if _is_of_diffusers(model):
        text: str = model.to_json_string()
        return text
    config = getattr(model, "config", None)
    return saved_config(config, model, dtype) if hasattr(config, "to_json_string") else None


def _is_of_diffusers(model: Any) -> bool:
    # If the model is one, its class has been imported.
    library = sys.modules.get("diffusers.models.modeling_utils")
    base = getattr(library, "ModelMixin", None)
    return isinstance(base, type) and isinstance(model, base)
