"""The ways to build a model that are compared."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

import torch

import lateinit

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn

SEED = 0
T = TypeVar("T")


def eager(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(SEED)
    return make()


def deferred(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(SEED)
    return lateinit.deferred_init(make)


def materialized(make: Callable[[], nn.Module]) -> nn.Module:
    return lateinit.materialize(deferred(make))


def meta(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.device("meta"):
        return make()


def init_empty_weights(make: Callable[[], nn.Module]) -> nn.Module:
    from accelerate import init_empty_weights as without_weights  # noqa: PLC0415 - slow to import

    with without_weights():
        return make()


CONTENDERS: dict[str, Callable[[Callable[[], nn.Module]], nn.Module]] = {
    "deferred": deferred,
    "materialized": materialized,
    "meta": meta,
    "init_empty_weights": init_empty_weights,
    "eager": eager,
}
