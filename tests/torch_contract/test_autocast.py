"""What ``_torch.autocast`` relies on in torch's autocast."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lateinit._torch import (
    as_autocast_casts,
    autocast_heard,
    below_autocast,
    generation_of_cache,
    is_cast_once,
    without_modes,
)

BF16 = torch.bfloat16


def test_autocast_is_heard_on_composite_ops_with_a_graph_to_come() -> None:
    """aten/src/ATen/autocast_mode.cpp registers kernels for matmul and not for mv."""
    heard: list[str] = []

    def hear(op, args, kwargs):
        heard.append(op.name())
        return NotImplemented

    w = torch.ones(3, 3, device="meta", requires_grad=True)
    with torch.autocast("cpu", dtype=BF16):
        with autocast_heard(hear):
            assert (w @ w[0]).requires_grad
            w.exp()
        with autocast_heard(hear), below_autocast():
            w @ w[0]
            assert not torch.is_autocast_enabled("cpu")
        w @ w[0]
    with autocast_heard(hear):
        w @ w[0]
    assert heard == ["aten::matmul"]


@pytest.mark.parametrize(
    ("op", "given", "expected"),
    [
        (torch.ops.aten.mm.default, (torch.float32, BF16), [BF16, BF16]),
        (torch.ops.aten.mse_loss.default, (BF16, BF16), [torch.float32] * 2),
        (torch.ops.aten.mm.default, (torch.float64, torch.float64), [torch.float64] * 2),
        (torch.ops.aten.prod.default, (BF16,), [torch.float32]),
    ],
)
def test_autocast_casts_before_it_looks_at_shapes(op, given, expected) -> None:
    """autocast_mode.h: WrapFunction_ casts and calls the op by the dispatcher again."""
    with torch.autocast("cpu", dtype=BF16), autocast_heard(lambda *_: NotImplemented):
        chosen, args, _ = as_autocast_casts(op, tuple(torch.empty(0, dtype=d) for d in given), {})
    assert chosen is op
    assert [arg.dtype for arg in args] == expected


def test_a_cast_is_kept_until_the_cache_is_cleared() -> None:
    """torch/amp/autocast_mode.py: __exit__ clears the cache at the end of the outermost one."""
    with torch.autocast("cpu", dtype=BF16):
        first = generation_of_cache("cpu")
        with torch.autocast("cpu", dtype=torch.float16), torch.no_grad(), torch.inference_mode():
            assert generation_of_cache("cpu") is first
        with without_modes():
            assert generation_of_cache("cpu") is first
        torch.clear_autocast_cache()
        second = generation_of_cache("cpu")
        assert second is not first
    with torch.autocast("cpu", dtype=BF16):
        assert generation_of_cache("cpu") is not second


def test_casts_are_kept_of_weights_alone() -> None:
    """autocast_mode.cpp: cached_cast."""
    weight = nn.Parameter(torch.ones(2))
    with torch.autocast("cpu", dtype=BF16):
        assert is_cast_once(weight, "cpu", BF16)
        assert not is_cast_once(weight, "cpu", torch.float16)
        assert not is_cast_once(weight[:1], "cpu", BF16)
        assert not is_cast_once(weight.detach(), "cpu", BF16)
        assert not is_cast_once(weight.bfloat16().detach().requires_grad_(), "cpu", BF16)
    with torch.autocast("cpu", dtype=BF16, cache_enabled=False):
        assert not is_cast_once(weight, "cpu", BF16)
