"""Modules whose sizes are not known yet: declare them, infer their shapes, initialise them.

The room gives users ``infer_shapes``, ``lazy``, ``size``, the lazy layers, the mixins and the
placeholders; it gives ``_checkpoint`` the sizes that follow from a checkpoint
(``checkpoint_sizes``) and stand-ins for a model's tensors (``borrowed_model``), and ``_report`` a
forward pass to observe. It may import ``_recording`` and the rooms below it, but not
``_materialize``, its neighbour. Start
with ``lazy_class.py`` for how a lazy module is declared and initialised, and with ``infer.py`` for
a forward pass on shapes.
"""

from lateinit._lazy.borrowed_model import Lending, dressed, on_meta
from lateinit._lazy.checkpoint_sizes import NOT_ADOPTED, sizes_in
from lateinit._lazy.infer import infer_shapes, observe_forward
from lateinit._lazy.layers import (
    LazyAdaptiveLogSoftmaxWithLoss,
    LazyBatchNorm1d,
    LazyBatchNorm2d,
    LazyBatchNorm3d,
    LazyBilinear,
    LazyConv1d,
    LazyConv2d,
    LazyConv3d,
    LazyConvTranspose1d,
    LazyConvTranspose2d,
    LazyConvTranspose3d,
    LazyGroupNorm,
    LazyGRU,
    LazyGRUCell,
    LazyInstanceNorm1d,
    LazyInstanceNorm2d,
    LazyInstanceNorm3d,
    LazyLayerNorm,
    LazyLinear,
    LazyLSTM,
    LazyLSTMCell,
    LazyMultiheadAttention,
    LazyPReLU,
    LazyRMSNorm,
    LazyRNN,
    LazyRNNCell,
    LazySyncBatchNorm,
    LazyTransformer,
    LazyTransformerDecoderLayer,
    LazyTransformerEncoderLayer,
)
from lateinit._lazy.lazy_class import lazy
from lateinit._lazy.mixin import LazyModuleMixin, named_tensors
from lateinit._lazy.placeholders import (
    UninitializedBuffer,
    UninitializedParameter,
    known_shape,
    show,
)
from lateinit._lazy.random_state import discard, settle_rng
from lateinit._lazy.rules import size

__all__ = [
    "NOT_ADOPTED",
    "LazyAdaptiveLogSoftmaxWithLoss",
    "LazyBatchNorm1d",
    "LazyBatchNorm2d",
    "LazyBatchNorm3d",
    "LazyBilinear",
    "LazyConv1d",
    "LazyConv2d",
    "LazyConv3d",
    "LazyConvTranspose1d",
    "LazyConvTranspose2d",
    "LazyConvTranspose3d",
    "LazyGRU",
    "LazyGRUCell",
    "LazyGroupNorm",
    "LazyInstanceNorm1d",
    "LazyInstanceNorm2d",
    "LazyInstanceNorm3d",
    "LazyLSTM",
    "LazyLSTMCell",
    "LazyLayerNorm",
    "LazyLinear",
    "LazyModuleMixin",
    "LazyMultiheadAttention",
    "LazyPReLU",
    "LazyRMSNorm",
    "LazyRNN",
    "LazyRNNCell",
    "LazySyncBatchNorm",
    "LazyTransformer",
    "LazyTransformerDecoderLayer",
    "LazyTransformerEncoderLayer",
    "Lending",
    "UninitializedBuffer",
    "UninitializedParameter",
    "discard",
    "dressed",
    "infer_shapes",
    "known_shape",
    "lazy",
    "named_tensors",
    "observe_forward",
    "on_meta",
    "settle_rng",
    "show",
    "size",
    "sizes_in",
]
