"""Devices and the generators that random ops on them draw from."""

from __future__ import annotations

from typing import Any

import torch

from lateinit.errors import RecordingError

CPU = torch.device("cpu")


def device_number(device: torch.device) -> int:
    """The number of a CUDA device, that of the current one where it has none."""
    number: Any = device.index  # None where it was not given, whatever the stubs say
    return torch.cuda.current_device() if number is None else int(number)


def default_generator(device: torch.device) -> torch.Generator:
    """The generator that random ops on a device draw from unless told otherwise."""
    if device == CPU or device.type == "cpu":
        return torch.default_generator
    if device.type == "cuda" and torch.cuda.is_available():
        torch.cuda.init()
        return torch.cuda.default_generators[device_number(device)]
    raise RecordingError(
        f"the constructor draws random numbers on {device}, whose generator is not available "
        "here: build the model on a machine that has this device, or on the CPU"
    )


def generator_key(generator: torch.Generator) -> int:
    """The same for all Python objects that stand for one generator, while it lives."""
    key: int = generator._cdata  # type: ignore[attr-defined]
    return key
