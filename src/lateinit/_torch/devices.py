"""Devices, and the default generator of each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from lateinit.errors import RecordingError

CPU = torch.device("cpu")


def device_of_result(asked: Any) -> torch.device:
    """The device that a tensor reports if it was requested on ``asked``."""
    device = torch.device(asked)
    return CPU if device.type == "cpu" else device  # a tensor on "cpu:0" reports "cpu"


def device_number(device: torch.device) -> int:
    """The number of a CUDA device; without an index, the number of the current device."""
    number: Any = device.index  # torch's stubs say int, but it is None for torch.device("cuda")
    return torch.cuda.current_device() if number is None else int(number)


def default_generator(device: torch.device) -> torch.Generator:
    """The generator from which random ops on a device draw by default.

    Raises:
        RecordingError: the generator is not available in this process.
    """
    if device == CPU or device.type == "cpu":
        return torch.default_generator
    if device.type == "cuda" and torch.cuda.is_available():
        torch.cuda.init()  # default_generators is empty before
        return torch.cuda.default_generators[device_number(device)]
    raise RecordingError(
        f"the constructor draws random numbers on {device}, whose generator is not available "
        "here: build the model on a machine that has this device, or on the CPU"
    )


def generator_key(generator: torch.Generator) -> int:
    """A key that all Python objects of one generator share, valid while the generator lives."""
    key: int = generator._cdata  # type: ignore[attr-defined]
    return key


GROUPING: tuple[Any, str] = torch._C, "_group_tensors_by_device_and_dtype"
"""Where torch/utils/_foreach_utils.py finds ``group_tensors``, at each call."""

group_tensors: Callable[..., dict[Any, Any]] = getattr(*GROUPING)
"""Lists of tensors, in groups by the device and dtype of those at one place in the lists."""
