"""The lazy layers and the mixin of ``pytorch_pfn_extras``, with the same names and arguments.

``LazyLinear(None, 10)`` infers ``in_features``; ``LazyLinear(5, 10)`` is an ordinary layer. They
differ from the originals in three ways: they draw the eager twin's values, they report the known
parts of their shapes, and they keep their parameter objects, so that an optimizer may be built
before the first forward pass.
"""

from lateinit._lazy.pfn_layers import (
    LazyBatchNorm1d,
    LazyBatchNorm2d,
    LazyBatchNorm3d,
    LazyConv1d,
    LazyConv2d,
    LazyConv3d,
    LazyInitializationMixin,
    LazyLinear,
    UninitializedParameter,
)

__all__ = [
    "LazyBatchNorm1d",
    "LazyBatchNorm2d",
    "LazyBatchNorm3d",
    "LazyConv1d",
    "LazyConv2d",
    "LazyConv3d",
    "LazyInitializationMixin",
    "LazyLinear",
    "UninitializedParameter",
]
