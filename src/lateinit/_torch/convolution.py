"""The layout of a convolution's results, which its meta kernel does not know."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lateinit._torch.arguments import flat


def as_convolution_lays_out(args: tuple[Any, ...], result: Any, device: torch.device) -> Any:
    """The meta results of a convolution or of its backward, laid out as on a device.

    torch/_meta_registrations.py: meta_conv leaves results contiguous, since the backend, and with
    it the memory format, follows from the device. torch/_subclasses/fake_impls.py does the same.

    Args:
        args: the arguments of ``aten::convolution``, or of ``aten::convolution_backward``.
        result: the results of the meta kernel.
        device: where the convolution is computed.
    """
    is_forward = isinstance(result, Tensor)
    data, weight, bias, *rest = args if is_forward else args[1:]
    # The pages of these tensors are never touched, so the system maps none: the backend follows
    # from sizes, strides and dtypes.
    data, weight = (_untouched(tensor, device) for tensor in (data, weight))
    sizes = None if is_forward or bias is None else bias
    bias = _untouched(bias, device) if isinstance(bias, Tensor) else None
    names = "stride", "padding", "dilation", "transposed", "output_padding", "groups"
    given = dict(zip(names, rest, strict=False))
    backend = torch._C._select_conv_backend(data, weight, bias=bias, bias_sizes=sizes, **given)
    if weight.dim() == 3:  # aten/src/ATen/native/Convolution.cpp: view4d
        data, weight = data.contiguous().unsqueeze(2), weight.unsqueeze(2)
    layout = torch._C._conv_determine_backend_memory_format(data, weight, backend)
    if is_forward:
        return _in_format(result, layout)
    return tuple(_in_format(leaf, layout) for leaf in flat(result))


def _untouched(tensor: Tensor, device: torch.device) -> Tensor:
    return torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device=device)


def _in_format(tensor: Any, layout: torch.memory_format) -> Any:
    if not isinstance(tensor, Tensor) or tensor.dim() < 3:
        return tensor
    if tensor.dim() == 3:
        return tensor.unsqueeze(2).contiguous(memory_format=layout).squeeze(2)
    return tensor.contiguous(memory_format=layout)
