"""The table of lazy layers: which arguments of a ``torch.nn`` class follow from its input."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn

from lateinit._lazy.lazy_class import lazy_class
from lateinit._lazy.rules import Rule, size


def _layer(cls: type[nn.Module], **rules: Rule) -> type[Any]:
    """The lazy version of a ``torch.nn`` class, importable by name from this module."""
    made = lazy_class(cls, tuple(rules.items()), False)
    made.__module__ = __name__
    return made


def _instance_norm(cls: type[nn.Module], spatial: int) -> type[Any]:
    """A lazy instance norm; torch's lazy ones have other defaults than its plain ones.

    ``torch.nn.LazyInstanceNorm1d`` to ``3d`` inherit their defaults from ``_LazyNormBase``
    (torch/nn/modules/batchnorm.py).
    """
    made = _layer(cls, num_features=size(-1 - spatial, ndim=(spatial + 1, spatial + 2)))
    made._defaults = {"affine": True, "track_running_stats": True}
    signature = inspect.signature(made)
    parameters = [
        p.replace(default=made._defaults.get(n, p.default)) for n, p in signature.parameters.items()
    ]
    made.__signature__ = signature.replace(parameters=parameters)
    return made


def _conv(cls: type[nn.Module], spatial: int) -> type[Any]:
    """A lazy convolution: its channels come before the spatial dims, with or without a batch."""
    return _layer(cls, in_channels=size(-1 - spatial, ndim=(spatial + 1, spatial + 2)))


LazyLinear = _layer(nn.Linear, in_features=size(-1))
LazyBilinear = _layer(nn.Bilinear, in1_features=size(-1, of=0), in2_features=size(-1, of=1))

LazyConv1d = _conv(nn.Conv1d, 1)
LazyConv2d = _conv(nn.Conv2d, 2)
LazyConv3d = _conv(nn.Conv3d, 3)
LazyConvTranspose1d = _conv(nn.ConvTranspose1d, 1)
LazyConvTranspose2d = _conv(nn.ConvTranspose2d, 2)
LazyConvTranspose3d = _conv(nn.ConvTranspose3d, 3)

LazyBatchNorm1d = _layer(nn.BatchNorm1d, num_features=size(1, ndim=(2, 3)))
LazyBatchNorm2d = _layer(nn.BatchNorm2d, num_features=size(1, ndim=4))
LazyBatchNorm3d = _layer(nn.BatchNorm3d, num_features=size(1, ndim=5))
LazySyncBatchNorm = _layer(nn.SyncBatchNorm, num_features=size(1))
LazyInstanceNorm1d = _instance_norm(nn.InstanceNorm1d, 1)
LazyInstanceNorm2d = _instance_norm(nn.InstanceNorm2d, 2)
LazyInstanceNorm3d = _instance_norm(nn.InstanceNorm3d, 3)
LazyGroupNorm = _layer(nn.GroupNorm, num_channels=size(1))
LazyLayerNorm = _layer(nn.LayerNorm, normalized_shape=size(-1))
LazyRMSNorm = _layer(nn.RMSNorm, normalized_shape=size(-1))
LazyPReLU = _layer(nn.PReLU, num_parameters=size(1, default=1))

LazyRNN = _layer(nn.RNN, input_size=size(-1, ndim=(2, 3)))
LazyLSTM = _layer(nn.LSTM, input_size=size(-1, ndim=(2, 3)))
LazyGRU = _layer(nn.GRU, input_size=size(-1, ndim=(2, 3)))
LazyRNNCell = _layer(nn.RNNCell, input_size=size(-1, ndim=(1, 2)))
LazyLSTMCell = _layer(nn.LSTMCell, input_size=size(-1, ndim=(1, 2)))
LazyGRUCell = _layer(nn.GRUCell, input_size=size(-1, ndim=(1, 2)))

LazyMultiheadAttention = _layer(
    nn.MultiheadAttention,
    embed_dim=size(-1, of="query", ndim=(2, 3)),
    kdim=size(-1, of="key", ndim=(2, 3)),
    vdim=size(-1, of="value", ndim=(2, 3)),
)
LazyTransformerEncoderLayer = _layer(
    nn.TransformerEncoderLayer, d_model=size(-1, of="src", ndim=(2, 3))
)
LazyTransformerDecoderLayer = _layer(
    nn.TransformerDecoderLayer, d_model=size(-1, of=("tgt", "memory"), ndim=(2, 3))
)
LazyTransformer = _layer(nn.Transformer, d_model=size(-1, of=("src", "tgt"), ndim=(2, 3)))
LazyAdaptiveLogSoftmaxWithLoss = _layer(nn.AdaptiveLogSoftmaxWithLoss, in_features=size(-1))

LAYERS = tuple(value for name, value in list(globals().items()) if name.startswith("Lazy"))
