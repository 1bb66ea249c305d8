"""Shapes of the most common ops, without torch's own ``meta`` kernels.

Many of torch's are written in Python, and some take a millisecond or import a compiler at their
first call. A shortcut handles the plain case and returns None for every other: then torch's kernel
is called, and raises any error.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lateinit._torch import OpInfo

Shortcut = Callable[..., Any]


def shortcut(info: OpInfo, args: Any, kwargs: Any) -> Any:
    """The result of an op on meta tensors, or None if there is no shortcut for it."""
    new = info.elementwise and not info.mutates
    known = _like if new else _SHORTCUTS.get(info.name)
    if known is None:
        if info.scalar_inplace and not any(isinstance(a, (Tensor, list, tuple)) for a in args[1:]):
            return args[0] if args[0].is_floating_point() else None
        return None
    return known(*args, **kwargs)


def range_on_meta(info: OpInfo, args: Any, kwargs: Any) -> Tensor | None:
    """``arange`` on meta, whose own kernel is the slowest of all; None if not a plain call."""
    numel = numel_of_factory(info, args) if info.allocates == "range" else None
    if numel is None:
        return None
    whole = all(isinstance(value, int) for value in args)
    dtype = kwargs.get("dtype") or (torch.int64 if whole else torch.get_default_dtype())
    return torch.empty(numel, dtype=dtype, device="meta")


def numel_of_factory(info: OpInfo, args: Any) -> int | None:
    """The number of elements that a factory makes; None if its arguments are not plain."""
    if info.allocates == "one":
        return 1
    if info.allocates == "size":
        return int(math.prod(args[info.arguments.index("size")]))
    if info.allocates == "range" and all(isinstance(value, (int, float)) for value in args):
        start, end, step = ((0, *args, 1), (*args, 1), args)[len(args) - 1]
        return max(0, math.ceil((end - start) / step)) if step else None
    return None


def _alike(x: Tensor) -> Tensor:
    """``empty_like``, whose kernel for meta tensors imports sympy.

    For a dense tensor, its strides follow the order of the original's strides.
    """
    if x.is_contiguous():
        return x.new_empty(x.shape)
    steps = [step for step, length in zip(x.stride(), x.shape, strict=True) if length > 1]
    # An expanded or overlapping tensor: the order of the dims does not follow from the strides.
    if 0 in steps or len(set(steps)) < len(steps):
        return torch.empty_like(x)
    strides, expected = [0] * x.dim(), 1
    for _, length, dim in sorted(zip(x.stride(), x.shape, range(x.dim()), strict=True)):
        strides[dim], expected = expected, expected * length
    return torch.empty_strided(x.shape, strides, dtype=x.dtype, device="meta")


def _plain(*tensors: Any) -> bool:
    """Whether tensors are contiguous, on ``meta``, and of one floating-point dtype."""
    first = tensors[0]
    return first.is_floating_point() and all(
        t.is_meta and t.dtype is first.dtype and t.is_contiguous() for t in tensors
    )


def _like(x: Tensor, *rest: Any, **kwargs: Any) -> Any:
    if kwargs or not x.is_floating_point() or any(isinstance(value, Tensor) for value in rest):
        return None
    return _alike(x)


def _triangle(x: Tensor, diagonal: int = 0) -> Any:
    return x.new_empty(x.shape) if x.dim() >= 2 else None


def _softmax(x: Tensor, dim: int, other: Any = None) -> Any:
    known = not other and -x.dim() <= dim < x.dim() and _plain(x)
    return _alike(x) if known else None


def _binary(a: Any, b: Any, **kwargs: Any) -> Any:
    if isinstance(b, (int, float)) and isinstance(a, Tensor):
        return _alike(a) if _plain(a) else None
    if not (isinstance(a, Tensor) and isinstance(b, Tensor) and _plain(a, b)):
        return None
    shape = _broadcast(a, b)
    return a.new_empty(shape) if shape is not None else None


def _where(condition: Tensor, a: Tensor, b: Tensor) -> Any:
    shape = _broadcast(condition, a, b)
    fits = shape is not None and a.dtype is b.dtype
    fits = fits and all(t.is_contiguous() for t in (condition, a, b))
    return a.new_empty(shape) if fits else None


def _broadcast(*tensors: Tensor) -> Any:
    """The common shape, if each shape is a suffix of the longest one; else None."""
    longest = max((t.shape for t in tensors), key=len)
    ends = all(not t.shape or longest[-t.dim() :] == t.shape for t in tensors)
    return longest if ends else None


def _mean(x: Tensor, dims: Any, keepdim: bool = False, **kwargs: Any) -> Any:
    if kwargs or not dims or not _plain(x) or any(not -x.dim() <= d < x.dim() for d in dims):
        return None
    gone = {d % x.dim() for d in dims}
    kept = [(1 if d in gone else n) for d, n in enumerate(x.shape) if keepdim or d not in gone]
    return x.new_empty(kept)


def _addmm(bias: Tensor, a: Tensor, b: Tensor, **kwargs: Any) -> Any:
    fits = a.dim() == b.dim() == 2 and a.shape[1] == b.shape[0] and bias.shape == b.shape[1:]
    same = a.dtype is b.dtype is bias.dtype and a.is_meta and b.is_meta
    return a.new_empty((a.shape[0], b.shape[1])) if fits and same and not kwargs else None


def _matrices(a: Tensor, b: Tensor) -> Any:
    fits = a.dim() == b.dim() and a.shape[-1] == b.shape[-2] and a.shape[:-2] == b.shape[:-2]
    return a.new_empty((*a.shape[:-1], b.shape[-1])) if fits and a.dtype is b.dtype else None


def _convolution(
    x: Tensor,
    weight: Tensor,
    bias: Any,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    transposed: bool,
    _: list[int],
    groups: int,
) -> Any:
    known = not transposed and _plain(x, weight) and weight.dim() == x.dim()
    if not known or x.shape[1] != weight.shape[1] * groups:
        return None
    sides = _sides(x.shape[2:], weight.shape[2:], stride, padding, dilation)
    return x.new_empty((x.shape[0], weight.shape[0], *sides)) if min(sides) > 0 else None


def _max_pool(
    x: Tensor,
    kernel: list[int],
    stride: Any = (),
    padding: Any = (0,),
    dilation: Any = (1,),
    ceil_mode: bool = False,
) -> Any:
    if ceil_mode or not _plain(x):
        return None
    sides = _sides(x.shape[-2:], kernel, stride or kernel, padding, dilation)
    if min(sides) <= 0:
        return None
    shape = (*x.shape[:-2], *sides)
    return x.new_empty(shape), x.new_empty(shape, dtype=torch.int64)


def _sides(sides: Any, *window: Any) -> list[int]:
    """The output sides of a sliding window; ``window``: kernel, stride, padding, dilation."""
    count = len(sides)
    kernels, steps, pads, dilations = (list(v) * count if len(v) == 1 else list(v) for v in window)
    return [
        (side + 2 * pad - dilation * (kernel - 1) - 1) // step + 1
        for side, kernel, step, pad, dilation in zip(
            sides, kernels, steps, pads, dilations, strict=True
        )
    ]


def _embedding(weight: Tensor, indices: Tensor, *rest: Any, **kwargs: Any) -> Any:
    fits = weight.dim() == 2 and indices.dtype in (torch.int32, torch.int64)
    return weight.new_empty((*indices.shape, weight.shape[1])) if fits else None


def _layer_norm(x: Tensor, shape: Any, weight: Any, bias: Any, eps: float) -> Any:
    shape, count = tuple(shape), len(shape)
    given = [t for t in (weight, bias) if t is not None]
    if x.shape[-count:] != shape or any(t.shape != shape for t in given) or not _plain(x, *given):
        return None
    stats = x.new_empty((*x.shape[:-count], *(1 for _ in shape)))
    return _alike(x), stats, _alike(stats)


def _batch_norm(x: Tensor, *tensors: Any) -> Any:
    channels = x.shape[1:2]
    given = [t for t in tensors[:4] if t is not None]
    if any(t.shape != channels for t in given) or not _plain(x, *given):
        return None
    return _alike(x), x.new_empty(channels), x.new_empty(channels)


def _group_norm(
    x: Tensor, weight: Any, bias: Any, n: int, c: int, hxw: int, groups: int, eps: float
) -> Any:
    given = [t for t in (weight, bias) if t is not None]
    if any(tuple(t.shape) != (c,) for t in given) or not _plain(x, *given):
        return None
    return _alike(x), x.new_empty((n, groups)), x.new_empty((n, groups))


_SHORTCUTS: dict[str, Shortcut] = {
    "aten::tril": _triangle,
    "aten::triu": _triangle,
    "aten::add.Tensor": _binary,
    "aten::sub.Tensor": _binary,
    "aten::mul.Tensor": _binary,
    "aten::div.Tensor": _binary,
    "aten::where.self": _where,
    "aten::_softmax": _softmax,
    "aten::_safe_softmax": _softmax,
    "aten::_log_softmax": _softmax,
    "aten::mean.dim": _mean,
    "aten::addmm": _addmm,
    "aten::mm": _matrices,
    "aten::bmm": _matrices,
    "aten::convolution": _convolution,
    "aten::max_pool2d_with_indices": _max_pool,
    "aten::embedding": _embedding,
    "aten::native_layer_norm": _layer_norm,
    "aten::native_batch_norm": _batch_norm,
    "aten::native_group_norm": _group_norm,
}
