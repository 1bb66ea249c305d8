"""accelerate's device maps: ``"auto"``, and its hooks for weights that stay on disk."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


def has_accelerate() -> bool:
    """Whether accelerate is installed."""
    return importlib.util.find_spec("accelerate") is not None


def inferred(module: nn.Module, dtype: torch.dtype | None) -> dict[str, Any]:
    """The device map that accelerate infers for the devices and the disk of this machine.

    Args:
        module: the model; its tensors may be on ``meta``.
        dtype: the dtype that the model will have.
    """
    accelerate: Any = importlib.import_module("accelerate")

    whole = getattr(module, "_no_split_modules", None)
    found: dict[str, Any] = accelerate.infer_auto_device_map(
        module, no_split_module_classes=list(whole or ()), dtype=dtype
    )
    return found


class Disk:
    """A folder of weights that accelerate's hooks load before each forward."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._index: dict[str, Any] = {}

    def write(self, names: Iterable[str], weight: Tensor) -> None:
        """Write a weight under each of its names."""
        utils: Any = importlib.import_module("accelerate.utils")
        self._folder.mkdir(parents=True, exist_ok=True)
        for name in names:
            utils.offload_weight(weight.detach(), name, str(self._folder), self._index)

    def attach(self, modules: dict[str, nn.Module], device: torch.device) -> None:
        """Write the index, and have modules load their weights from the folder.

        Args:
            modules: the modules by name; the folder has all of their own parameters.
            device: the device on which the modules compute.
        """
        hooks: Any = importlib.import_module("accelerate.hooks")
        utils: Any = importlib.import_module("accelerate.utils")
        utils.save_offload_index(self._index, str(self._folder))
        weights = utils.OffloadedWeightsLoader(save_folder=str(self._folder))
        for name, module in modules.items():
            hook = hooks.AlignDevicesHook(
                execution_device=device,
                offload=True,
                io_same_device=True,
                weights_map=utils.PrefixedDataset(weights, f"{name}." if name else ""),
            )
            hooks.add_hook_to_module(module, hook)
