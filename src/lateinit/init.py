"""Initialisers as data, for ``init=``: the functions of ``torch.nn.init`` with their arguments.

Each function returns an ``Initialiser``, which can be printed, compared, pickled, and called with a
tensor, which it initialises in place. Arguments, defaults and formulas are torch's. An argument of
a wrong kind raises when a tensor is initialised, as in torch.
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
    """``torch.nn.init.constant_``: every element is ``val``.

    Args:
        val: the value.

    Example:
        >>> lateinit.init.constant(0.5)(torch.empty(2))
        tensor([0.5000, 0.5000])
    """
    return initialiser("constant", val)


def dirac(groups: int = 1) -> Initialiser:
    """``torch.nn.init.dirac_``: the identity for convolution weights of 3 to 5 dims.

    Args:
        groups: the groups of the convolution, each of which becomes the identity.

    Example:
        >>> lateinit.init.dirac()(torch.empty(1, 1, 3))
        tensor([[[0., 1., 0.]]])
    """
    return initialiser("dirac", groups)


def eye() -> Initialiser:
    """``torch.nn.init.eye_``: the identity matrix, for tensors of two dims.

    Example:
        >>> lateinit.init.eye()(torch.empty(2, 2))
        tensor([[1., 0.],
                [0., 1.]])
    """
    return initialiser("eye")


def kaiming_normal(
    a: float = 0.0, mode: _Fan = "fan_in", nonlinearity: str = "leaky_relu"
) -> Initialiser:
    """``torch.nn.init.kaiming_normal_`` (He et al., 2015): normal values of mean 0.

    Args:
        a: the negative slope of a leaky ReLU.
        mode: whether to scale by the inputs or the outputs of an element of the result.
        nonlinearity: the function that follows, as for ``torch.nn.init.calculate_gain``.

    Example:
        >>> lateinit.init.kaiming_normal(nonlinearity="relu")
        kaiming_normal(nonlinearity='relu')
    """
    return initialiser("kaiming_normal", a, mode, nonlinearity)


def kaiming_uniform(
    a: float = 0.0, mode: _Fan = "fan_in", nonlinearity: str = "leaky_relu"
) -> Initialiser:
    """``torch.nn.init.kaiming_uniform_`` (He et al., 2015): uniform values around 0.

    Args:
        a: the negative slope of a leaky ReLU.
        mode: whether to scale by the inputs or the outputs of an element of the result.
        nonlinearity: the function that follows, as for ``torch.nn.init.calculate_gain``.

    Example:
        >>> lateinit.init.kaiming_uniform(mode="fan_out")
        kaiming_uniform(mode='fan_out')
    """
    return initialiser("kaiming_uniform", a, mode, nonlinearity)


def normal(mean: float = 0.0, std: float = 1.0) -> Initialiser:
    """``torch.nn.init.normal_``: normal values.

    Args:
        mean: the mean.
        std: the standard deviation.

    Example:
        >>> lateinit.init.normal(std=0.02)
        normal(std=0.02)
    """
    return initialiser("normal", mean, std)


def ones() -> Initialiser:
    """``torch.nn.init.ones_``: every element is 1.

    Example:
        >>> lateinit.init.ones()(torch.empty(2))
        tensor([1., 1.])
    """
    return initialiser("ones")


def orthogonal(gain: float = 1) -> Initialiser:
    """``torch.nn.init.orthogonal_`` (Saxe et al., 2013): orthogonal rows or columns.

    For tensors of two or more dims; all dims but the first count as columns.

    Args:
        gain: the norm of each row or column.

    Example:
        >>> lateinit.init.orthogonal(gain=2.0)
        orthogonal(gain=2.0)
    """
    return initialiser("orthogonal", gain)


def sparse(sparsity: float, std: float = 0.01) -> Initialiser:
    """``torch.nn.init.sparse_`` (Martens, 2010), for tensors of two dims.

    Args:
        sparsity: the share of the elements of each column that are zero.
        std: the standard deviation of the others.

    Example:
        >>> lateinit.init.sparse(0.9)
        sparse(sparsity=0.9)
    """
    return initialiser("sparse", sparsity, std)


def trunc_normal(
    mean: float = 0.0, std: float = 1.0, a: float = -2.0, b: float = 2.0
) -> Initialiser:
    """``torch.nn.init.trunc_normal_``: normal values, truncated to ``a`` to ``b``.

    Args:
        mean: the mean before truncation.
        std: the standard deviation before truncation.
        a: the least value, not in standard deviations.
        b: the greatest value.

    Example:
        >>> lateinit.init.trunc_normal(std=0.02, a=-0.06, b=0.06)
        trunc_normal(std=0.02, a=-0.06, b=0.06)
    """
    return initialiser("trunc_normal", mean, std, a, b)


def uniform(a: float = 0.0, b: float = 1.0) -> Initialiser:
    """``torch.nn.init.uniform_``: uniform values from ``a`` to ``b``.

    Args:
        a: the lower bound.
        b: the upper bound.

    Example:
        >>> lateinit.init.uniform(-0.1, 0.1)
        uniform(a=-0.1, b=0.1)
    """
    return initialiser("uniform", a, b)


def xavier_normal(gain: float = 1.0) -> Initialiser:
    """``torch.nn.init.xavier_normal_`` (Glorot and Bengio, 2010): normal values of mean 0.

    Args:
        gain: a factor of the standard deviation.

    Example:
        >>> lateinit.init.xavier_normal(gain=2.0)
        xavier_normal(gain=2.0)
    """
    return initialiser("xavier_normal", gain)


def xavier_uniform(gain: float = 1.0) -> Initialiser:
    """``torch.nn.init.xavier_uniform_`` (Glorot and Bengio, 2010): uniform values around 0.

    Args:
        gain: a factor of the bounds.

    Example:
        >>> lateinit.init.xavier_uniform(gain=2.0)
        xavier_uniform(gain=2.0)
    """
    return initialiser("xavier_uniform", gain)


def zeros() -> Initialiser:
    """``torch.nn.init.zeros_``: every element is 0.

    Example:
        >>> lateinit.init.zeros()(torch.empty(2))
        tensor([0., 0.])
    """
    return initialiser("zeros")
