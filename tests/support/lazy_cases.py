"""Every lazy layer: how it is declared, what its eager twin is given, and inputs it may meet."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

import lateinit


@dataclass(frozen=True)
class LazyCase:
    """``shapes`` are inputs of one call; ``sizes`` is what they tell."""

    layer: str
    arguments: dict[str, Any]
    sizes: dict[str, Any]
    shapes: tuple[tuple[int, ...], ...]

    def __str__(self) -> str:
        said = ",".join(f"{k}={v}" for k, v in self.arguments.items())
        return f"{self.layer}({said})-{'x'.join(map(str, self.shapes[0]))}"

    @property
    def lazy(self) -> nn.Module:
        return getattr(lateinit.nn, f"Lazy{self.layer}")(**self.arguments)

    @property
    def eager(self) -> nn.Module:
        return getattr(nn, self.layer)(**self.arguments, **self.sizes)

    def inputs(self, device: str = "meta") -> tuple[torch.Tensor, ...]:
        dtype = self.arguments.get("dtype", torch.float32)
        if device == "meta":
            return tuple(torch.empty(s, dtype=dtype, device="meta") for s in self.shapes)
        generator = torch.Generator().manual_seed(1)
        if self.layer == "AdaptiveLogSoftmaxWithLoss":
            return torch.randn(self.shapes[0], generator=generator), torch.zeros(
                4, dtype=torch.long
            )
        return tuple(torch.randn(s, generator=generator).to(dtype) for s in self.shapes)


def _case(
    layer: str, sizes: dict[str, Any], *shapes: tuple[int, ...], **arguments: Any
) -> LazyCase:
    return LazyCase(layer, arguments, sizes, shapes)


def _linear() -> list[LazyCase]:
    size = {"in_features": 3}
    return [
        _case("Linear", size, (2, 3), out_features=5),
        _case("Linear", size, (3,), out_features=5),
        _case("Linear", size, (2, 4, 3), out_features=5, bias=False),
        _case("Linear", size, (2, 3), out_features=5, dtype=torch.bfloat16),
        _case("Linear", size, (2, 3), out_features=5, dtype=torch.float64),
        _case("Bilinear", {"in1_features": 3, "in2_features": 4}, (2, 3), (2, 4), out_features=5),
        _case(
            "Bilinear",
            {"in1_features": 3, "in2_features": 4},
            (3,),
            (4,),
            out_features=5,
            bias=False,
        ),
    ]


def _convolutions() -> list[LazyCase]:
    found = []
    for name in ("Conv", "ConvTranspose"):
        for dims in (1, 2, 3):
            layer, space = f"{name}{dims}d", (6, 5, 4)[:dims]
            common = {"out_channels": 8, "kernel_size": 3}
            found += [
                _case(layer, {"in_channels": 4}, (2, 4, *space), **common),
                _case(layer, {"in_channels": 4}, (4, *space), **common, bias=False),
                _case(layer, {"in_channels": 4}, (2, 4, *space), **common, groups=2),
                _case(layer, {"in_channels": 4}, (2, 4, *space), **common, dtype=torch.float64),
            ]
    found += [
        _case("Conv2d", {"in_channels": 4}, (1, 4, 6, 6), out_channels=8, kernel_size=3, groups=4),
        _case(
            "Conv2d",
            {"in_channels": 4},
            (1, 4, 6, 6),
            out_channels=4,
            kernel_size=(3, 1),
            padding="same",
            padding_mode="reflect",
        ),
    ]
    return found


def _norms() -> list[LazyCase]:
    found = [
        _case("BatchNorm1d", {"num_features": 4}, (3, 4)),
        _case("BatchNorm1d", {"num_features": 4}, (3, 4, 5), affine=False),
        _case("BatchNorm2d", {"num_features": 4}, (3, 4, 5, 5), track_running_stats=False),
        _case("BatchNorm2d", {"num_features": 4}, (3, 4, 5, 5), dtype=torch.float64),
        _case(
            "BatchNorm3d",
            {"num_features": 4},
            (3, 4, 5, 5, 5),
            affine=False,
            track_running_stats=False,
        ),
        _case("SyncBatchNorm", {"num_features": 4}, (3, 4)),
        _case("SyncBatchNorm", {"num_features": 4}, (3, 4, 5, 5), momentum=None),
        _case("SyncBatchNorm", {"num_features": 4}, (3, 4, 5), affine=False),
        _case("GroupNorm", {"num_channels": 6}, (2, 6), num_groups=3),
        _case("GroupNorm", {"num_channels": 6}, (2, 6, 5, 5), num_groups=2, affine=False),
        _case("LayerNorm", {"normalized_shape": 4}, (2, 3, 4)),
        _case("LayerNorm", {"normalized_shape": 4}, (4,), bias=False),
        _case("LayerNorm", {"normalized_shape": 4}, (2, 4), elementwise_affine=False),
        _case("RMSNorm", {"normalized_shape": 4}, (2, 3, 4)),
        _case("PReLU", {"num_parameters": 3}, (2, 3, 4), init=0.5),
        _case("PReLU", {"num_parameters": 1}, (3,)),
    ]
    for dims in (1, 2, 3):
        layer, space = f"InstanceNorm{dims}d", (6, 5, 4)[:dims]
        found += [
            _case(
                layer, {"num_features": 4}, (2, 4, *space), affine=True, track_running_stats=False
            ),
            _case(layer, {"num_features": 4}, (4, *space), affine=True, track_running_stats=True),
            _case(
                layer, {"num_features": 4}, (2, 4, *space), affine=False, track_running_stats=False
            ),
        ]
    return found


def _recurrent() -> list[LazyCase]:
    size = {"input_size": 3}
    found = []
    for layer in ("RNN", "LSTM", "GRU"):
        found += [
            _case(layer, size, (5, 2, 3), hidden_size=4),
            _case(layer, size, (5, 3), hidden_size=4, num_layers=2, bidirectional=True),
            _case(layer, size, (2, 5, 3), hidden_size=4, bias=False, batch_first=True),
            _case(f"{layer}Cell", size, (2, 3), hidden_size=4),
            _case(f"{layer}Cell", size, (3,), hidden_size=4, bias=False),
        ]
    return [*found, _case("LSTM", size, (5, 2, 3), hidden_size=4, proj_size=2)]


def _attention() -> list[LazyCase]:
    same = {"embed_dim": 8, "kdim": 8, "vdim": 8}
    apart = {"embed_dim": 8, "kdim": 6, "vdim": 4}
    return [
        _case("MultiheadAttention", same, (5, 2, 8), (4, 2, 8), (4, 2, 8), num_heads=2),
        _case("MultiheadAttention", same, (5, 8), (4, 8), (4, 8), num_heads=4, bias=False),
        _case("MultiheadAttention", apart, (5, 2, 8), (4, 2, 6), (4, 2, 4), num_heads=2),
        _case(
            "MultiheadAttention",
            same,
            (5, 2, 8),
            (4, 2, 8),
            (4, 2, 8),
            num_heads=2,
            add_bias_kv=True,
        ),
        _case(
            "TransformerEncoderLayer",
            {"d_model": 8},
            (5, 2, 8),
            nhead=2,
            dim_feedforward=16,
            dropout=0.0,
        ),
        _case(
            "TransformerEncoderLayer",
            {"d_model": 8},
            (5, 8),
            nhead=4,
            dim_feedforward=16,
            dropout=0.0,
            bias=False,
            norm_first=True,
            activation="gelu",
        ),
        _case(
            "TransformerDecoderLayer",
            {"d_model": 8},
            (5, 2, 8),
            (4, 2, 8),
            nhead=2,
            dim_feedforward=16,
            dropout=0.0,
        ),
        _case(
            "TransformerDecoderLayer",
            {"d_model": 8},
            (5, 8),
            (4, 8),
            nhead=4,
            dim_feedforward=16,
            dropout=0.0,
            bias=False,
        ),
        _case(
            "Transformer",
            {"d_model": 8},
            (5, 8),
            (4, 8),
            nhead=2,
            batch_first=True,
            num_encoder_layers=2,
            num_decoder_layers=1,
            dim_feedforward=16,
            dropout=0.0,
        ),
        _case(
            "Transformer",
            {"d_model": 8},
            (2, 5, 8),
            (2, 4, 8),
            nhead=2,
            batch_first=True,
            num_encoder_layers=1,
            num_decoder_layers=2,
            dim_feedforward=16,
            dropout=0.0,
        ),
    ]


CASES = [
    *_linear(),
    *_convolutions(),
    *_norms(),
    *_recurrent(),
    *_attention(),
    _case("AdaptiveLogSoftmaxWithLoss", {"in_features": 64}, (4, 64), n_classes=10, cutoffs=[4, 6]),
]
