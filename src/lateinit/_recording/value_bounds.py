"""Answer reads of random tensors by interval arithmetic, if that makes the answer certain.

Initialisers that reject draws ask ``mask.any()`` of the mask of rejected draws, as
torch/nn/init.py: trunc_normal_ does from 2.13 on. With bounds many standard deviations out the
answer is False for all draws: a Box-Muller normal of a 53-bit uniform stays within
sqrt(-2 ln 2**-53) = 8.58 standard deviations, and a normal of a 24-bit uniform within 5.77.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from lateinit._program import Program, TensorRef
from lateinit._rng import BOUNDED_DTYPES, FARTHEST
from lateinit._torch import NORMAL

Interval = tuple[float, float]
_UNKNOWN: Interval = (-math.inf, math.inf)


def certain_value(program: Program, ref: TensorRef) -> bool | None:
    """The value of a one-element boolean tensor, if it follows from bounds alone."""
    if ref.dtype is not torch.bool:
        return None
    # Depth 8 bounds the walk; ``mask.any()`` of two comparisons is four ops deep.
    low, high = _interval(program, ref, len(program.ops), depth=8)
    return bool(low) if low == high else None


def _interval(program: Program, ref: Any, before: int, depth: int) -> Interval:
    """An interval that contains every element of a tensor as it is before op ``before``.

    For booleans, False is 0 and True is 1.
    """
    if isinstance(ref, (int, float)):
        return float(ref), float(ref)
    if type(ref) is not TensorRef or depth == 0:
        return _UNKNOWN
    number = next((n for n in reversed(program.writers(ref.storage)) if n < before), None)
    if number is None:
        return _UNKNOWN
    op = program.ops[number]
    rule = _RULES.get(op.name)
    written = next(iter(op.written()), None)
    if rule is None or written is None or written.dtype != ref.dtype:
        return _UNKNOWN
    if not program.covers(written):
        return _UNKNOWN
    if op.name == "aten::any" and 0 in op.args[0].size:
        return 0.0, 0.0
    if op.name == NORMAL:
        return _normal(written, *op.args[1:])
    return rule(*(_interval(program, arg, number, depth - 1) for arg in op.args))


def _normal(ref: TensorRef, mean: float = 0.0, std: float = 1.0) -> Interval:
    if ref.dtype not in BOUNDED_DTYPES:
        return _UNKNOWN
    return mean - FARTHEST * std, mean + FARTHEST * std


def _less(a: Interval, b: Interval) -> Interval:
    return float(a[1] < b[0]), float(a[0] < b[1])


def _either(a: Interval, b: Interval) -> Interval:
    return max(a[0], b[0]), max(a[1], b[1])


_RULES: dict[str, Callable[..., Interval]] = {
    NORMAL: _normal,
    "aten::lt.Scalar": _less,
    "aten::gt.Scalar": lambda a, b: _less(b, a),
    "aten::bitwise_or.Tensor": _either,
    "aten::logical_or": _either,
    "aten::any": lambda a: a,  # certain if all elements are equal
}
