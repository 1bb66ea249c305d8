"""The C functions, for tensors. They do not check that their bits are those of torch."""

from __future__ import annotations

import functools
import sys
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from types import ModuleType

try:
    from lateinit._native import _kernels
except ImportError:  # installed without a C compiler
    library: ModuleType | None = None
else:
    library = _kernels

NORMAL, UNIFORM = "aten::normal_", "aten::uniform_"
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)  # as kernels.c numbers them
APART = 32
"""The least distance of two rows, in elements, at which they share no group of 16."""
_BLOCK = 624  # words that a generator makes at once (at::mt19937: MERSENNE_STATE_N)
_NEXT = slice(16, 24)  # the bytes of a state that count the words drawn of its block


def fill(
    op: str,
    target: Tensor,
    first: float,
    second: float,
    state: Tensor,
    *,
    fused: bool,
    avx2: bool = True,
) -> None:
    """Fill a tensor natively, whether or not torch agrees; changes ``state``."""
    assert library is not None
    library.fill(
        _address(state),
        target.data_ptr(),
        target.numel(),
        op == NORMAL,
        DTYPES.index(target.dtype),
        fused,
        avx2,
        first,
        second,
    )


def fill_rows(
    op: str,
    rows: Tensor,
    begin: int,
    stride: int,
    numbers: tuple[float, float],
    state: Tensor,
    *,
    fused: bool,
    avx2: bool = True,
) -> None:
    """Draw some rows of a fill natively; changes ``state``."""
    assert library is not None
    assert rows.is_contiguous()
    assert 0 <= begin < 16
    assert len(rows) < 2 or stride - rows.shape[1] >= APART
    library.fill_rows(
        _address(state),
        rows.data_ptr(),
        *(len(rows), begin, rows.shape[1], stride),
        op == NORMAL,
        DTYPES.index(rows.dtype),
        fused,
        avx2,
        *numbers,
    )


def normal_at(
    places: Tensor,
    values: Tensor,
    numel: int,
    mean: float,
    std: float,
    state: Tensor,
    *,
    fused: bool,
    avx2: bool = True,
) -> None:
    """Draw some elements of a ``normal_`` natively; changes ``state``."""
    assert library is not None
    assert places.is_contiguous()
    assert places.dtype == torch.int64
    assert values.is_contiguous()
    assert values.numel() == places.numel()
    assert not places.numel() or 0 <= int(places[0]) <= int(places[-1]) < numel
    library.normal_at(
        _address(state),
        places.data_ptr(),
        places.numel(),
        values.data_ptr(),
        numel,
        DTYPES.index(values.dtype),
        fused,
        avx2,
        mean,
        std,
    )


def jump(state: bytes, words: int, *, leap: bool, avx2: bool = True) -> bytes:
    """The state after some words: by a leap, or by making each block of words on the way."""
    assert library is not None
    drawn = int.from_bytes(state[_NEXT], sys.byteorder) or _BLOCK  # 0: the first draw makes a block
    blocks, last = divmod(drawn + words - 1, _BLOCK)
    moved = torch.frombuffer(bytearray(state), dtype=torch.uint8)
    if leap and blocks:
        polynomial = _polynomial((blocks - 1) * _BLOCK)
        library.leap_by(_address(moved), polynomial, last + 1, avx2)
    else:
        library.pass_over(_address(moved), words, avx2)
    return moved.numpy().tobytes()


@functools.lru_cache(maxsize=1024)
def _polynomial(exponent: int) -> bytes:
    """x**exponent modulo the characteristic polynomial; 2,496 bytes."""
    assert library is not None
    coefficients: bytes = library.polynomial(exponent, True)
    return coefficients


def _address(state: Tensor) -> int:
    assert state.dtype == torch.uint8
    assert state.numel() == 5056
    assert state.is_contiguous()
    return state.data_ptr()
