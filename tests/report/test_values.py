"""How far two tensors are apart, held against Python's exact arithmetic."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch

from lateinit._checkpoint.formats import DTYPES
from lateinit._report.values import ValueDifference, blocks, comparable

SPECIAL = [0.0, -0.0, 1.0, -1.0, 0.1, 3.0, -7.0, 2.0**31, -(2.0**31), 2.0**53, 1e-30, 1e30]
SPECIAL += [math.inf, -math.inf, math.nan, 65504.0, 448.0, 255.0, 2.0**63, 2.0**64, -(2.0**63)]
WHOLE = [0, 1, 3, 127, 255, 2**24 + 1, 2**31, 2**53 + 1, 2**63 - 1, 2**63, 2**64 - 1]
WHOLE += [-1, -7, -(2**31), -(2**31) - 1, -(2**53) - 1, -(2**63), -(2**63) + 1]
EVERY = sorted([*DTYPES, torch.complex128], key=str)


def sample(dtype: torch.dtype) -> torch.Tensor:
    """Every special number that the dtype has."""
    if dtype.is_complex:
        numbers = torch.tensor(SPECIAL, dtype=torch.float64)
        return torch.complex(numbers, numbers.flip(0)).to(dtype)
    if dtype.is_floating_point:
        return torch.tensor(SPECIAL, dtype=torch.float64).to(dtype)
    if dtype == torch.bool:
        return torch.tensor([False, True])
    info = torch.iinfo(dtype)
    return torch.tensor([n for n in WHOLE if info.min <= n <= info.max], dtype=dtype)


def parts(value: Any) -> tuple[Any, ...]:
    return (value.real, value.imag) if isinstance(value, complex) else (value, type(value)(0))


def equal(a: Any, b: Any, *, signs: bool) -> bool:
    floats = isinstance(a, float) and isinstance(b, float)
    if floats and math.isnan(a) and math.isnan(b):
        return True
    same_sign = not (floats and signs) or math.copysign(1, a) == math.copysign(1, b)
    return bool(a == b) and same_sign


@pytest.mark.parametrize("left", EVERY, ids=str)
@pytest.mark.parametrize("right", EVERY, ids=str)
def test_elements_of_different_dtypes_differ_if_their_numbers_do(
    left: torch.dtype, right: torch.dtype
) -> None:
    pairs = list(itertools.product(range(len(sample(left))), range(len(sample(right)))))
    a, b = sample(left)[[i for i, _ in pairs]], sample(right)[[j for _, j in pairs]]
    floats = [d.is_floating_point or d.is_complex for d in (left, right)]
    known = [
        all(equal(p, q, signs=all(floats)) for p, q in zip(parts(x), parts(y), strict=True))
        for x, y in zip(a.tolist(), b.tolist(), strict=True)
    ]
    found = ValueDifference()
    found.add(a, b, (0,))
    assert found.different == known.count(False)


def difference(a: list[Any], b: list[Any], dtype: torch.dtype = torch.float32) -> ValueDifference:
    found = ValueDifference()
    found.add(torch.tensor(a, dtype=dtype), torch.tensor(b, dtype=dtype), (0,))
    return found


def test_the_largest_differences_are_told_with_their_place() -> None:
    found = difference([1.0, 100.0, 3.0], [1.5, 101.0, 3.0])
    assert (found.different, found.absolute, found.at) == (2, 1.0, (1,))
    assert found.relative == pytest.approx(0.5 / 1.5)
    assert (found.left, found.right) == (100.0, 101.0)
    assert str(found) == (
        "2 of 3 elements differ, by 1 at most (relative 0.333); at (1,): 100.0, 101.0"
    )


def test_a_nan_is_equal_to_its_own_bits_only_and_no_distance() -> None:
    nan = float("nan")
    assert difference([nan, 1.0], [nan, 1.0]).different == 0
    found = difference([nan, 1.0, 2.0], [0.0, 1.0, 2.5])
    assert (found.different, found.one_nan, found.absolute) == (2, 1, 0.5)
    only = difference([nan], [0.0])
    assert (only.different, only.absolute, only.at) == (1, 0.0, (0,))
    assert only.to_dict()["a"] == "nan"
    quiet = torch.tensor([0x7FC00000, 0x7FC00001], dtype=torch.int32).view(torch.float32)
    other = ValueDifference()
    other.add(quiet[:1], quiet[1:], (0,))
    assert (other.different, other.one_nan) == (1, 0)
    mixed = ValueDifference()
    mixed.add(torch.tensor([nan, nan]), torch.tensor([nan, 1.0], dtype=torch.bfloat16), (0,))
    assert (mixed.different, mixed.one_nan) == (1, 1)


def test_infinities_and_zeros() -> None:
    inf = float("inf")
    assert difference([inf, -inf], [inf, -inf]).different == 0
    found = difference([inf, 1.0], [1.0, 1.0])
    assert (found.absolute, found.relative) == (inf, inf)
    assert found.to_dict()["largest_absolute"] == "inf"
    signs = difference([0.0], [-0.0])
    assert (signs.different, signs.absolute, signs.relative) == (1, 0.0, 0.0)


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint64], ids=str)
def test_whole_numbers_that_no_float_holds_are_told_apart(dtype: torch.dtype) -> None:
    found = difference([2**62 + 1, 5], [2**62, 5], dtype)
    assert (found.different, found.absolute, found.left) == (1, 1.0, 2**62 + 1)
    assert difference([3, 2**40], [4, 2**40], dtype).relative == 0.25
    crossed = ValueDifference()
    crossed.add(torch.tensor([2**62 + 1], dtype=dtype), torch.tensor([2.0**62]), (0,))
    assert (crossed.different, crossed.absolute) == (1, 1.0)


def test_complex_numbers_are_apart_as_points_of_a_plane() -> None:
    found = difference([1 + 1j, 2j], [4 + 5j, 2j], torch.complex64)
    assert (found.different, found.absolute) == (1, 5.0)


def test_dtypes_without_numbers_are_compared_by_their_bits() -> None:
    a = torch.tensor([1, 2, 3], dtype=torch.uint8).view(torch.float4_e2m1fn_x2)
    b = torch.tensor([1, 2, 4], dtype=torch.uint8).view(torch.float4_e2m1fn_x2)
    found = ValueDifference()
    found.add(a, b, (0,))
    assert (found.different, found.at) == (1, None)
    assert math.isnan(found.absolute)
    assert comparable(a.dtype, a.dtype)
    assert not comparable(a.dtype, torch.float32)


@pytest.mark.parametrize(
    "shape", [(), (0,), (7,), (3, 0, 2), (5, 7), (1, 1, 30), (4, 3, 5), (30, 1)]
)
@pytest.mark.parametrize("limit", [1, 4, 10, 1000])
def test_blocks_cover_a_tensor_once_and_are_small(shape: tuple[int, ...], limit: int) -> None:
    seen = torch.zeros(shape, dtype=torch.int64)
    for offsets, sizes in blocks(shape, limit):
        assert math.prod(sizes) <= limit
        view = seen
        for dim, (start, size) in enumerate(zip(offsets, sizes, strict=True)):
            view = view.narrow(dim, start, size)
        assert view.is_contiguous()
        view += 1
    assert bool((seen == 1).all())


def test_the_place_is_that_in_the_whole_tensor() -> None:
    a, found = torch.zeros(5, 7), ValueDifference()
    b = a.clone()
    b[3, 4] = 2.0
    for offsets, sizes in blocks(a.shape, 10):
        begin, end = offsets[0], offsets[0] + sizes[0]
        found.add(a[begin:end], b[begin:end], offsets)
    assert (found.at, found.elements) == ((3, 4), 35)
