"""``nn.init.trunc_normal_`` as one op, where it may have to draw again.

From torch 2.13 on it redraws what falls outside its bounds until nothing does, and so reads what it
drew. Recorded whole, nothing is read. Large ones are then drawn as ``redraw`` says, all others as
they are, when their values, or a later place in the random stream, are wanted.
"""

from __future__ import annotations

import functools
import warnings
from typing import Any

import torch
from torch import Tensor

from lateinit._recording.recorder import current
from lateinit._rng import mt19937
from lateinit._tensors.slots import is_deferred_tensor
from lateinit._torch import operators
from lateinit._torch.modes import without_functions, without_modes
from lateinit._torch.operators import TRUNC_NORMAL

original = TRUNC_NORMAL


def _run(
    tensor: Tensor, mean: float, std: float, a: float, b: float, *, generator: torch.Generator
) -> Tensor:
    if a - 2 * std <= mean <= b + 2 * std:
        return original(tensor, mean, std, a, b, generator=generator)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warned when it was recorded
        return original(tensor, mean, std, a, b, generator=generator)


_OP = operators.register(operators.TRUNCATED, _run)


@functools.cache
def may_redraw() -> bool:
    """Whether the torch that runs rejects draws; older ones draw once and invert."""
    with without_modes():  # it is first asked in a block
        generator = torch.Generator().manual_seed(0)
        start = mt19937.state_of(generator)
        original(torch.empty(640, device="cpu"), 0.0, 1.0, -0.5, 0.5, generator=generator)
        return mt19937.state_of(generator) != mt19937.jump(start, 640)


def recorded(
    tensor: Tensor, mean: float, std: float, a: float, b: float, generator: Any = None
) -> Tensor:
    """In place of ``nn.init._no_grad_trunc_normal_`` while a block runs."""
    recorder = current()
    floating = is_deferred_tensor(tensor) and tensor.is_floating_point()
    numbers = all(isinstance(value, (int, float)) for value in (mean, std, a, b))
    if recorder is None or not floating or not numbers or not may_redraw():
        return original(tensor, mean, std, a, b, generator=generator)
    if not _quiet(tensor.dtype, mean, std, a, b):
        _on_nothing(tensor.dtype, mean, std, a, b)
    with without_functions():
        recorder.overwrite(_OP, tensor, (mean, std, a, b), generator)
    return tensor


@functools.lru_cache(maxsize=1024)
def _quiet(dtype: torch.dtype, mean: float, std: float, a: float, b: float) -> bool:
    """Whether torch takes these numbers without a warning; raises what it raises."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        _on_nothing(dtype, mean, std, a, b)
    return not caught


def _on_nothing(dtype: torch.dtype, mean: float, std: float, a: float, b: float) -> None:
    with without_modes():
        original(torch.empty(0, dtype=dtype, device="cpu"), mean, std, a, b)
