"""The data written beside the tensors: metadata in each file, an index, a configuration."""

from __future__ import annotations

import json
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lateinit._checkpoint.save.manifest import ShardFile
from lateinit._integrations import config_text, weights_stem
from lateinit._version import __version__


def metadata_of(seed: int | None) -> dict[str, str]:
    """The metadata of every file; its keys are among ``OWN_KEYS``."""
    known = {} if seed is None else {"seed": str(seed)}
    return {"format": "pt", "lateinit": __version__, "torch": torch.__version__, **known}


def companions(module: nn.Module | Mapping[str, Tensor], shards: list[ShardFile]) -> dict[str, str]:
    """The index of several shards, and the configuration of the model, by file."""
    found = {}
    if len(shards) > 1:
        places = {item.entry.name: shard.file for shard in shards for item in shard.items}
        index = {
            "metadata": {"total_size": sum(shard.nbytes for shard in shards)},
            "weight_map": dict(sorted(places.items())),
        }
        found[f"{weights_stem(module)}.safetensors.index.json"] = json.dumps(index, indent=2) + "\n"
    floats = (i.entry.dtype for s in shards for i in s.items if i.entry.dtype.is_floating_point)
    config = config_text(module, next(floats, None))
    return found if config is None else {**found, "config.json": config}
