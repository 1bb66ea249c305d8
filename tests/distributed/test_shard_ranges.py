"""A shard that is a box of a filled tensor has the bits of the whole, whichever words are drawn."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import lateinit
from lateinit import _native
from lateinit._distributed import shard_ranges
from lateinit._replay import chunks
from lateinit._rng import fills

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


class Part(nn.Module):
    """Keeps a box of a tensor that nobody else has."""

    def __init__(
        self,
        op: str,
        dtype: torch.dtype,
        shape: tuple[int, ...],
        box: tuple[slice, ...],
        chain: bool,
    ) -> None:
        super().__init__()
        torch.manual_seed(3)
        whole = torch.empty(shape, dtype=dtype)
        whole.uniform_(-0.3, 0.7) if op == "uniform_" else whole.normal_(0.1, 0.7)
        if chain:
            whole.mul_(0.37).add_(0.1)
        self.register_buffer("part", whole[box].clone(memory_format=torch.contiguous_format))
        self.register_buffer("after", torch.randn(5))


@st.composite
def boxes(draw: st.DrawFn) -> tuple[tuple[int, ...], tuple[slice, ...]]:
    shape = draw(
        st.one_of(
            st.tuples(st.integers(1, 40), st.integers(1, 300)),
            st.tuples(st.integers(1, 6), st.integers(1, 12), st.integers(1, 80)),
        )
    )
    starts = [draw(st.integers(0, size - 1)) for size in shape]
    return shape, tuple(
        slice(start, draw(st.integers(start + 1, size)))
        for start, size in zip(starts, shape, strict=True)
    )


@settings(max_examples=200)
@given(
    st.sampled_from(["uniform_", "normal_"]),
    st.sampled_from(DTYPES),
    boxes(),
    st.booleans(),
    st.sampled_from([64, 1000, 1 << 19]),
)
def test_any_box_has_the_bits_of_the_whole(
    op: str,
    dtype: torch.dtype,
    box: tuple[tuple[int, ...], tuple[slice, ...]],
    chain: bool,
    rows: int,
) -> None:
    expected = Part(op, dtype, *box, chain)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunks, "_SMALLEST", 16)
        patch.setattr(shard_ranges, "_ROWS", rows)
        found = lateinit.materialize(lateinit.deferred_init(Part, op, dtype, *box, chain))
    for name, buffer in expected.named_buffers():
        assert torch.equal(buffer.view(torch.uint8), found.get_buffer(name).view(torch.uint8)), name


@pytest.mark.skipif(
    not fills.is_native("aten::normal_", torch.float32), reason="there is no native kernel"
)
@pytest.mark.parametrize(
    ("shape", "box"),
    [
        ((192, 300), (slice(0, 190), slice(100, 140))),
        ((64, 3, 300), (slice(0, 63), slice(0, 3), slice(100, 140))),
        ((64, 30, 3, 3), (slice(0, 63), slice(10, 20), slice(0, 3), slice(0, 3))),
    ],
)
def test_what_lies_between_columns_is_passed_over(
    shape: tuple[int, ...], box: tuple[slice, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = 0

    def counting(op: str, rows: torch.Tensor, *rest: object) -> bool:
        nonlocal drawn
        drawn += rows.numel()
        return native(op, rows, *rest)  # type: ignore[arg-type]

    native = _native.fill_rows
    monkeypatch.setattr(chunks, "_SMALLEST", 16)
    monkeypatch.setattr(_native, "fill_rows", counting)
    arguments = "normal_", torch.float32, shape, box, False
    expected = Part(*arguments)
    found = lateinit.materialize(lateinit.deferred_init(Part, *arguments))
    assert torch.equal(found.part, expected.part)
    assert drawn == expected.part.numel()
