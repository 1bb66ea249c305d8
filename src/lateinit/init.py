"""Initialisers as data, for ``init=``: the functions of ``torch.nn.init`` with their arguments.

Each can be printed, compared, pickled, and called with a tensor, which it initialises in place.
"""

from __future__ import annotations

from typing import Literal

from lateinit._tensors import Initialiser, initialiser

__all__ = [
    "Initialiser",
    "constant",
    "dirac",
    "eye",
    "kaiming_normal",
    "kaiming_uniform",
    "normal",
    "ones",
    "orthogonal",
    "sparse",
    "trunc_normal",
    "uniform",
    "xavier_normal",
    "xavier_uniform",
    "zeros",
]

_Fan = Literal["fan_in", "fan_out"]


def constant(val: float) -> Initialiser:
    """``torch.nn.init.constant_``: every element is ``val``."""
    return initialiser("constant", val)


def dirac(groups: int = 1) -> Initialiser:
    """``torch.nn.init.dirac_``: the identity for convolution weights of 3 to 5 dims."""
    return initialiser("dirac", groups)


def eye() -> Initialiser:
    """``torch.nn.init.eye_``: the identity matrix, for tensors of two dims."""
    return initialiser("eye")


def kaiming_normal(
    a: float = 0.0, mode: _Fan = "fan_in", nonlinearity: str = "leaky_relu"
) -> Initialiser:
    """``torch.nn.init.kaiming_normal_`` (He et al., 2015)."""
    return initialiser("kaiming_normal", a, mode, nonlinearity)


def kaiming_uniform(
    a: float = 0.0, mode: _Fan = "fan_in", nonlinearity: str = "leaky_relu"
) -> Initialiser:
    """``torch.nn.init.kaiming_uniform_`` (He et al., 2015)."""
    return initialiser("kaiming_uniform", a, mode, nonlinearity)


def normal(mean: float = 0.0, std: float = 1.0) -> Initialiser:
    """``torch.nn.init.normal_``.

    Example:
        >>> lateinit.init.normal(std=0.02)
        normal(std=0.02)
    """
    return initialiser("normal", mean, std)


def ones() -> Initialiser:
    """``torch.nn.init.ones_``."""
    return initialiser("ones")


def orthogonal(gain: float = 1) -> Initialiser:
    """``torch.nn.init.orthogonal_`` (Saxe et al., 2013)."""
    return initialiser("orthogonal", gain)


def sparse(sparsity: float, std: float = 0.01) -> Initialiser:
    """``torch.nn.init.sparse_`` (Martens, 2010), for tensors of two dims."""
    return initialiser("sparse", sparsity, std)


def trunc_normal(
    mean: float = 0.0, std: float = 1.0, a: float = -2.0, b: float = 2.0
) -> Initialiser:
    """``torch.nn.init.trunc_normal_``: normal values, truncated to ``a`` to ``b``."""
    return initialiser("trunc_normal", mean, std, a, b)


def uniform(a: float = 0.0, b: float = 1.0) -> Initialiser:
    """``torch.nn.init.uniform_``: uniform values from ``a`` to ``b``."""
    return initialiser("uniform", a, b)


def xavier_normal(gain: float = 1.0) -> Initialiser:
    """``torch.nn.init.xavier_normal_`` (Glorot and Bengio, 2010)."""
    return initialiser("xavier_normal", gain)


def xavier_uniform(gain: float = 1.0) -> Initialiser:
    """``torch.nn.init.xavier_uniform_`` (Glorot and Bengio, 2010)."""
    return initialiser("xavier_uniform", gain)


def zeros() -> Initialiser:
    """``torch.nn.init.zeros_``."""
    return initialiser("zeros")
