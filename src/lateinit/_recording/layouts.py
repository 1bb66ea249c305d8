"""The results of an op without its values: their shapes, dtypes and layouts, on ``meta``.

The meta kernel computes them, unless they are small (see ``small_results``). For some ops, marked
in their rows of ``op_table``, its layout differs from that of the real kernel. Then the real kernel
runs on a *twin* of the arguments: small tensors of ones with the same layout. Its results show the
order of the dims in memory.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from lateinit._program import TensorRef
from lateinit._recording.small_results import layouts_of_small
from lateinit._torch import (
    META,
    Args,
    Kwargs,
    OpInfo,
    as_convolution_lays_out,
    by_name,
    flat,
    kwargs_to_meta,
    span_of,
    tensors_in,
    to_meta,
    without_modes,
)

# Sizes up to this one, and numbers that may depend on a size, are the same in a twin.
_KEPT = 16
_COMPLEX_TO_REAL = "aten::_fft_c2r"


class LayoutUnknownError(Exception):
    """Only a run on the values themselves can give the layout of the results."""


def results_on_meta(
    info: OpInfo, args: Args, kwargs: Kwargs, device: torch.device, *, small: bool
) -> Any:
    """The results of an op as meta tensors, with the layout of its real kernel.

    Args:
        info: the op.
        args: its positional arguments.
        kwargs: its keyword arguments.
        device: the device on which the op will be computed.
        small: whether the real kernel may be used for small results: all tensors are on the CPU.

    Raises:
        LayoutUnknownError: only a run on the values can give the layout.
        Exception: the meta kernel refuses the call, or there is none.
    """
    result = layouts_of_small(info, args, kwargs) if small else None
    if result is None:
        result = info.func(*to_meta(args), **kwargs_to_meta(info, kwargs))
        if info.layout is not None:
            result = as_kernel_lays_out(info, args, kwargs, result, device)
    return result


def as_kernel_lays_out(
    info: OpInfo, args: Args, kwargs: Kwargs, result: Any, device: torch.device
) -> Any:
    """The results of a meta kernel, with the layout of the real kernel of a device.

    Args:
        info: the op, whose row has a ``layout``.
        args: its positional arguments.
        kwargs: its keyword arguments.
        result: the results of the meta kernel.
        device: the device on which the op will be computed.

    Raises:
        LayoutUnknownError: the kernel cannot run on a twin.
    """
    if info.layout == "values":
        raise LayoutUnknownError
    given = tensors_in(args, kwargs)
    permuted = any(not t.is_contiguous() for t in given)
    if (info.layout == "asked if permuted" and not permuted) or not _is_there(device):
        return result
    with without_modes():
        if info.layout == "convolution":
            return as_convolution_lays_out(args, result, device)
        sizes = _sizes_of_twin(info, args, kwargs, given)
        twin = _described(_halved(info, args, sizes), sizes), _described(kwargs, sizes)
        found = _answered(info.name, *twin, device)
        leaves = flat(result)
        if found is None or len(found) != len(leaves):
            raise LayoutUnknownError
        laid = [_laid_out(*pair, sizes) for pair in zip(leaves, found, strict=True)]
    return laid[0] if isinstance(result, Tensor) else type(result)(laid)


def _is_there(device: torch.device) -> bool:
    return device.type == "cpu" or torch.get_device_module(device.type).is_available()


# -- the twin --------------------------------------------------------------------------------------


def _sizes_of_twin(info: OpInfo, args: Args, kwargs: Kwargs, given: list[Tensor]) -> dict[int, int]:
    """The size in the twin of each size that is not kept: small, and in the same order."""
    numbers = args[:3] if info.name == _COMPLEX_TO_REAL and _is_half(args) else args
    if any(n > _KEPT for n in _integers((*numbers, *kwargs.values()))):
        return {}  # a number may depend on a size
    if any(_overlaps(tensor) for tensor in given):
        return {}
    large = sorted({n for tensor in given for n in tensor.size() if n > _KEPT})
    return {n: _KEPT + 1 + rank for rank, n in enumerate(large)}


def _integers(value: Any) -> Iterable[int]:
    if isinstance(value, (list, tuple)):
        return [n for item in value for n in _integers(item)]
    return [value] if type(value) is int else []


def _is_half(args: Args) -> bool:
    """Whether a real FFT's last size follows from the last size of the complex tensor."""
    data, dims, _, last = args
    return bool(data.size(dims[-1]) == last // 2 + 1)


def _halved(info: OpInfo, args: Args, sizes: dict[int, int]) -> Args:
    """The arguments, with the last size of a real FFT that belongs to the twin."""
    if info.name != _COMPLEX_TO_REAL or not sizes:
        return args
    data, dims, normalisation, last = args
    half = data.size(dims[-1])
    return data, dims, normalisation, 2 * (sizes.get(half, half) - 1) + last % 2


def _in_memory(size: Iterable[int], stride: Iterable[int]) -> list[int]:
    """The dims in their order in memory, the innermost first."""
    # Among dims with equal strides, dims of length one are inside the others.
    order = sorted((s, n, d) for d, (n, s) in enumerate(zip(size, stride, strict=True)))
    return [d for _, _, d in order]


def _overlaps(tensor: Tensor) -> bool:
    """Whether elements of a tensor share memory other than in expanded dims."""
    span = 1
    for d in _in_memory(tensor.size(), tensor.stride()):
        if tensor.stride(d):
            if tensor.stride(d) < span:
                return True
            span = tensor.stride(d) * max(tensor.size(d), 1)
    return False


def _described(value: Any, sizes: dict[int, int]) -> Any:
    """An argument in the twin, hashable."""
    if isinstance(value, Tensor):
        return _scaled(value, sizes)
    if isinstance(value, (list, tuple)):
        return tuple(_described(item, sizes) for item in value)
    if isinstance(value, dict):
        named = ((k, _described(v, sizes)) for k, v in value.items() if k != "generator")
        return tuple(named)
    return None if isinstance(value, torch.Generator) else value


def _window(tensor: Tensor) -> TensorRef:
    return TensorRef.of(tensor, 0)._replace(offset=0)


def _scaled(tensor: Tensor, sizes: dict[int, int]) -> TensorRef:
    if not sizes:
        return _window(tensor)
    size = tuple(sizes.get(n, n) for n in tensor.size())
    stride = [0] * len(size)
    span, scaled = 1, 1  # the memory of the inner dims, in the original and in the twin
    for d in _in_memory(tensor.size(), tensor.stride()):
        if tensor.stride(d):
            stride[d] = scaled * (2 if tensor.stride(d) > span else 1)  # a gap stays a gap
            span = tensor.stride(d) * max(tensor.size(d), 1)
            scaled = stride[d] * max(size[d], 1)
    return _window(tensor)._replace(size=size, stride=tuple(stride))


# -- the answer ------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=1024)
def _answered(
    name: str, args: Any, kwargs: Any, device: torch.device
) -> list[tuple[TensorRef, TensorRef] | None] | None:
    """The layouts of an op's results for a twin: the kernel's, and the meta kernel's."""
    info = by_name(name)
    state = torch.default_generator.get_state()
    try:
        # Ones suit nearly all kernels; zeros are always valid indices.
        for value in (1, 0):
            with contextlib.suppress(Exception):  # a kernel may raise any class
                on_meta = flat(_called(info, args, kwargs, META, value))
                real = flat(_called(info, args, kwargs, device, value))
                pairs = zip(real, on_meta, strict=True)
                return [
                    (_window(r), _window(m)) if isinstance(r, Tensor) else None for r, m in pairs
                ]
    finally:
        torch.default_generator.set_state(state)
    return None


def _filled(ref: TensorRef, device: torch.device, value: int) -> Tensor:
    """A tensor of this layout whose elements are all the same."""
    span = span_of(ref.size, ref.stride) if ref.numel else 0
    return ref.on(torch.full((span,), value, dtype=ref.dtype, device=device).untyped_storage())


def _called(info: OpInfo, args: Any, kwargs: Any, device: torch.device, value: int) -> Any:
    """Call an op with the tensors of a twin."""

    def made(item: Any) -> Any:
        if type(item) is TensorRef:
            return _filled(item, device, value)
        return [made(part) for part in item] if type(item) is tuple else item

    given = {key: made(item) for key, item in kwargs}
    if device == META:
        given = kwargs_to_meta(info, given)
    return info.func(*map(made, args), **given)


def _laid_out(leaf: Any, found: tuple[TensorRef, TensorRef] | None, sizes: dict[int, int]) -> Any:
    """A result of the meta kernel, laid out as the kernel's result in the twin."""
    if not isinstance(leaf, Tensor):
        return leaf
    if found is None:  # then the result is no tensor: gradients may be undefined
        return None
    real, on_meta = found
    size, stride = real.size, real.stride
    if sizes:
        if not real.is_dense():
            if real != on_meta or leaf.is_contiguous():
                raise LayoutUnknownError
            return leaf
        size = tuple(leaf.size()) if size == on_meta.size else _unscaled(size, sizes)
        stride = _dense(size, _in_memory(real.size, stride))
    return torch.empty_strided(size, stride, dtype=real.dtype, device=META)


def _unscaled(size: tuple[int, ...], sizes: dict[int, int]) -> tuple[int, ...]:
    large = {scaled: n for n, scaled in sizes.items()}
    if any(n > _KEPT and n not in large for n in size):
        raise LayoutUnknownError
    return tuple(large.get(n, n) for n in size)


def _dense(size: tuple[int, ...], order: list[int]) -> tuple[int, ...]:
    stride, span = [1] * len(size), 1
    for d in order:
        stride[d], span = span, span * max(size[d], 1)
    return tuple(stride)
