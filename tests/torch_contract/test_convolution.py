"""torch tells the memory format of a convolution's results from sizes, strides and device."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lateinit._torch import META, as_convolution_lays_out

_FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}
_FORWARD = torch.ops.aten.convolution.default
_BACKWARD = torch.ops.aten.convolution_backward.default


def on_meta(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    return torch.empty_strided(value.size(), value.stride(), dtype=value.dtype, device=META)


def last(tensor: Tensor) -> Tensor:
    """Channels innermost in memory."""
    if tensor.dim() == 3:
        return tensor.transpose(1, 2).contiguous().transpose(1, 2)
    return tensor.contiguous(memory_format=_FORMATS[tensor.dim()])


def long_strides(tensor: Tensor) -> list[int]:
    return [s for n, s in zip(tensor.size(), tensor.stride(), strict=True) if n > 1]


@pytest.mark.parametrize("which", ["data", "neither", "weight"])
@pytest.mark.parametrize("transposed", [False, True], ids=["straight", "transposed"])
@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("batch", [1, 2])
def test_results_lie_in_memory_as_it_tells(
    batch: int, dims: int, transposed: bool, which: str
) -> None:
    """aten/src/ATen/native/Convolution.cpp: the backend of a convolution says its memory format."""
    data, weight = torch.randn(batch, 4, *(7,) * dims), torch.randn(4, 4, *(3,) * dims)
    if which == "data":
        data = last(data)
    if which == "weight":
        weight = last(weight)
    rest = ((1,) * dims, (0,) * dims, (1,) * dims, transposed, (0,) * dims, 1)
    for function, args in (
        (_FORWARD, (data, weight, None, *rest)),
        (
            _BACKWARD,
            (
                _FORWARD(data, weight, None, *rest),
                data,
                weight,
                [4],
                *rest,
                [True, True, True],
            ),
        ),
    ):
        given = tuple(map(on_meta, args))
        told = as_convolution_lays_out(given, function(*given), torch.device("cpu"))
        real = function(*args)
        pairs = [(told, real)] if isinstance(real, Tensor) else zip(told, real, strict=True)
        for ours, theirs in pairs:
            assert long_strides(ours) == long_strides(theirs)
