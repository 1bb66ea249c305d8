"""Shapes of the commonest ops, without torch's own ``meta`` kernels.

Many of those are Python, some take a millisecond and import a compiler at their first call. A
shortcut answers the plain case and gives None otherwise: then torch decides, and words the error.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lateinit.ops import OpInfo

Shortcut = Callable[..., Any]


def shortcut(info: OpInfo, args: Any, kwargs: Any) -> Any:
    """What an op on meta tensors gives, or None if there is no short way to it."""
    known = _SHORTCUTS.get(info.name)
    if known is None:
        if info.scalar_inplace and not any(isinstance(a, (Tensor, list, tuple)) for a in args[1:]):
            return args[0] if args[0].is_floating_point() else None
        return None
    return known(*args, **kwargs)


def _plain(*tensors: Any) -> bool:
    """Whether tensors are contiguous and of one floating dtype."""
    first = tensors[0]
    return first.is_floating_point() and all(
        t.is_meta and t.dtype is first.dtype and t.is_contiguous() for t in tensors
    )


def _like(x: Tensor, *rest: Any, **kwargs: Any) -> Any:
    if kwargs or not _plain(x) or any(isinstance(value, Tensor) for value in rest):
        return None
    return torch.empty_like(x)


def _softmax(x: Tensor, dim: int, other: Any = None) -> Any:
    known = not other and -x.dim() <= dim < x.dim() and _plain(x)
    return torch.empty_like(x) if known else None


def _binary(a: Any, b: Any, **kwargs: Any) -> Any:
    if isinstance(b, (int, float)) and isinstance(a, Tensor):
        return torch.empty_like(a) if _plain(a) else None
    if not (isinstance(a, Tensor) and isinstance(b, Tensor) and _plain(a, b)):
        return None
    if a.dim() < b.dim():
        a, b = b, a
    suffix = b.dim() and a.shape[-b.dim() :] == b.shape
    return torch.empty_like(a) if suffix else None


def _addmm(bias: Tensor, a: Tensor, b: Tensor, **kwargs: Any) -> Any:
    fits = a.dim() == b.dim() == 2 and a.shape[1] == b.shape[0] and bias.shape == b.shape[1:]
    same = a.dtype is b.dtype is bias.dtype and a.is_meta and b.is_meta
    return a.new_empty((a.shape[0], b.shape[1])) if fits and same and not kwargs else None


def _embedding(weight: Tensor, indices: Tensor, *rest: Any, **kwargs: Any) -> Any:
    return weight.new_empty((*indices.shape, weight.shape[1])) if weight.dim() == 2 else None


def _layer_norm(x: Tensor, shape: Any, weight: Any, bias: Any, eps: float) -> Any:
    shape, count = tuple(shape), len(shape)
    given = [t for t in (weight, bias) if t is not None]
    if x.shape[-count:] != shape or any(t.shape != shape for t in given) or not _plain(x, *given):
        return None
    stats = x.new_empty((*x.shape[:-count], *(1 for _ in shape)))
    return torch.empty_like(x), stats, torch.empty_like(stats)


def _batch_norm(x: Tensor, *tensors: Any) -> Any:
    channels = x.shape[1:2]
    given = [t for t in tensors[:4] if t is not None]
    if any(t.shape != channels for t in given) or not _plain(x, *given):
        return None
    return torch.empty_like(x), x.new_empty(channels), x.new_empty(channels)


def _group_norm(x: Tensor, weight: Any, bias: Any, n: int, c: int, hxw: int, groups: int, eps: float) -> Any:
    given = [t for t in (weight, bias) if t is not None]
    if any(tuple(t.shape) != (c,) for t in given) or not _plain(x, *given):
        return None
    return torch.empty_like(x), x.new_empty((n, groups)), x.new_empty((n, groups))


_ELEMENTWISE = (
    "relu sigmoid tanh gelu silu mish elu leaky_relu hardswish hardsigmoid hardtanh softplus erf exp "
    "sqrt rsqrt sin cos neg abs tril triu mul.Scalar add.Scalar sub.Scalar div.Scalar "
    "pow.Tensor_Scalar clamp clamp_min clamp_max"
)
_SHORTCUTS: dict[str, Shortcut] = {f"aten::{name}": _like for name in _ELEMENTWISE.split()} | {
    "aten::add.Tensor": _binary,
    "aten::sub.Tensor": _binary,
    "aten::mul.Tensor": _binary,
    "aten::div.Tensor": _binary,
    "aten::_softmax": _softmax,
    "aten::_safe_softmax": _softmax,
    "aten::_log_softmax": _softmax,
    "aten::addmm": _addmm,
    "aten::embedding": _embedding,
    "aten::native_layer_norm": _layer_norm,
    "aten::native_batch_norm": _batch_norm,
    "aten::native_group_norm": _group_norm,
}
