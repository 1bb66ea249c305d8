"""A truncated normal that redraws, drawn in parts, has the bits and the end of one call."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import lateinit
from lateinit._materialize import scheduler
from lateinit._recording import trunc_normal
from lateinit._replay import chunks, execution_of
from lateinit._rng import truncated_normal
from lateinit._rng.mt19937 import state_of

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
BOUNDS = [
    truncated_normal.Normal(0.0, 0.02, -0.04, 0.04),
    truncated_normal.Normal(0.5, 1.0, -1.0, 1.7),
    truncated_normal.Normal(0.0, 1.0, -0.5, 0.5),
    truncated_normal.Normal(0.0, 1.0, 0.0, float("inf")),
    truncated_normal.Normal(0.0, 1.0, 1.0, 1.5),  # torch draws these by another method
    truncated_normal.Normal(0.0, 1.0, 4.0, 5.0),  # and warns here
]

redraws = pytest.mark.skipif(
    not trunc_normal.may_redraw(), reason="this torch draws truncated normals by inversion"
)


def filled(
    sizes: list[int], dtype: torch.dtype, normal: truncated_normal.Normal, draws: int
) -> nn.Module:
    torch.manual_seed(5)
    torch.randn(draws)  # any state, a cached sample of a small normal included
    return filled_from_here(sizes, dtype, normal)


def filled_from_here(
    sizes: list[int], dtype: torch.dtype, normal: truncated_normal.Normal
) -> nn.Module:
    model = nn.Module()
    for number, size in enumerate(sizes):
        tensor = torch.empty(size, dtype=dtype)
        model.register_buffer(f"b{number}", nn.init.trunc_normal_(tensor, *normal))
    return model


def assert_equal(ours: nn.Module, theirs: nn.Module) -> None:
    for name, expected in theirs.named_buffers():
        assert torch.equal(ours.get_buffer(name), expected), name


@settings(max_examples=100, deadline=None)
@given(
    sizes=st.lists(
        st.one_of(st.sampled_from([15, 16, 17, 31, 32, 623, 624, 625]), st.integers(1, 3000)),
        min_size=1,
        max_size=3,
    ),
    dtype=st.sampled_from(DTYPES),
    normal=st.sampled_from(BOUNDS),
    draws=st.integers(0, 30),
    threads=st.sampled_from([1, 2, 4]),
    lengths=st.tuples(*map(st.sampled_from, ([16, 48, 640], [64, 640], [0, 2, 8]))),
    most_kept=st.sampled_from([0, 100, 1 << 20]),
)
def test_any_cut_gives_the_bits_of_one_call(
    sizes: list[int],
    dtype: torch.dtype,
    normal: truncated_normal.Normal,
    draws: int,
    threads: int,
    lengths: tuple[int, int, int],
    most_kept: int,
) -> None:
    part, piece, few = lengths
    with warnings.catch_warnings(), pytest.MonkeyPatch.context() as patch:
        warnings.simplefilter("ignore")
        expected = filled(sizes, dtype, normal, draws)
        ended = torch.get_rng_state()
        patch.setattr(chunks, "_SMALLEST", 16)
        patch.setattr(scheduler, "PIECE", piece)
        patch.setattr(chunks, "PIECE", piece)
        patch.setattr(scheduler, "_LEAST", 16)
        patch.setattr(truncated_normal, "_PART", part)
        patch.setattr(truncated_normal, "_APART", 64)
        patch.setattr(truncated_normal, "_AT_ONCE", piece)
        patch.setattr(truncated_normal, "_FEW", few)
        patch.setattr(truncated_normal, "_MOST_KEPT", most_kept)
        patch.setattr(torch, "get_num_threads", lambda: threads)
        with lateinit.deferred():
            model = filled(sizes, dtype, normal, draws)
        assert torch.equal(ended, torch.get_rng_state())
        assert_equal(lateinit.materialize(model), expected)


@redraws
def test_large_tensors_are_drawn_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes, normal = [2_200_000, 300_007], truncated_normal.Normal(0.0, 0.02, -0.04, 0.04)
    expected = filled(sizes, torch.float32, normal, 0)
    ended = torch.get_rng_state()
    with lateinit.deferred():
        model = filled(sizes, torch.float32, normal, 0)
        monkeypatch.setattr("lateinit._replay.session.Session.call", None)  # any use of it fails
    assert torch.equal(ended, torch.get_rng_state())
    assert_equal(lateinit.materialize(model, threads=2), expected)


@redraws
@pytest.mark.parametrize("bound", [3.0, 2.0, 1.0])
def test_rounds_that_were_made_to_count_them_are_not_made_again(
    bound: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes, normal = [300_000, 400_007], truncated_normal.Normal(0.0, 1.0, -bound, bound)
    expected = filled(sizes, torch.float32, normal, 3)
    with lateinit.deferred() as program:
        model = filled(sizes, torch.float32, normal, 3)
    kept = list(execution_of(program).late._found.values())
    assert 0 < sum(len(late.places) for late in kept) < sum(sizes) / 200
    again, made = truncated_normal._Part.again, []

    def counted(part: truncated_normal._Part, look: bool = True) -> Any:
        made.append(part.rounds + 1)
        return again(part, look)

    monkeypatch.setattr(truncated_normal._Part, "again", counted)
    assert_equal(lateinit.materialize(model), expected)
    assert max(made, default=1) == kept[0].rounds


@redraws
def test_what_is_kept_is_not_taken_for_another_seed() -> None:
    sizes, normal = [300_000, 400_007], truncated_normal.Normal(0.0, 1.0, -2.0, 2.0)
    torch.manual_seed(8)
    expected = filled_from_here(sizes, torch.float32, normal)
    with lateinit.deferred():
        model = filled_from_here(sizes, torch.float32, normal)
    assert_equal(lateinit.materialize(model, seed=8), expected)


@redraws
def test_no_more_is_kept_than_may_be(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes, normal = [300_000] * 5, truncated_normal.Normal(0.0, 1.0, -2.0, 2.0)  # of each some 620
    monkeypatch.setattr(truncated_normal, "_MOST_KEPT", 2000)
    expected = filled(sizes, torch.float32, normal, 0)
    with lateinit.deferred() as program:
        model = filled(sizes, torch.float32, normal, 0)
    kept = execution_of(program).late._found
    assert len(kept) == 3
    assert sum(len(late.places) for late in kept.values()) <= 2000
    assert_equal(lateinit.materialize(model), expected)


@redraws
def test_what_is_kept_is_wanted_by_the_same_draw_alone() -> None:
    kept, normal = truncated_normal.Kept(), truncated_normal.Normal(0.0, 1.0, -2.0, 2.0)
    state, other = (state_of(torch.Generator().manual_seed(seed)) for seed in (1, 2))
    end = kept.after(state, torch.float32, 5000, normal)
    assert kept.late(state, torch.float32, 5000, normal) is not None
    assert kept.late(other, torch.float32, 5000, normal) is None
    assert kept.late(end, torch.float32, 5000, normal) is None
    assert kept.late(state, torch.float64, 5000, normal) is None
    assert kept.late(state, torch.float32, 5001, normal) is None
    assert kept.late(state, torch.float32, 5000, normal._replace(high=2.1)) is None


def test_trials_are_no_part_of_what_is_recorded() -> None:
    trunc_normal.may_redraw.cache_clear()
    truncated_normal.is_exact_in_parts.cache_clear()
    with lateinit.deferred() as program:
        weight = nn.init.trunc_normal_(torch.empty(600, 500), a=-1.0, b=1.0)
        assert weight[0, 0].item() <= 1.0  # a read: the cost of the draw is asked for in the block
    assert len(program.streams) == 1
    assert all("random_" not in op.name for op in program.ops)


@redraws
def test_another_seed_takes_another_number_of_rounds() -> None:
    normal = truncated_normal.Normal(0.0, 1.0, -2.0, 2.0)

    def build() -> nn.Module:
        return nn.Sequential(*(init(nn.Linear(600, 500, bias=False), normal) for _ in range(3)))

    with lateinit.deferred():
        model = build()
    torch.manual_seed(11)
    expected = build()
    lateinit.materialize(model, seed=11)
    for ours, theirs in zip(model.parameters(), expected.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def init(layer: nn.Linear, normal: truncated_normal.Normal) -> nn.Linear:
    nn.init.trunc_normal_(layer.weight, *normal)
    return layer


@pytest.mark.parametrize("std", [np.float32(0.7), torch.tensor(0.7)], ids=["numpy", "torch"])
def test_numbers_may_be_of_any_kind(std: Any) -> None:
    def build() -> torch.Tensor:
        first = nn.init.trunc_normal_(torch.empty(40), std=std, a=-1.0, b=1.0)
        return torch.cat([first, torch.randn(3)])

    torch.manual_seed(7)
    expected = build()
    torch.manual_seed(7)
    found = lateinit.materialize(lateinit.deferred_init(build))
    assert torch.equal(found, expected)


@pytest.mark.filterwarnings("ignore:mean is more than 2 std")
def test_bounds_that_no_normal_meets_are_drawn_by_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "_SMALLEST", 16)  # where it is asked whether parts can be drawn
    normal = truncated_normal.Normal(0.0, 1.0, 9.0, 10.0)
    expected = filled([50, 30], torch.float32, normal, 0)
    ended = torch.get_rng_state()
    with lateinit.deferred():
        model = filled([50, 30], torch.float32, normal, 0)
    assert torch.equal(ended, torch.get_rng_state())
    assert_equal(lateinit.materialize(model), expected)


@pytest.mark.parametrize("bounds", [(4.0, 5.0), (8.0, 9.0), (1.0, 1.2), (2.0, 1.0)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_bounds_that_are_hardly_ever_met_are_not_tried(
    dtype: torch.dtype, bounds: tuple[float, float]
) -> None:
    assert not truncated_normal.is_exact_in_parts(dtype, truncated_normal.Normal(0.0, 1.0, *bounds))


@redraws
@pytest.mark.parametrize("wrong", ["words", "_outside", "late", "torch"])
def test_what_fails_its_trial_is_run_as_it_is(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    normal = truncated_normal.Normal(0.0, 0.5, -1.1, 1.0)  # numbers that were not tried before
    if wrong == "words":
        words = truncated_normal.words_a_round
        more = lambda dtype, numel: words(dtype, numel) + 1  # noqa: E731
        monkeypatch.setattr(truncated_normal, "words_a_round", more)
    elif wrong == "_outside":
        outside = truncated_normal._outside
        monkeypatch.setattr(
            truncated_normal, "_outside", lambda v, low, high: outside(v, low, high / 2)
        )
    elif wrong == "late":
        monkeypatch.setattr(truncated_normal.Late, "within", lambda late, start, end: late)
    else:  # a torch that redraws all where one lies outside
        monkeypatch.setattr(truncated_normal, "by_name", lambda name: truncated_otherwise)
    assert not truncated_normal.is_exact_in_parts.__wrapped__(torch.float32, normal)
    monkeypatch.undo()
    assert truncated_normal.is_exact_in_parts.__wrapped__(torch.float32, normal)
    expected = filled([5000], torch.float32, normal, 0)
    ended = torch.get_rng_state()
    monkeypatch.setattr(chunks, "_SMALLEST", 16)
    monkeypatch.setattr(truncated_normal, "is_exact_in_parts", lambda dtype, normal: False)
    monkeypatch.setattr(truncated_normal, "draw", None)  # any use of it fails
    with lateinit.deferred():
        model = filled([5000], torch.float32, normal, 0)
    assert torch.equal(ended, torch.get_rng_state())
    assert_equal(lateinit.materialize(model), expected)


class truncated_otherwise:  # noqa: N801 - stands for an OpInfo
    @staticmethod
    def func(tensor: torch.Tensor, *normal: float, generator: torch.Generator) -> torch.Tensor:
        mean, std, low, high = normal
        while ((tensor.normal_(mean, std, generator=generator) - low) > high - low).any():
            tensor.clamp_(low, high)
            break
        return tensor


@pytest.mark.skipif(trunc_normal.may_redraw(), reason="this torch redraws")
def test_inversion_is_recorded_op_by_op() -> None:
    with lateinit.deferred() as program:
        nn.init.trunc_normal_(torch.empty(300, 300), std=1.0, a=-1.0, b=1.0)
    assert "aten::erfinv_" in [op.name for op in program.ops]
