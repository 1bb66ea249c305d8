"""Making the default configuration of an architecture small.

A configuration's widths are all divided by one number, so that what must divide or equal what
still does; counts of layers, experts and words are cut. Which number an architecture bears is
found by trying `RECIPES` in turn.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from typing import Any

from transformers import PreTrainedConfig

from tests.zoo.hints import overrides, stand_in

NOT_GIVEN = frozenset({"id2label", "label2id", "per_layer_config", "transformers_version"})
WORDS = 320
POSITIONS = 128
EXPERTS = 8
MOST_KINDS = 8

LAYERS = re.compile(r"^n_?layers?$|(^|_)layers$|num_.*_layers$|^depth$|num_blocks$|^[lxr]_layers$")
NOT_LAYERS = re.compile(r"_every_|kv_shared|adapter|feature_layers?$|rope|for_|conv_layers|auxil")
REPEATS = re.compile(r"^depths$|num_block_repeats|blocks_per_stage|block_sizes|numb_of_layers")
WIDTH = re.compile(
    r"latents$|upsample_groups$|dims?(ension)?($|_)|hidden($|_)|intermediate|channels?($|_)|rank$|width|d_(model|ff|kv|inner)"
    r"|embd|emb(ed(ding)?s?)?_(size|dim)|units$|filters$|planes$|projection_size|^dff$|proj_size"
    r"|(feature|feat|head|state|pooler|projector|input|output|project|adapter|entity)_sizes?$"
    r"|scalar$|embeds$|_dim_|dim$|conv_dim|channel_list"
)
NOT_WIDTH = re.compile(
    r"^num_(?!filters)|_num|layer_?s?$|heads$|kernel|stride|token|index|vocab|_id$|dropout|image_size|patch_size"
    r"|per_layer_config|feature_layer|n_attn|max_|expansion|input_channels|in_chans|multiplier"
)
VOCABULARY = re.compile(r"vocab(ulary)?_size(_base)?$|_vocab$|num_hash_buckets|vocab_size_per")
PLACES = re.compile(r"max_(?!2d).*position|n_positions|max_source|max_target|n_ctx|max_ep_len")
MANY_EXPERTS = re.compile(r"^(moe_)?(num|n)_(local_|routed_)?experts$|num_speakers$|num_prompts$")
CHOSEN_EXPERTS = re.compile(r"experts_per_tok|moe_top_?k|^top_k$|moe_k$")
TOKEN = re.compile(r"(token|_index|_id|_ids|_offset)$|token_(id|index)$")


@dataclass(frozen=True, slots=True)
class Recipe:
    """How much smaller: what widths are divided by, and how many layers are left."""

    factor: int
    layers: int | None
    words: int | None = WORDS

    def __str__(self) -> str:
        layers = "all" if self.layers is None else self.layers
        return f"widths / {self.factor}, {layers} layers"


RECIPES = (
    Recipe(16, 2),
    Recipe(8, 2),
    Recipe(16, 4),
    Recipe(8, 4),
    Recipe(4, 2),
    Recipe(16, None),
    Recipe(8, None),
    Recipe(2, 2),
    Recipe(4, None),
    Recipe(1, 2),
    Recipe(1, 4),
    Recipe(1, 2, None),
    Recipe(2, None),
    Recipe(1, None),
    Recipe(1, None, None),
)


def shrunk(config: PreTrainedConfig, recipe: Recipe) -> PreTrainedConfig:
    """A configuration of the same class as `config`, with all that can be made smaller."""
    config = stand_in(config)
    return type(config)(**changes(config, recipe))


def changes(config: PreTrainedConfig, recipe: Recipe) -> dict[str, Any]:
    """What to call the class of `config` with."""
    layers = layers_left(config, recipe)
    usual = _defaults(type(config))
    given = {}
    for name, value in vars(config).items():
        if name.startswith("_") or name in NOT_GIVEN:
            continue
        smaller = shrunk_value(name, value, recipe, layers)
        if isinstance(value, PreTrainedConfig) or smaller != usual.get(name, smaller):
            given[name] = smaller
    return given | outputs(config, layers) | overrides(config, given)


@cache
def _defaults(cls: type[PreTrainedConfig]) -> dict[str, Any]:
    try:
        return dict(vars(cls()))
    except Exception:  # noqa: BLE001 - then whatever the instance has is given
        return dict.fromkeys(("no", "defaults"))


def outputs(config: PreTrainedConfig, layers: dict[int, int]) -> dict[str, Any]:
    """Which stages a backbone gives: as many as before, the last ones of those left."""
    chosen = getattr(config, "_out_indices", None)
    if not chosen or config.out_indices == type(config)().out_indices:
        return {}
    stages = len(config.stage_names)
    left = layers.get(stages - 1, stages - 1) + 1
    if max(chosen) < left:
        return {"out_indices": list(chosen)}
    return {"out_indices": list(range(left))[-len(chosen) :]}


def layers_left(config: PreTrainedConfig, recipe: Recipe) -> dict[int, int]:
    """Old counts of layers, and the new ones: enough to have one layer of every kind."""
    if recipe.layers is None:
        return {}
    kinds = [v for v in vars(config).values() if _is_list_of_names(v)]
    enough = max([recipe.layers, *(_prefix_with_all(v) for v in kinds)])
    counts = {
        value
        for name, value in vars(config).items()
        if isinstance(value, int) and LAYERS.search(name) and not NOT_LAYERS.search(name)
    }
    return {count: min(count, enough) for count in counts}


def _is_list_of_names(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and bool(value) and all(type(v) is str for v in value)


def _prefix_with_all(names: list[str]) -> int:
    first = max(names.index(name) for name in set(names)) + 1
    return first if first <= MOST_KINDS else 0


def shrunk_value(name: str, value: Any, recipe: Recipe, layers: dict[int, int]) -> Any:
    if isinstance(value, PreTrainedConfig):
        return shrunk(value, recipe)
    if name.startswith("rope_") and isinstance(value, dict):
        return _rope(value, recipe)
    if isinstance(value, dict):
        return {k: shrunk_value(str(k), v, recipe, layers) for k, v in value.items()}
    if isinstance(value, (list, tuple)) and value:
        return type(value)(_shrunk_items(name, value, recipe, layers))
    return _number(name, value, recipe, layers) if type(value) is int else value


def _shrunk_items(name: str, items: Any, recipe: Recipe, layers: dict[int, int]) -> list[Any]:
    if len(items) in layers and len(items) > 4:
        items = items[: layers[len(items)]]
    if REPEATS.search(name) and recipe.layers is not None:
        return [min(v, 2) if type(v) is int else v for v in items]
    return [shrunk_value(name, item, recipe, {}) for item in items]


def _rope(settings: dict[str, Any], recipe: Recipe) -> dict[str, Any]:
    """Sections of a rotary embedding divide up the width of a head."""
    smaller = {}
    for name, value in settings.items():
        if isinstance(value, dict):
            smaller[name] = _rope(value, recipe)
        elif name == "mrope_section" and all(v % recipe.factor == 0 for v in value):
            smaller[name] = [v // recipe.factor for v in value]
        else:
            smaller[name] = value
    return smaller


def _number(name: str, value: int, recipe: Recipe, layers: dict[int, int]) -> int:
    if VOCABULARY.search(name) or PLACES.search(name):
        most = WORDS if VOCABULARY.search(name) else POSITIONS
        return value if recipe.words is None else min(value, most)
    if TOKEN.search(name):
        return value % WORDS if recipe.words is not None and value >= WORDS else value
    if LAYERS.search(name) and not NOT_LAYERS.search(name):
        return layers.get(value, value)
    if MANY_EXPERTS.search(name):
        return min(value, EXPERTS)
    if CHOSEN_EXPERTS.search(name):
        return min(value, 2)
    if WIDTH.search(name) and not NOT_WIDTH.search(name) and value % recipe.factor == 0:
        return value // recipe.factor
    return value
