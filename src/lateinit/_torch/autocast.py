"""Intercept the ops whose arguments autocast casts, and find out how torch would cast them.

Autocast works above autograd, on whole composite ops, through a dispatch key of each device type
(aten/src/ATen/autocast_mode.h). Tensors on ``meta`` have none (c10/core/DispatchKeySet.h), so torch
would not cast them. So the key of a device type that torch has no autocast for is put in force, and
the kernels registered here for that key intercept the same ops.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, _ops

from lateinit._torch.arguments import Args, Kwargs
from lateinit._torch.modes import AUTOCAST_DEVICES, inference_mode, without_modes


def _key(device: str) -> Any:
    return getattr(torch._C.DispatchKey, f"Autocast{device.upper()}")


_KEY = _key("ipu")
_KEYS = {device: _key(device) for device in AUTOCAST_DEVICES}
_EVERY_KEY = functools.reduce(
    torch._C.DispatchKeySet.add, _KEYS.values(), torch._C.DispatchKeySet(_KEY)
)
Hear = Callable[[Any, Args, Kwargs], Any]


class _Here(threading.local):
    """``hear`` receives the ops of this thread; ``asking`` is True within ``as_autocast_casts``."""

    hear: Hear | None = None
    asking = False


_here = _Here()


class _Answer(BaseException):
    """Carries the call that autocast makes in place of an op, and ends it before it computes."""

    def __init__(self, op: Any, args: Args, kwargs: Kwargs) -> None:
        self.op, self.given, self.named = op, args, kwargs


class autocast_heard:  # noqa: N801 - reads as a statement
    """A block in which ``hear(op, args, kwargs)`` intercepts the ops that autocast would cast.

    It returns the result of the op, or ``NotImplemented`` to have the op go on to torch's autocast.
    """

    __slots__ = ("_guard", "_hear", "_outer")

    def __init__(self, hear: Hear) -> None:
        self._hear = hear

    def __enter__(self) -> None:
        _registered()
        include = torch._C._dispatch_tls_local_include_set().add(_KEY)
        exclude = torch._C._dispatch_tls_local_exclude_set().remove(_KEY)
        self._outer, _here.hear = _here.hear, self._hear
        self._guard = torch._C._ForceDispatchKeyGuard(include, exclude)
        self._guard.__enter__()

    def __exit__(self, *error: object) -> None:
        self._guard.__exit__(*error)
        _here.hear = self._outer


def below_autocast() -> Any:
    """A block in which autocast is off, and no op is intercepted."""
    return torch._C._ExcludeDispatchKeyGuard(_EVERY_KEY)


def as_autocast_casts(op: Any, args: Args, kwargs: Kwargs) -> tuple[Any, Args, Kwargs]:
    """The op that autocast calls in place of an intercepted op, with the arguments after its casts.

    Autocast casts before it looks at shapes, and the op itself is not run: tensors without elements
    suffice as arguments.

    Raises:
        RuntimeError: autocast refuses the op or the dtypes.
    """
    _here.asking = True
    try:
        with without_modes():
            op(*args, **kwargs)
    except _Answer as answer:
        op, args, kwargs = answer.op, answer.given, answer.named
    finally:
        _here.asking = False
    return op, args, kwargs


def is_cast_once(tensor: Tensor, device: str, dtype: torch.dtype) -> bool:
    """Whether autocast keeps the cast of a tensor (autocast_mode.cpp: cached_cast)."""
    return (
        dtype == torch.get_autocast_dtype(device)
        and tensor.dtype == torch.float32
        and tensor.requires_grad
        and tensor.is_leaf
        and not tensor._is_view()
        and torch.is_autocast_cache_enabled()
    )


def generation_of_cache(device: str) -> object:
    """An object that stays the same as long as autocast keeps the casts of weights.

    Autocast casts a weight once, and forgets it at the end of the outermost ``torch.autocast`` or
    by ``torch.clear_autocast_cache()``, neither of which can be intercepted. So a weight of
    lateinit's own is cast: its cast has the same graph node until autocast empties its cache.
    """
    with without_modes(), torch.enable_grad(), inference_mode(False):
        product = torch.mm(_beacon(device), _beacon(device))
    assert product.grad_fn is not None
    return product.grad_fn.next_functions[0][0]


@functools.cache
def _beacon(device: str) -> Tensor:
    return torch.zeros(1, 1, device=device, requires_grad=True)


@functools.cache
def _registered() -> Any:
    """The kernels of ``_KEY``, which no other library enables; made when they are first needed."""
    fallback = torch.library.Library("_", "IMPL")
    fallback.fallback(torch.library.fallthrough_kernel, _KEY.name)
    library = torch.library.Library("aten", "IMPL")
    known = torch._C._dispatch_has_kernel_for_dispatch_key
    # autocast_mode.h: fp32_append_dtype calls these in place of an overload without dtype.
    found: dict[str, list[Any]] = {"norm.ScalarOpt_dtype": [], "norm.ScalarOpt_dim_dtype": []}
    for name in torch._C._dispatch_get_all_op_names():
        keys = [key for key in _KEYS.values() if known(name, key.name)]
        if keys and name.startswith("aten::"):
            found[name.removeprefix("aten::")] = keys
    for name, keys in found.items():
        library.impl(name, _kernel(name, keys), _KEY.name, with_keyset=True)
    return fallback, library


def _kernel(name: str, keys: list[Any]) -> Callable[..., Any]:
    packet, _, overload = name.partition(".")
    op: _ops.OpOverload = getattr(getattr(torch.ops.aten, packet), overload or "default")
    kinds = [kind for kind, key in _KEYS.items() if key in keys]

    def kernel(keyset: Any, *args: Any, **kwargs: Any) -> Any:
        casting = any(map(keyset.has, keys))
        if _here.asking and not casting:
            raise _Answer(op, args, kwargs)
        result: Any = NotImplemented
        if not _here.asking and _here.hear and any(map(torch.is_autocast_enabled, kinds)):
            result = _here.hear(op, args, kwargs)
        if result is NotImplemented:
            return op.redispatch(keyset.remove(_KEY), *args, **kwargs)
        return result

    return kernel
