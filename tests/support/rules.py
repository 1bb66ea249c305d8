"""What ``init=`` promises, said in eager torch: an oracle for its tests."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn


def start_of(state: bytes, name: str) -> torch.Tensor:
    """The state that the generator of a rule starts in."""
    key = hashlib.sha256(state + f"/{name}/0".encode()).digest()
    words = struct.unpack("=624I", hashlib.shake_256(key).digest(4 * 624))
    fresh = bytearray(torch.Generator().manual_seed(0).get_state().numpy().tobytes())
    struct.pack_into("=624Q", fresh, 24, *words)
    return torch.frombuffer(fresh, dtype=torch.uint8)


def apply_rules(
    model: nn.Module, rules: Mapping[str, Callable[[Any], Any]], state: bytes
) -> nn.Module:
    """Call each rule on the tensor of a name, once a tensor.

    Args:
        model: a real model.
        rules: by the first name of the tensor.
        state: the random state before the construction.
    """
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    with torch.random.fork_rng(devices=()):
        for name, rule in rules.items():
            torch.set_rng_state(start_of(state, name))
            with torch.inference_mode(tensors[name].is_inference()), torch.no_grad():
                rule(tensors[name])
    return model


def state_after(seed: int) -> bytes:
    """The random state after ``torch.manual_seed(seed)``."""
    return bytes(torch.Generator().manual_seed(seed).get_state().numpy().tobytes())
