from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lateinit._rng import mt19937
from lateinit._rng.mt19937 import generator_at, has_normal, jump, state_of, without_normal

BLOCK = 624
TWIST = 0x9908B0DF
AROUND_A_BLOCK = st.sampled_from([0, 1, 2, 396, 397, 398, 622, 623, 624, 625, 1247, 1248, 1249])
seeds = st.integers(0, 2**64 - 1)


@pytest.fixture(
    autouse=True,
    params=[
        pytest.param(True, marks=pytest.mark.skipif(not mt19937._is_native(), reason="not built")),
        False,
    ],
    ids=["native", "python"],
)
def native(request, monkeypatch):
    """Jumps are made in C, and where that cannot be in Python."""
    monkeypatch.setattr(mt19937, "_is_native", lambda: request.param)


def seeded(seed, *, normal=False):
    generator = torch.Generator().manual_seed(seed)
    if normal:
        torch.empty(1).normal_(generator=generator)
    return state_of(generator)


def drawn(state, n):
    """What torch itself has after n 32-bit draws; not the op that the module steps with."""
    generator = generator_at(state)
    torch.empty(n).uniform_(generator=generator)
    return state_of(generator)


@settings(deadline=None, max_examples=150)
@given(seeds, AROUND_A_BLOCK, AROUND_A_BLOCK, st.booleans())
def test_short_jumps_end_where_draws_end(seed, before, n, normal):
    state = drawn(seeded(seed, normal=normal), before)
    assert jump(state, n) == drawn(state, n)


@settings(deadline=None, max_examples=60)
@given(seeds, AROUND_A_BLOCK, st.integers(490_000, 5_000_000), st.booleans())
def test_long_jumps_end_where_draws_end(seed, before, n, normal):
    state = drawn(seeded(seed, normal=normal), before)
    assert jump(state, n) == drawn(state, n)


@pytest.mark.parametrize("before", [0, 1, 623, 624])
@pytest.mark.parametrize("blocks", [1, 2, 3, 32, 33, 900])
@pytest.mark.parametrize("past", [-1, 0, 1])
def test_leaps_of_any_length_agree_with_draws_at_block_boundaries(
    before, blocks, past, monkeypatch
):
    monkeypatch.setattr(mt19937, "_LEAP_FROM", 0)
    state = drawn(seeded(5, normal=True), before)
    n = blocks * BLOCK - before % BLOCK + past
    assert jump(state, n) == drawn(state, n)


@settings(deadline=None, max_examples=60)
@given(seeds, st.integers(0, 10**12), st.integers(0, 10**12))
def test_two_jumps_are_one_jump_of_their_sum(seed, a, b):
    state = seeded(seed)
    assert jump(jump(state, a), b) == jump(state, a + b)


def characteristic_exponents():
    """Those of P, written out: of (x**623 + x**396)**k by Lucas's theorem, times x."""
    powers = [32, *(31 - bit for bit in range(31) if TWIST >> bit & 1)]
    exponents = {0}
    for k in powers:
        exponents ^= {1 + 396 * k + 227 * s for s in range(k + 1) if s & k == s}
    return sorted(exponents)


def test_the_characteristic_polynomial_annihilates_the_outputs():
    exponents = characteristic_exponents()
    generator = torch.Generator().manual_seed(7)
    outputs = torch.empty(19938 + 2000, dtype=torch.int64).random_(0, 2**20, generator=generator)
    words = outputs.numpy()
    total = np.zeros(2000, np.int64)
    for exponent in exponents:
        total ^= words[exponent : exponent + 2000]
    assert len(exponents) == 135
    assert words.any()
    assert not total.any()


def test_powers_of_x_follow_from_each_other():
    for n in (0, 1, 19936, 19937, 19938, 10**6, 10**9):
        assert mt19937._power(n + 1) == mt19937._reduced(mt19937._power(n) << 1)
        assert mt19937._power(2 * n) == mt19937._reduced(mt19937._squared(mt19937._power(n)))
        assert mt19937._power(n).bit_length() <= 19937


def test_remainders_are_those_of_long_division():
    polynomial = sum(1 << exponent for exponent in characteristic_exponents())
    rng = np.random.default_rng(1)
    for degree in (0, 19936, 19937, 20000, 30000, 39872, 39873):
        dividend = int.from_bytes(rng.bytes(degree // 8), "little") | 1 << degree
        remainder = dividend
        while (top := remainder.bit_length() - 1) >= 19937:
            remainder ^= polynomial << (top - 19937)
        assert mt19937._reduced(dividend) == remainder


def test_a_jump_keeps_the_seed_and_the_cached_normal():
    state = seeded(2**63 + 11, normal=True)
    for n in (1, 10**4, 10**10):
        there = jump(state, n)
        assert has_normal(there)
        assert there[:8] == state[:8]
        assert there[5016:] == state[5016:]


def test_no_draws_leave_a_fresh_seed_as_it_is():
    assert jump(seeded(3), 0) == seeded(3)


def test_a_generator_has_the_state_that_it_is_made_at():
    state = drawn(seeded(1, normal=True), 77)
    assert state_of(generator_at(state)) == state


def test_a_state_without_its_cached_normal_is_what_torch_leaves_when_the_sample_is_used():
    state = seeded(1, normal=True)
    generator = generator_at(state)
    torch.empty(1).normal_(generator=generator)
    assert has_normal(state)
    assert not has_normal(state_of(generator))
    assert without_normal(state) == state_of(generator)


def test_threads_jump_at_once():
    start = seeded(9)
    distances = [10**6 + 7 * i % 5 for i in range(16)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda n: jump(start, n), distances))
    assert found == [drawn(start, n) for n in distances]


def test_the_global_generator_is_not_used():
    before = torch.get_rng_state()
    jump(seeded(1), 1000)
    jump(seeded(1), 10**7)
    assert torch.equal(torch.get_rng_state(), before)


def test_where_leaps_do_not_agree_with_torch_the_draws_are_made(monkeypatch):
    monkeypatch.setattr(mt19937, "_is_native", lambda: False)

    def wrong(state, blocks):
        return seeded(0)

    start = seeded(4)
    monkeypatch.setattr(mt19937, "_leap", wrong)
    mt19937._leaps_agree.cache_clear()
    try:
        assert jump(start, 600_000) == drawn(start, 600_000)
    finally:
        mt19937._leaps_agree.cache_clear()


def test_a_generator_cannot_be_moved_back():
    with pytest.raises(ValueError, match="only moves forward"):
        jump(seeded(1), -1)


def test_a_state_of_another_size_is_refused():
    with pytest.raises(ValueError, match="5056 bytes; this has 16"):
        jump(bytes(16), 5)


def test_a_state_that_no_generator_has_is_refused():
    state = bytearray(seeded(1))
    state[16] = 9
    with pytest.raises(ValueError, match="left=1, next=9"):
        jump(bytes(state), 5)
