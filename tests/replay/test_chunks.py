"""Filling large storages in pieces gives the bits of one call, however it is cut."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import lateinit
from lateinit._materialize import scheduler
from lateinit._replay import chunks

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut what is tiny: otherwise only tensors of millions of elements are cut."""
    monkeypatch.setattr(chunks, "_SMALLEST", 16)
    monkeypatch.setattr(chunks, "_IN_CACHE", 32)
    monkeypatch.setattr(scheduler, "PIECE", 64)
    monkeypatch.setattr(scheduler, "_LEAST", 16)


def filled(dtype: torch.dtype, sizes: list[int], op: str, chain: bool, draws: int) -> nn.Module:
    torch.manual_seed(7)
    torch.randn(draws)  # any state, a cached sample of a small normal included
    model = nn.Module()
    for number, size in enumerate(sizes):
        tensor = torch.empty(size, dtype=dtype)
        tensor.uniform_(-0.9, 0.9) if op == "uniform_" else tensor.normal_(0.5, 2.0)
        if chain:
            tensor.erfinv_() if op == "uniform_" and dtype.itemsize > 2 else tensor.neg_()
            tensor.mul_(0.37).add_(0.1).clamp_(-0.3, 0.3)
        model.register_buffer(f"b{number}", tensor)
    return model


@settings(max_examples=150, deadline=None)
@given(
    dtype=st.sampled_from(DTYPES),
    sizes=st.lists(
        st.one_of(
            st.sampled_from([15, 16, 17, 31, 32, 33, 63, 64, 65, 623, 624, 625]),
            st.integers(1, 3000),
        ),
        min_size=1,
        max_size=4,
    ),
    op=st.sampled_from(["uniform_", "normal_"]),
    chain=st.booleans(),
    draws=st.integers(0, 30),
    threads=st.sampled_from([1, 2, 3, 4]),
    lengths=st.tuples(*map(st.sampled_from, ([16, 48, 64, 640], [16, 17, 64, 700], [16, 32, 624]))),
)
def test_any_cut_gives_the_bits_of_one_call(
    dtype: torch.dtype,
    sizes: list[int],
    op: str,
    chain: bool,
    draws: int,
    threads: int,
    lengths: tuple[int, int, int],
) -> None:
    piece, smallest, in_cache = lengths
    expected = filled(dtype, sizes, op, chain, draws)
    ended = torch.get_rng_state()
    with lateinit.deferred():
        model = filled(dtype, sizes, op, chain, draws)
    assert torch.equal(ended, torch.get_rng_state())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunks, "_SMALLEST", smallest)
        patch.setattr(chunks, "_IN_CACHE", in_cache)
        patch.setattr(chunks, "_DRAWN", in_cache)
        patch.setattr(scheduler, "PIECE", piece)
        patch.setattr(scheduler, "_LEAST", 16)
        lateinit.materialize(model, threads=threads)
    for name, buffer in expected.named_buffers():
        assert torch.equal(buffer.view(torch.uint8), model.get_buffer(name).view(torch.uint8)), name


@pytest.mark.parametrize("piece", [48, 1000])
def test_what_is_drawn_right_after_a_large_tensor_is_drawn_by_its_thread(
    piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = [100, 40, 15, 20, 100, 20, 20, 20, 20, 100, 16]
    expected = filled(torch.float32, sizes, "uniform_", chain=True, draws=0)
    with lateinit.deferred():
        model = filled(torch.float32, sizes, "uniform_", chain=True, draws=0)
    monkeypatch.setattr(chunks, "_SMALLEST", 64)
    monkeypatch.setattr(scheduler, "PIECE", piece)
    monkeypatch.setattr(scheduler, "_LEAST", piece)
    monkeypatch.setattr(scheduler, "_MOST_JOINED", 3)
    work, runs = scheduler._work, []

    def noted(jobs: list[Any], state: bytes | None) -> None:
        runs.append([job.fill.ref.numel for job in jobs])
        work(jobs, state)

    monkeypatch.setattr(scheduler, "_work", noted)
    lateinit.materialize(model, threads=1)
    for name, buffer in expected.named_buffers():
        assert torch.equal(buffer, model.get_buffer(name)), name
    whole = [[n for n in numels if n < 64] for numels in runs if numels[-1] < 64]
    # Not what comes after 15 elements, which are drawn in another way, nor too many.
    assert whole == ([[40, 20, 20, 20, 16]] if piece == 1000 else [[40], [20, 20, 20], [16]])


@pytest.mark.parametrize("threads", [1, 2, 4])
def test_tensors_of_millions_of_elements_equal_eager(threads: int) -> None:
    def build() -> nn.Module:
        torch.manual_seed(3)
        model = nn.Sequential(nn.Linear(1500, 1201), nn.Embedding(3001, 700, padding_idx=2))
        nn.init.trunc_normal_(model[0].weight, std=0.02)
        return model.append(nn.Linear(900, 800).bfloat16())

    expected = build()
    with lateinit.deferred():
        model = build()
    lateinit.materialize(model, threads=threads)
    for (name, ours), theirs in zip(model.named_parameters(), expected.parameters(), strict=True):
        assert torch.equal(ours, theirs), name


@pytest.mark.parametrize("dtype", DTYPES)
def test_multiples_are_added_as_in_one_call(
    dtype: torch.dtype, small_pieces: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunks, "_IN_CACHE", 16)

    def build() -> nn.Module:
        torch.manual_seed(3)
        model = nn.Module()
        model.added = torch.empty(9999, dtype=dtype).uniform_(-1, 1).add_(0.1, alpha=1 / 3)
        model.taken = torch.empty(9999, dtype=dtype).uniform_(-1, 1).sub_(0.1, alpha=-3.3)
        return model

    expected, model = build(), lateinit.materialize(lateinit.deferred_init(build))
    assert torch.equal(expected.added, model.added)
    assert torch.equal(expected.taken, model.taken)


@pytest.mark.parametrize("real", [torch.tensor(0.5), torch.linspace(0, 1, 1000)])
def test_real_data_may_follow_on_a_draw(real: torch.Tensor, small_pieces: None) -> None:
    def build() -> nn.Module:
        model = filled(torch.float32, [1000, 20], "normal_", chain=False, draws=0)
        model.b0.mul_(real)
        return model

    expected, model = build(), lateinit.materialize(lateinit.deferred_init(build))
    assert torch.equal(expected.b0, model.b0)
    assert torch.equal(expected.b1, model.b1)


def test_kernel_whose_ends_differ_is_run_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    def rounds_twice_at_the_end(tensor: torch.Tensor, number: float) -> None:
        end = len(tensor) // 64 * 64 if tensor.is_contiguous() else 0
        tensor[:end].add_(number, alpha=1 / 3)
        tensor[end:].add_(torch.tensor(number * (1 / 3)))

    assert chunks._trial("aten::add_.Tensor", torch.float16)
    info = SimpleNamespace(func=rounds_twice_at_the_end, random=False, numbers=(0.3,))
    monkeypatch.setattr(chunks, "by_name", lambda name: info)
    assert not chunks._trial("aten::add_.Tensor", torch.float16)


def test_kernel_that_fails_its_trial_is_run_whole(
    small_pieces: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = filled(torch.float32, [1000], "normal_", chain=True, draws=0)
    with lateinit.deferred():
        model = filled(torch.float32, [1000], "normal_", chain=True, draws=0)
    monkeypatch.setattr(chunks, "is_exact_in_pieces", lambda name, dtype: False)
    monkeypatch.setattr("lateinit._materialize.scheduler.run_piece", None)  # any use of it fails
    assert torch.equal(lateinit.materialize(model).b0, expected.b0)


def test_wrong_position_of_a_piece_would_be_seen(
    small_pieces: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = filled(torch.float32, [1000], "normal_", chain=False, draws=0)
    with lateinit.deferred():
        model = filled(torch.float32, [1000], "normal_", chain=False, draws=0)
    monkeypatch.setattr("lateinit._materialize.scheduler.words_of", lambda fill, numel: 1)
    assert not torch.equal(lateinit.materialize(model).b0, expected.b0)


def test_failure_in_a_thread_is_raised_and_the_call_can_be_repeated(
    small_pieces: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = filled(torch.float32, [100, 200, 300], "uniform_", chain=False, draws=0)
    with lateinit.deferred():
        model = filled(torch.float32, [100, 200, 300], "uniform_", chain=False, draws=0)
    original = chunks.run_piece

    def failing(fill: chunks.ChunkedFill, *rest: object) -> None:
        if fill.ref.numel == 200:
            raise MemoryError
        original(fill, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr("lateinit._materialize.scheduler.run_piece", failing)
    with pytest.raises(lateinit.errors.OutOfMemoryError, match="b1"):
        lateinit.materialize(model)
    assert not lateinit.is_deferred(model.b0)
    monkeypatch.setattr("lateinit._materialize.scheduler.run_piece", original)
    lateinit.materialize(model)
    for name, buffer in expected.named_buffers():
        assert torch.equal(buffer, model.get_buffer(name)), name


@pytest.mark.parametrize("run", [1, 2, 3])
def test_nobody_waits_for_a_run_that_cannot_be_begun(
    run: int, small_pieces: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = [40, 40, 40, 100, 200]
    expected = filled(torch.float32, sizes, "uniform_", chain=False, draws=0)
    with lateinit.deferred():
        model = filled(torch.float32, sizes, "uniform_", chain=False, draws=0)
    state, left = scheduler._Crew._state, run

    def short(crew: scheduler._Crew, run: scheduler._Run) -> bytes | None:
        nonlocal left
        left -= 1
        if left == 0:
            raise MemoryError
        return state(crew, run)

    monkeypatch.setattr(scheduler._Crew, "_state", short)
    raised: list[BaseException] = []

    def work() -> None:
        try:
            lateinit.materialize(model)
        except lateinit.errors.OutOfMemoryError as error:
            raised.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(60)
    assert not thread.is_alive()
    assert len(raised) == 1
    lateinit.materialize(model)
    for name, buffer in expected.named_buffers():
        assert torch.equal(buffer, model.get_buffer(name)), name
