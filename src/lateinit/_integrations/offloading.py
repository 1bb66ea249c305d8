"""Code of other libraries that reads the device of a tensor, or sends its values."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any


def _places_without_value(given: Mapping[str, Any]) -> bool:
    """Accelerate's ``set_module_tensor_to_device``: moves what is there, and raises on meta."""
    places = "tensor_name" in given and given.get("value") is None
    return places and str(given.get("device")) != "meta"


SEES_RECORDED = (
    "safetensors.torch",  # takes no two meta tensors for tied
    "peft.",  # moves its own parameters, with their values, to where the weights are
)
"""The beginnings of the names of modules that are told the device that a tensor will have."""

NEEDS_VALUES: dict[str, Callable[[Mapping[str, Any]], bool]] = {
    "accelerate.utils.modeling": _places_without_value,
}
"""By the name of a module: whether its function with these local variables needs the values."""

_SENDS = {
    # accelerate/utils/fsdp_utils.py: fsdp2_load_full_state_dict sends what rank 0 has.
    "accelerate.utils.fsdp_utils": "pass cpu_ram_efficient_loading=False to "
    "FullyShardedDataParallelPlugin, and after prepare() call lateinit.materialize(model), or "
    "lateinit.load_checkpoint(model, path, source_rank=0) (docs/recipes.md)",
    # deepspeed/runtime/zero/partition_parameters.py: Init cuts real parameters that rank 0 sends.
    "deepspeed": "DeepSpeed ZeRO partitions real parameters: build the model inside "
    "`with lateinit.deferred():` alone, then for one layer after the other call "
    "lateinit.materialize(layer) and deepspeed.zero.Init(module=layer) (docs/recipes.md)",
}


def before_sending(modules: Iterable[str]) -> str | None:
    """What to do before values are sent to other ranks, by the modules that have them sent."""
    known = (step for name in modules for start, step in _SENDS.items() if name.startswith(start))
    return next(known, None)
