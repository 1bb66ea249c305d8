"""The exact difference of the values of two tensors, of any dtypes.

Elements of one dtype differ if their bits differ. Elements of different dtypes differ if the
numbers differ: each number is written as the sum of two float64, which can hold every number of
every dtype.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lateinit._lazy import show
from lateinit._torch import in_a_row

# Elements that are compared at a time. Bounds memory, and keeps the float64 copies in the cache:
# measured, four times as many took twice as long.
CHUNK = 1 << 18
_HALF = 2.0**32
_LONG = (torch.int64, torch.uint64)
# The integer dtype as wide as an element: equal integers mean equal bits.
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(slots=True)
class ValueDifference:
    """The elements of two tensors that differ.

    Attributes:
        elements: the number of elements of each tensor.
        different: the number of elements that differ.
        one_nan: the number of these that are NaN in only one of the two.
        absolute: the largest absolute difference of two numbers.
        relative: the largest difference relative to the larger of the two magnitudes.
        at: the index of the largest absolute difference, or else of the first element that differs;
            None if that is in another tensor, or torch cannot make a number of the dtype.
        left: the left value at that index.
        right: the right value at that index.
    """

    elements: int = 0
    different: int = 0
    one_nan: int = 0
    absolute: float = 0.0
    relative: float = 0.0
    at: tuple[int, ...] | None = None
    left: Any = None
    right: Any = None

    def add(self, left: Tensor, right: Tensor, offsets: Sequence[int]) -> None:
        """Compare two blocks of the same shape, which start at ``offsets`` in their tensors."""
        shape = tuple(left.shape)
        left, right = in_a_row(left), in_a_row(right)
        self.elements += left.numel()
        wrong = _different(left, right)
        if wrong is None:
            return
        places = wrong.nonzero().view(-1)
        first = not self.different
        self.different += len(places)
        if not _are_numbers(left.dtype):
            self.absolute = self.relative = math.nan
            return
        left, right = left[places], right[places]
        distance, relative, one_nan = _distances(left, right)
        self.one_nan += one_nan
        number = int(distance.argmax())
        largest = max(0.0, float(distance[number]))
        self.relative = max(self.relative, math.inf if math.isinf(largest) else relative)
        if first or largest > self.absolute:
            self.absolute = largest
            inside = _unravelled(int(places[number]), shape)
            self.at = tuple(o + i for o, i in zip(offsets, inside, strict=True))
            self.left, self.right = left[number].item(), right[number].item()

    def __add__(self, other: ValueDifference) -> ValueDifference:
        """Both, as if they were of one tensor."""
        return ValueDifference(
            self.elements + other.elements,
            self.different + other.different,
            self.one_nan + other.one_nan,
            max(self.absolute, other.absolute),
            max(self.relative, other.relative),
        )

    def __str__(self) -> str:
        nan = f", {self.one_nan:,} of them NaN on one side" if self.one_nan else ""
        most = f"by {self.absolute:.3g} at most (relative {self.relative:.3g})"
        at = "" if self.at is None else f"; at {show(self.at)}: {self.left!r}, {self.right!r}"
        return f"{self.different:,} of {self.elements:,} elements differ{nan}, {most}{at}"

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain data; numbers that JSON lacks are strings."""
        return {
            "elements": self.elements,
            "different": self.different,
            "nan_on_one_side": self.one_nan,
            "largest_absolute": _for_json(self.absolute),
            "largest_relative": _for_json(self.relative),
            "at": self.at and list(self.at),
            "a": _for_json(self.left),
            "b": _for_json(self.right),
        }


@functools.cache
def _are_numbers(dtype: torch.dtype) -> bool:
    """Whether torch can convert a dtype to numbers, which it cannot for types of 1 to 7 bits."""
    try:
        torch.empty(1, dtype=dtype, device="cpu").to(
            torch.float64 if not dtype.is_complex else dtype
        )
    except (NotImplementedError, RuntimeError):
        return False
    return True


def comparable(left: torch.dtype, right: torch.dtype) -> bool:
    """Whether values of these dtypes can be compared."""
    return left == right or (_are_numbers(left) and _are_numbers(right))


def _different(left: Tensor, right: Tensor) -> Tensor | None:
    """Mask of the elements that differ between two flat tensors; None if none differ."""
    if left.dtype != right.dtype:
        same = _same(left, right)
        return None if same.all() else ~same.all(1)
    wide = _BITS.get(left.element_size(), torch.int64)
    ours, theirs = left.view(wide), right.view(wide)
    if torch.equal(ours, theirs):
        return None
    return (ours != theirs).view(left.numel(), -1).any(1)


def _same(left: Tensor, right: Tensor) -> Tensor:
    """Mask of the numbers that are equal in two flat tensors, in the columns of ``_parts``."""
    parts = _parts(left, right)
    ours, theirs = parts[0]
    nans = ours.isnan() & theirs.isnan()
    if not _is_integer(left) and not _is_integer(right):
        return nans.logical_or_(ours.view(torch.int64) == theirs.view(torch.int64))  # signs of zero
    return nans.logical_or_(_all([a == b for a, b in parts]))


def _distances(left: Tensor, right: Tensor) -> tuple[Tensor, float, int]:
    """The distances of elements that differ, the largest relative one, and the one-sided NaNs.

    Relative means relative to the larger magnitude. The distance from a NaN is less than zero.
    """
    parts = _parts(left, right)
    ours, theirs = parts[0]
    one_nan = int((ours.isnan() ^ theirs.isnan()).any(1).sum())
    apart = sum((a - b for a, b in parts[1:]), start=ours - theirs)
    if apart.shape[1] > 1:  # one part of a complex number may be the same infinity
        apart = apart.masked_fill(ours == theirs, 0.0)
    distance = _size(apart).nan_to_num_(-1.0, math.inf)
    larger = torch.maximum(
        *(_size(functools.reduce(torch.add, side)) for side in zip(*parts, strict=True))
    )
    relative = distance / larger
    return distance, max(0.0, float(relative.nan_to_num_(0.0, math.inf).max())), one_nan


def _parts(left: Tensor, right: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Both tensors as float64 parts whose sum is the number: one part, or two if needed.

    Each part has one column for real numbers, and two if either tensor is complex.
    """
    if left.is_complex() or right.is_complex():
        left, right = _as_points(left), _as_points(right)
    else:
        left, right = left.view(-1, 1), right.view(-1, 1)
    if left.dtype in _LONG or right.dtype in _LONG:
        return list(zip(_halves(left), _halves(right), strict=True))
    return [(left.double(), right.double())]


def _as_points(tensor: Tensor) -> Tensor:
    if tensor.is_complex():
        return torch.view_as_real(tensor)
    return torch.stack([tensor, torch.zeros_like(tensor)], 1)


def _halves(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """Two float64 whose sum is the number: a multiple of 2**32, and the rest with its sign."""
    if tensor.dtype in _LONG:
        bits = tensor.view(torch.int64)
        low, high = bits & 0xFFFFFFFF, bits >> 32
        if tensor.dtype == torch.uint64:
            high &= 0xFFFFFFFF
        up = ((high < 0) & (low > 0)).long()  # towards zero, like `trunc` below
        return (high + up).double() * _HALF, (low - (up << 32)).double()
    value = tensor.double()
    high = (value / _HALF).trunc() * _HALF  # exact: only the exponent changes
    return high, (value - high).masked_fill(value.isinf(), 0.0)


def _is_integer(tensor: Tensor) -> bool:
    return not (tensor.is_floating_point() or tensor.is_complex())


def _all(masks: list[Tensor]) -> Tensor:
    return functools.reduce(torch.logical_and, masks)


def _size(parts: Tensor) -> Tensor:
    return torch.hypot(parts[:, 0], parts[:, 1]) if parts.shape[1] == 2 else parts[:, 0].abs()


def blocks(
    shape: Sequence[int], limit: int = CHUNK
) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Divide a tensor into blocks of at most ``limit`` elements that follow each other in memory.

    Yields:
        The offsets and the shape of each.
    """
    inner, dim = 1, len(shape)
    while dim and inner * shape[dim - 1] <= limit:
        dim -= 1
        inner *= shape[dim]
    if not dim:
        yield (0,) * len(shape), tuple(shape)
        return
    dim -= 1
    rows, rest = max(1, limit // max(inner, 1)), tuple(shape[dim + 1 :])
    for outer in itertools.product(*map(range, shape[:dim])):
        for start in range(0, shape[dim], rows):
            size = min(rows, shape[dim] - start)
            yield (*outer, start, *(0,) * len(rest)), (*(1,) * dim, size, *rest)


def _unravelled(number: int, shape: Iterable[int]) -> tuple[int, ...]:
    found: list[int] = []
    for size in reversed(tuple(shape)):
        number, place = divmod(number, size)
        found.append(place)
    return tuple(reversed(found))


def _for_json(value: Any) -> Any:
    is_number = isinstance(value, (bool, int)) or (
        isinstance(value, float) and math.isfinite(value)
    )
    return value if is_number or value is None else str(value)
