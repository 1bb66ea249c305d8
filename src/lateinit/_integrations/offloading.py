"""Code of other libraries that reads the device of a tensor, or sends its values."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any


def _places_without_value(given: Mapping[str, Any]) -> bool:
    """Accelerate's ``set_module_tensor_to_device``: moves the tensor it finds, raises on meta."""
    places = "tensor_name" in given and given.get("value") is None
    return places and str(given.get("device")) != "meta"


SEES_RECORDED = (
    "safetensors.torch",  # recognises no ties on meta
    "peft.",  # moves its own parameters, with their values, to the device of the weights
)
"""Prefixes of the names of modules that see the recorded device of a deferred tensor."""

NEEDS_VALUES: dict[str, Callable[[Mapping[str, Any]], bool]] = {
    "accelerate.utils.modeling": _places_without_value,
}
"""By the name of a module: whether its function with these local variables needs the values."""

_SENDS = {
    # accelerate/utils/fsdp_utils.py: fsdp2_load_full_state_dict sends the values of rank 0.
    "accelerate.utils.fsdp_utils": "pass cpu_ram_efficient_loading=False to "
    "FullyShardedDataParallelPlugin, and after prepare() call lateinit.materialize(model), or "
    "lateinit.load_checkpoint(model, path, source_rank=0) (docs/recipes.md)",
    # deepspeed/runtime/zero/partition_parameters.py: Init cuts real parameters that rank 0 sends.
    "deepspeed": "DeepSpeed ZeRO partitions real parameters: build the model inside "
    "`with lateinit.deferred():` alone, then for one layer after the other call "
    "lateinit.materialize(layer) and deepspeed.zero.Init(module=layer) (docs/recipes.md)",
}


def before_sending(modules: Iterable[str]) -> str | None:
    """The step to take before one of some running modules sends values to other ranks, or None."""
    known = (step for name in modules for start, step in _SENDS.items() if name.startswith(start))
    return next(known, None)
