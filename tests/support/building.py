"""The two ways to build a case, and what several laws ask of the result."""

from __future__ import annotations

import ctypes
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import pytest
import torch

import lateinit
from tests.support.models import MODELS

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn

    from tests.support.cases import Case

SEED = 0
M_PERTURB = -6
EAGER_POISON, LATE_POISON = 0x80, 0x5A


def poison(byte: int) -> None:
    """Have the C library fill what it hands out, so that an element never written shows.

    The eager twin and the deferred model get different bytes, so that they cannot agree on one.
    No effect where the C library is not glibc.
    """
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).mallopt(M_PERTURB, byte)


def eager(case: Case, seed: int = SEED) -> nn.Module:
    poison(EAGER_POISON)
    torch.manual_seed(seed)
    return case.build()


def deferred(case: Case, seed: int = SEED, **options: Any) -> nn.Module:
    poison(LATE_POISON)
    torch.manual_seed(seed)
    with lateinit.deferred(**options):
        return case.build()


def trainable(model: nn.Module) -> list[torch.Tensor]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """One step on a loss that every parameter is part of."""
    optimizer.zero_grad()
    sum(parameter.abs().square().double().sum() for parameter in trainable(model)).backward()
    optimizer.step()


def models(which: Callable[[Case], bool] = lambda _: True) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", [case for case in MODELS if which(case)], ids=str)
