"""What a default configuration lacks to be one that its own model accepts.

Some defaults leave out what has no default (`prediction_length`), some ask for an optional package
(a `timm` backbone, for which a ResNet is put), some contradict their own model.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tests.zoo import catalog

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import PreTrainedConfig

Given = dict[str, Any]


def default_config(model_type: str) -> PreTrainedConfig:
    make = STARTS.get(model_type)
    config: PreTrainedConfig = make() if make else catalog.config_class(model_type)()
    return config


def overrides(config: PreTrainedConfig, given: Given) -> Given:
    """By the name of a configuration's class, so that parts of others get theirs too."""
    extra = OVERRIDES.get(type(config).__name__, {})
    asked = {**vars(config), **given}
    return {k: v(asked) if callable(v) else v for k, v in extra.items()}


def stand_in(config: PreTrainedConfig) -> PreTrainedConfig:
    """What is put for a backbone that another package would have to provide."""
    if type(config).__name__ != "TimmBackboneConfig":
        return config
    from transformers import ResNetConfig

    return ResNetConfig(out_indices=[i for i in config.out_indices or [4] if i > 0] or [4])


def _every(*names: str) -> Callable[[Given], list[str]]:
    """A kind for each layer, in turn."""
    return lambda asked: [names[i % len(names)] for i in range(asked["num_hidden_layers"])]


def _head_width(asked: Given) -> int:
    return int(asked["hidden_size"]) // int(asked["num_attention_heads"])


def _thirds(asked: Given) -> Given:
    """A rotary embedding whose sections (height, width, time) make up half of a head."""
    half = _head_width(asked) // 2
    sections = [half * 3 // 8, half * 3 // 8, half - 2 * (half * 3 // 8)]
    return {"rope_type": "default", "rope_theta": 500000.0, "mrope_section": sections}


def _all_shared(asked: Given) -> PreTrainedConfig:
    """An assistant's layers all use the keys and values of the model that it assists."""
    text: PreTrainedConfig = asked["text_config"]
    text.num_kv_shared_layers = text.num_hidden_layers
    return text


def _assistant() -> PreTrainedConfig:
    from transformers.models.gemma4.configuration_gemma4 import Gemma4TextConfig
    from transformers.models.gemma4_assistant.configuration_gemma4_assistant import (
        Gemma4AssistantConfig,
    )

    text = Gemma4TextConfig(hidden_size_per_layer_input=0, vocab_size_per_layer_input=0)
    return Gemma4AssistantConfig(text_config=text)


STARTS: dict[str, Callable[[], PreTrainedConfig]] = {
    "gemma4_assistant": _assistant,
}
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
OVERRIDES: dict[str, Given] = {
    "AutoformerConfig": {"prediction_length": 4},
    "ChameleonConfig": {"vocabulary_map": {"<image>": 4, "IMGIMGBZ": 5, "IMGIMGCZ": 6}},
    "CohereCompassTextConfig": {"rope_parameters": {"full_attention": _ROPE}},
    "DbrxAttentionConfig": {"rope_theta": 10000.0},
    "DeepseekOcr2TextConfig": {"mlp_layer_types": _every("dense", "sparse")},
    "DiffusionGemmaTextConfig": {
        "num_experts": 4,
        "top_k_experts": 2,
        "moe_intermediate_size": 32,
    },
    "Dots1Config": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "Emu3Config": {"vocabulary_map": {"<image>": 4, "<|extra_200|>": 5}},
    "Ernie4_5_VLMoeTextConfig": {"rope_parameters": _thirds},
    "EsmConfig": {"vocab_size": 33, "pad_token_id": 1, "mask_token_id": 32},
    "Gemma4AssistantConfig": {"text_config": _all_shared},
    "Granite4VisionConfig": {"deepstack_layer_map": [[-1, 0]], "downsample_rate": "1/2"},
    "HunYuanDenseV1Config": {"head_dim": _head_width},
    "HunYuanMoEV1Config": {"head_dim": _head_width},
    "HunYuanVLTextConfig": {"head_dim": _head_width},
    "InformerConfig": {"prediction_length": 4},
    "Lfm2MoeConfig": {"layer_types": _every("conv", "full_attention")},
    "MinistralConfig": {"head_dim": _head_width},
    "MoonshineStreamingConfig": {"num_key_value_heads": 8},
    "NemotronConfig": {"num_key_value_heads": lambda asked: asked["num_attention_heads"]},
    "Pix2StructTextConfig": {"initializer_range": 0.02},
    "Qwen3OmniMoeTalkerTextConfig": {"shared_expert_intermediate_size": 32},
    "ReformerConfig": {"is_decoder": True},
    "T5Gemma2DecoderConfig": {"dropout_rate": 0.0},
    "T5Gemma2TextConfig": {"dropout_rate": 0.0},
    "TimeSeriesTransformerConfig": {"prediction_length": 4},
    "VitMatteConfig": {"fusion_hidden_sizes": [64, 32, 16, 8]},
    "Wav2Vec2BertConfig": {"vocab_size": 32},
    "Wav2Vec2ConformerConfig": {"vocab_size": 32},
}
