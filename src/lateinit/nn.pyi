# The types of nn.py, whose classes are made when it is imported. If torch has a lazy version of a
# layer, the type is torch's class, of which the layer is a subclass.

from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import LazyBatchNorm1d as LazyBatchNorm1d
from torch.nn import LazyBatchNorm2d as LazyBatchNorm2d
from torch.nn import LazyBatchNorm3d as LazyBatchNorm3d
from torch.nn import LazyConv1d as LazyConv1d
from torch.nn import LazyConv2d as LazyConv2d
from torch.nn import LazyConv3d as LazyConv3d
from torch.nn import LazyConvTranspose1d as LazyConvTranspose1d
from torch.nn import LazyConvTranspose2d as LazyConvTranspose2d
from torch.nn import LazyConvTranspose3d as LazyConvTranspose3d
from torch.nn import LazyInstanceNorm1d as LazyInstanceNorm1d
from torch.nn import LazyInstanceNorm2d as LazyInstanceNorm2d
from torch.nn import LazyInstanceNorm3d as LazyInstanceNorm3d
from torch.nn import LazyLinear as LazyLinear

from lateinit._lazy import LazyModuleMixin as LazyModuleMixin
from lateinit._lazy import UninitializedBuffer as UninitializedBuffer
from lateinit._lazy import UninitializedParameter as UninitializedParameter

_Device: TypeAlias = torch.device | str | int | None
_Activation: TypeAlias = str | Callable[[Tensor], Tensor]

class LazyAdaptiveLogSoftmaxWithLoss(LazyModuleMixin, nn.AdaptiveLogSoftmaxWithLoss):
    def __init__(
        self,
        n_classes: int,
        cutoffs: Sequence[int],
        div_value: float = 4.0,
        head_bias: bool = False,
        device: _Device = None,
        dtype: torch.dtype | None = None,
    ) -> None: ...

class LazyBilinear(LazyModuleMixin, nn.Bilinear):
    def __init__(
        self,
        out_features: int,
        bias: bool = True,
        device: _Device = None,
        dtype: torch.dtype | None = None,
    ) -> None: ...

class LazyGroupNorm(LazyModuleMixin, nn.GroupNorm):
    def __init__(
        self,
        num_groups: int,
        eps: float = 1e-5,
        affine: bool = True,
        device: _Device = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
    ) -> None: ...

class LazyLayerNorm(LazyModuleMixin, nn.LayerNorm):
    def __init__(
        self,
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
        device: _Device = None,
        dtype: torch.dtype | None = None,
    ) -> None: ...

class LazyRMSNorm(LazyModuleMixin, nn.RMSNorm):
    def __init__(
        self,
        eps: float | None = None,
        elementwise_affine: bool = True,
        device: _Device = None,
        dtype: torch.dtype | None = None,
    ) -> None: ...

class LazySyncBatchNorm(LazyModuleMixin, nn.SyncBatchNorm):
    def __init__(
        self,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        process_group: object = None,
        device: _Device = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
    ) -> None: ...

class LazyPReLU(LazyModuleMixin, nn.PReLU):
    def __init__(
        self, init: float = 0.25, device: _Device = None, dtype: torch.dtype | None = None
    ) -> None: ...

class LazyRNN(LazyModuleMixin, nn.RNN):
    def __init__(
        self,
        hidden_size: int,
        num_layers: int = 1,
        nonlinearity: str = "tanh",
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        device: _Device = None,
        dtype: torch.dtype | None = None,
    ) -> None: ...

class LazyLSTM(LazyModuleMixin, nn.LSTM):
    def __init__(
        self,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        device: _Device = None,
        dtype: torch.dtype | None = None,
    ) -> None: ...

class LazyGRU(LazyModuleMixin, nn.GRU):
    def __init__(
        self,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        device: _Device = None,
        dtype: torch.dtype | None = None,
    ) -> None: ...

class LazyRNNCell(LazyModuleMixin, nn.RNNCell):
    def __init__(
        self,
        hidden_size: int,
        bias: bool = True,
        nonlinearity: str = "tanh",
        device: _Device = None,
        dtype: torch.dtype | None = None,
    ) -> None: ...

class LazyLSTMCell(LazyModuleMixin, nn.LSTMCell):
    def __init__(
        self,
        hidden_size: int,
        bias: bool = True,
        device: _Device = None,
        dtype: torch.dtype | None = None,
    ) -> None: ...

class LazyGRUCell(LazyModuleMixin, nn.GRUCell):
    def __init__(
        self,
        hidden_size: int,
        bias: bool = True,
        device: _Device = None,
        dtype: torch.dtype | None = None,
    ) -> None: ...

class LazyMultiheadAttention(LazyModuleMixin, nn.MultiheadAttention):
    def __init__(
        self,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        batch_first: bool = False,
        device: _Device = None,
        dtype: torch.dtype | None = None,
    ) -> None: ...

class LazyTransformer(LazyModuleMixin, nn.Transformer):
    def __init__(
        self,
        nhead: int = 8,
        num_encoder_layers: int = 6,
        num_decoder_layers: int = 6,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: _Activation = ...,
        custom_encoder: nn.Module | None = None,
        custom_decoder: nn.Module | None = None,
        layer_norm_eps: float = 1e-5,
        batch_first: bool = False,
        norm_first: bool = False,
        bias: bool = True,
        device: _Device = None,
        dtype: torch.dtype | None = None,
    ) -> None: ...

class LazyTransformerDecoderLayer(LazyModuleMixin, nn.TransformerDecoderLayer):
    def __init__(
        self,
        nhead: int,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: _Activation = ...,
        layer_norm_eps: float = 1e-5,
        batch_first: bool = False,
        norm_first: bool = False,
        bias: bool = True,
        device: _Device = None,
        dtype: torch.dtype | None = None,
    ) -> None: ...

class LazyTransformerEncoderLayer(LazyModuleMixin, nn.TransformerEncoderLayer):
    def __init__(
        self,
        nhead: int,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: _Activation = ...,
        layer_norm_eps: float = 1e-5,
        batch_first: bool = False,
        norm_first: bool = False,
        bias: bool = True,
        device: _Device = None,
        dtype: torch.dtype | None = None,
    ) -> None: ...
