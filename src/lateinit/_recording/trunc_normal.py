"""Record ``nn.init.trunc_normal_`` as one op, on the torch versions that redraw.

From torch 2.13 on, torch/nn/init.py: _no_grad_trunc_normal_ redraws the elements outside the bounds
in a loop, until ``mask.any()`` is False. It reads the values that it drew, which a recording would
have to compute. Recorded as one op, it reads nothing. It is replayed when its values, or a later
generator state, are needed: large tensors in parts (``_rng.truncated_normal``), others by torch.
"""

from __future__ import annotations

import functools
import warnings
from typing import Any

import torch
from torch import Tensor

from lateinit._recording.writer import current
from lateinit._rng import mt19937
from lateinit._tensors import is_deferred_tensor
from lateinit._torch import TRUNC_NORMAL, OpTraits, operators, without_functions, without_modes

original = TRUNC_NORMAL


def _run(
    tensor: Tensor, mean: float, std: float, a: float, b: float, *, generator: torch.Generator
) -> Tensor:
    if a - 2 * std <= mean <= b + 2 * std:
        return original(tensor, mean, std, a, b, generator=generator)
    with warnings.catch_warnings():
        # The warning was given when the op was recorded. catch_warnings changes process-wide state,
        # so it is entered only for numbers about which torch warns.
        warnings.simplefilter("ignore")
        return original(tensor, mean, std, a, b, generator=generator)


# ``recorded`` tries its numbers.
_OP = operators.register(
    operators.TRUNCATED,
    _run,
    OpTraits(fills=True, elementwise=True, draws="values", usual=lambda *_: True),
)


@functools.cache
def may_redraw() -> bool:
    """Whether the installed torch redraws; older versions draw one uniform and invert the CDF."""
    with without_modes():  # the first call comes from inside a block
        generator = torch.Generator().manual_seed(0)
        start = mt19937.state_of(generator)
        original(torch.empty(640, device="cpu"), 0.0, 1.0, -0.5, 0.5, generator=generator)
        return mt19937.state_of(generator) != mt19937.jump(start, 640)


def recorded(
    tensor: Tensor, mean: float, std: float, a: float, b: float, generator: Any = None
) -> Tensor:
    """Replaces ``nn.init._no_grad_trunc_normal_`` while a block runs."""
    writer = current()
    floating = is_deferred_tensor(tensor) and tensor.is_floating_point()
    numbers = all(isinstance(value, (int, float)) for value in (mean, std, a, b))
    if writer is None or not floating or not numbers or not may_redraw():
        return original(tensor, mean, std, a, b, generator=generator)
    if not _quiet(tensor.dtype, mean, std, a, b):
        _on_nothing(tensor.dtype, mean, std, a, b)  # again, since _quiet has suppressed the warning
    with without_functions():
        writer.overwrite(_OP, tensor, (mean, std, a, b), generator)
    return tensor


@functools.lru_cache(maxsize=1024)
def _quiet(dtype: torch.dtype, mean: float, std: float, a: float, b: float) -> bool:
    """Whether torch accepts these numbers without a warning; raises torch's own error."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        _on_nothing(dtype, mean, std, a, b)
    return not caught


def _on_nothing(dtype: torch.dtype, mean: float, std: float, a: float, b: float) -> None:
    with without_modes():
        original(torch.empty(0, dtype=dtype, device="cpu"), mean, std, a, b)
