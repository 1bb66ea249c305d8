"""A spread of architectures of `transformers`, small, to be sharded."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

from tests.zoo import catalog
from tests.zoo.check import smallest
from tests.zoo.hints import default_config

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn

TYPES = (
    *("llama", "gpt2", "t5", "mixtral", "vit", "bert", "mamba2", "whisper", "convnext", "swin"),
    *("clip", "gemma3_text", "qwen2_vl", "wav2vec2", "deepseek_v3", "resnet", "detr", "beit"),
    *("bloom", "xlnet"),
)


def architectures(count: int) -> list[tuple[str, Callable[[], nn.Module]]]:
    """So many of them: the bare model of each type."""
    return [(model_type, maker(model_type)) for model_type in TYPES[:count]]


def maker(model_type: str) -> Callable[[], nn.Module]:
    bare, _ = catalog.classes(model_type)
    cls = catalog.model_class(model_type, bare[0])
    _, config = smallest(cls, default_config(model_type))
    return lambda: cls(copy.deepcopy(config))
