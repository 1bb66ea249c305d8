"""The ways to build a model that are compared."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch.overrides import TorchFunctionMode

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


def meta_with_initialisers(make: Callable[[], nn.Module]) -> nn.Module:
    """On ``meta`` without looking like it: transformers skips its initialisers where it does.

    It asks a probe, ``torch.tensor([])``, where tensors are made; this context leaves it alone.
    """
    with _UnnoticedMeta():
        return make()


class _UnnoticedMeta(TorchFunctionMode):
    _FACTORIES = frozenset({torch.empty, torch.zeros, torch.ones, torch.full, torch.arange})

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in self._FACTORIES and kwargs.get("device") is None:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


def init_empty_weights(make: Callable[[], nn.Module]) -> nn.Module:
    from accelerate import init_empty_weights as without_weights  # noqa: PLC0415 - slow to import

    with without_weights():
        return make()


CONTENDERS: dict[str, Callable[[Callable[[], nn.Module]], nn.Module]] = {
    "deferred": deferred,
    "materialized": materialized,
    "meta": meta,
    "meta_with_initialisers": meta_with_initialisers,
    "init_empty_weights": init_empty_weights,
    "eager": eager,
}
