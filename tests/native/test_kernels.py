"""Every native kernel has the bits of torch's, and leaves a generator where torch's leaves it."""

from __future__ import annotations

import math
import platform
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lateinit import _native
from lateinit._native import DTYPES, NORMAL, UNIFORM, calls, kernels, trial
from lateinit._rng import mt19937

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

pytestmark = pytest.mark.quick  # also with the kernels of another CPU, and another torch
built = pytest.mark.skipif(
    calls.library is None, reason="lateinit was installed without a compiler"
)

BLOCK, PART = 624, 4 * 624
SIZES = st.one_of(
    st.sampled_from(
        [16, 17, 31, 32, 33, *(n + d for n in (BLOCK, PART, 2 * PART) for d in (-1, 0, 1, 16))]
    ),
    st.integers(16, 9000),
)
seeds = st.integers(0, 2**64 - 1)
drawn_before = st.one_of(st.sampled_from([0, 1, 15, 607, 608, 623, 624, 625]), st.integers(0, 3000))
ANY = st.floats(allow_nan=False, allow_infinity=False, width=32)
BOUNDS = st.one_of(
    st.sampled_from(
        [(0.0, 1.0), (-1 / math.sqrt(300), 1 / math.sqrt(300)), (1.0, 1.001), (-0.0, 0.0)]
    ),
    st.tuples(ANY, ANY).map(lambda pair: (min(pair), max(pair))),
    st.tuples(st.floats(-2, 2), st.floats(-2, 2)).map(lambda pair: (min(pair), max(pair))),
)
MOMENTS = st.one_of(
    st.sampled_from([(0.0, 1.0), (0.0, 0.02), (3.0, 1e-40), (-0.0, 0.0), (1e38, 1e38)]),
    st.tuples(ANY, ANY.map(abs)),
    st.tuples(st.floats(-2, 2), st.floats(0, 2)),
)


@pytest.fixture(autouse=True)
def tried_anew(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No verdict of one test is believed by another; also where the suite runs without kernels."""
    monkeypatch.delenv("LATEINIT_NATIVE", raising=False)
    verdicts = (kernels._verdict, kernels._jump_verdict)
    for verdict in verdicts:
        verdict.cache_clear()
    yield
    for verdict in verdicts:
        verdict.cache_clear()


def generator_after(seed: int, words: int) -> torch.Generator:
    generator = torch.Generator().manual_seed(seed)
    torch.empty(words).uniform_(generator=generator)
    return generator


def by_torch(
    op: str, target: torch.Tensor, numbers: tuple[float, float], generator: torch.Generator
) -> None:
    (target.normal_ if op == NORMAL else target.uniform_)(*numbers, generator=generator)


def same(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    return torch.equal(ours.view(torch.uint8), theirs.view(torch.uint8))


def agrees(
    op: str, dtype: torch.dtype, numel: int, numbers: tuple[float, float], seed: int, before: int
) -> bool:
    """True also where torch's own kernel is used, as another torch may need it."""
    if not kernels.is_native(op, dtype):
        return True
    theirs, ours = torch.zeros(2, numel, dtype=dtype)
    generator, other = generator_after(seed, before), generator_after(seed, before)
    by_torch(op, theirs, numbers, generator)
    assert kernels.fill(op, ours, *numbers, other)
    return same(ours, theirs) and torch.equal(generator.get_state(), other.get_state())


def within(dtype: torch.dtype, bounds: tuple[float, float]) -> tuple[float, float]:
    """Bounds that torch accepts for a dtype."""
    most = torch.finfo(dtype).max / 2
    low, high = (max(-most, min(most, bound)) for bound in bounds)
    return low, high


@built
@settings(max_examples=300)
@given(st.sampled_from(DTYPES), SIZES, BOUNDS, seeds, drawn_before)
def test_uniform_has_torchs_bits(
    dtype: torch.dtype, numel: int, bounds: tuple[float, float], seed: int, before: int
) -> None:
    assert agrees(UNIFORM, dtype, numel, within(dtype, bounds), seed, before)


@built
@settings(max_examples=300)
@given(st.sampled_from(DTYPES), SIZES, MOMENTS, seeds, drawn_before)
def test_normal_has_torchs_bits(
    dtype: torch.dtype, numel: int, moments: tuple[float, float], seed: int, before: int
) -> None:
    assert agrees(NORMAL, dtype, numel, moments, seed, before)


@built
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", [NORMAL, UNIFORM])
def test_a_million_elements_have_torchs_bits(op: str, dtype: torch.dtype) -> None:
    assert agrees(op, dtype, 1_000_003, (-0.03, 0.05) if op == UNIFORM else (0.1, 0.02), 1, 5)


@built
@settings(max_examples=200)
@given(st.sampled_from(DTYPES), SIZES, MOMENTS, seeds, drawn_before, st.data())
def test_the_elements_at_some_places_are_those_of_the_whole(
    dtype: torch.dtype,
    numel: int,
    moments: tuple[float, float],
    seed: int,
    before: int,
    data: st.DataObject,
) -> None:
    if not kernels.is_native(NORMAL, dtype):
        return
    end = st.integers(max(0, numel - 35), numel - 1)
    chosen = data.draw(
        st.lists(st.one_of(st.integers(0, numel - 1), end), max_size=60, unique=True)
    )
    places = torch.tensor(sorted(chosen), dtype=torch.int64)
    theirs, ours = torch.zeros(numel, dtype=dtype), torch.zeros(len(places), dtype=dtype)
    generator, other = generator_after(seed, before), generator_after(seed, before)
    theirs.normal_(*moments, generator=generator)
    kernels.normal_at(places, ours, numel, *moments, other)
    assert same(ours, theirs[places])
    assert torch.equal(generator.get_state(), other.get_state())


@built
@settings(max_examples=200)
@given(
    st.sampled_from(DTYPES),
    st.sampled_from([NORMAL, UNIFORM]),
    st.integers(1, 40),
    st.one_of(st.sampled_from([1, 15, 16, 17, PART, PART + 1]), st.integers(1, 6000)),
    st.integers(calls.APART, 3000),
    st.integers(0, 15),
    seeds,
    drawn_before,
)
def test_rows_are_those_of_the_whole(
    dtype: torch.dtype,
    op: str,
    count: int,
    length: int,
    gap: int,
    begin: int,
    seed: int,
    before: int,
) -> None:
    if not kernels.is_native(op, dtype):
        return
    stride, numbers = length + gap, (-0.25, 0.7)
    end = begin + (count - 1) * stride + length
    generator, other = generator_after(seed, before), generator_after(seed, before)
    theirs, ours = (
        torch.zeros(-(-end // 16) * 16, dtype=dtype),
        torch.zeros(count, length).to(dtype),
    )
    by_torch(op, theirs, numbers, generator)
    assert kernels.fill_rows(op, ours, begin, stride, numbers, other)
    assert same(ours, theirs.as_strided((count, length), (stride, 1), begin).contiguous())
    assert torch.equal(generator.get_state(), other.get_state())


@built
@settings(max_examples=100)
@given(seeds, drawn_before, st.one_of(st.integers(1, 3000), st.integers(1, 200_000)), st.booleans())
def test_jumps_end_where_draws_end(seed: int, before: int, words: int, leap: bool) -> None:
    start = mt19937.state_of(generator_after(seed, before))
    ended = generator_after(seed, before)
    torch.empty(words).uniform_(generator=ended)
    for avx2 in (True, False):
        assert calls.jump(start, words, leap=leap, avx2=avx2) == mt19937.state_of(ended)


@built
@given(st.one_of(st.integers(0, 40_000), st.integers(0, 2**63)))
def test_powers_of_x_are_those_of_python(exponent: int) -> None:
    assert calls.library is not None
    for avx2 in (True, False):
        found = int.from_bytes(calls.library.polynomial(exponent, avx2), "little")
        assert found == mt19937._power(exponent)


@built
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", [NORMAL, UNIFORM])
@pytest.mark.parametrize("fused", [True, False])
def test_other_processors_get_the_same_bits(op: str, dtype: torch.dtype, fused: bool) -> None:
    state = generator_after(3, 600).get_state()
    found, places = [], torch.arange(0, 5003, 7)
    for avx2 in (True, False):
        ended, whole = state.clone(), torch.zeros(5003, dtype=dtype)
        calls.fill(op, whole, -0.3, 0.7, ended, fused=fused, avx2=avx2)
        some = torch.zeros(len(places), dtype=dtype)
        calls.normal_at(places, some, 5003, 0.1, 0.7, state.clone(), fused=fused, avx2=avx2)
        found.append([part.view(torch.uint8) for part in (ended, whole, some)])
    assert all(map(torch.equal, *found))


@built
def test_threads_fill_at_once() -> None:
    if not kernels.is_native(NORMAL, torch.float32):
        pytest.skip("torch's kernel is used")

    def draw(seed: int) -> torch.Tensor:
        target = torch.zeros(200_000)
        assert kernels.fill(NORMAL, target, 0.0, 1.0, generator_after(seed, 0))
        return target

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(draw, range(12)))
    for seed, target in enumerate(found):
        assert torch.equal(target, torch.empty(200_000).normal_(generator=generator_after(seed, 0)))


REFUSED: dict[str, Callable[[torch.Generator], bool]] = {
    "with gaps": lambda g: kernels.fill(NORMAL, torch.zeros(99, 2)[:, 0], 0.0, 1.0, g),
    "transposed": lambda g: kernels.fill(UNIFORM, torch.zeros(9, 5).t(), 0.0, 1.0, g),
    "15 normals": lambda g: kernels.fill(NORMAL, torch.zeros(15), 0.0, 1.0, g),
    "negated": lambda g: kernels.fill(UNIFORM, torch._neg_view(torch.zeros(50)), 0.0, 1.0, g),
    "nothing": lambda g: kernels.fill(UNIFORM, torch.zeros(0), 0.0, 1.0, g),
    "meta": lambda g: kernels.fill(UNIFORM, torch.zeros(50, device="meta"), 0.0, 1.0, g),
    "integers": lambda g: kernels.fill(UNIFORM, torch.zeros(50, dtype=torch.int32), 0.0, 1.0, g),
    "complex": lambda g: kernels.fill(NORMAL, torch.zeros(50, dtype=torch.cfloat), 0.0, 1.0, g),
    "std < 0": lambda g: kernels.fill(NORMAL, torch.zeros(50), 0.0, -1.0, g),
    "std of nan": lambda g: kernels.fill(NORMAL, torch.zeros(50), 0.0, math.nan, g),
    "mean of inf": lambda g: kernels.fill(NORMAL, torch.zeros(50), math.inf, 1.0, g),
    "mean past float32": lambda g: kernels.fill(NORMAL, torch.zeros(50), 1e39, 1.0, g),
    "mean past any": lambda g: kernels.fill(NORMAL, torch.zeros(50), 10**400, 1.0, g),
    "low > high": lambda g: kernels.fill(UNIFORM, torch.zeros(50), 1.0, 0.0, g),
    "too wide": lambda g: kernels.fill(UNIFORM, torch.zeros(50), -3e38, 3e38, g),
    "past float16": lambda g: kernels.fill(UNIFORM, torch.zeros(50).half(), 0.0, 7e4, g),
    "other op": lambda g: kernels.fill("aten::cauchy_", torch.zeros(50), 0.0, 1.0, g),
}


@pytest.mark.parametrize("case", sorted(REFUSED))
def test_what_torch_may_do_otherwise_is_left_to_torch(case: str) -> None:
    generator = generator_after(1, 77)
    before = generator.get_state()
    assert not REFUSED[case](generator)
    assert torch.equal(generator.get_state(), before)


def test_without_native_kernels_everything_is_left_to_torch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("LATEINIT_NATIVE", "0")
    target, generator = torch.zeros(50), generator_after(1, 0)
    assert not kernels.fill(NORMAL, target, 0.0, 1.0, generator)
    assert not kernels.can_jump()
    assert target.eq(0).all()
    assert {v.why for v in _native.verdicts().values()} == {"switched off by LATEINIT_NATIVE=0"}


def test_an_install_without_a_compiler_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calls, "library", None)
    assert {v.why for v in _native.verdicts().values()} == {"not built: there was no C compiler"}


# -- the trials ------------------------------------------------------------------------------------


@built
@pytest.mark.skipif(
    not (torch.__version__.startswith("2.13") and platform.machine() == "x86_64"),
    reason="with another torch it is enough that nothing is used that differs",
)
def test_kernels_agree_with_the_torch_that_they_were_written_for() -> None:
    unused = {name: v.why for name, v in _native.verdicts().items() if not v.used}
    assert unused == {"normal_ float64": "torch's is as fast"}


@built
def test_a_trial_moves_no_global_generator() -> None:
    before = torch.get_rng_state()
    _native.verdicts()
    assert torch.equal(torch.get_rng_state(), before)


@built
@pytest.mark.parametrize("op", [NORMAL, UNIFORM])
@pytest.mark.parametrize("index", [0, 16, 640, 644, 2495, 2496])
def test_one_other_bit_is_noticed(op: str, index: int, monkeypatch: pytest.MonkeyPatch) -> None:
    fill = calls.fill

    def wrong(op: str, target: torch.Tensor, *args: object, **kwargs: object) -> None:
        fill(op, target, *args, **kwargs)  # type: ignore[arg-type]
        if len(target) > index:
            target.view(torch.int32)[index] ^= 1

    monkeypatch.setattr(calls, "fill", wrong)
    assert kernels._verdict(op, torch.float32) == (False, "differs from torch's", False)


@built
def test_a_generator_that_ends_elsewhere_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    fill, jump = calls.fill, calls.jump

    def moving_on(*args: object, **kwargs: object) -> None:
        fill(*args, **kwargs)  # type: ignore[arg-type]
        args[4][:] = torch.frombuffer(  # type: ignore[index]
            bytearray(jump(bytes(args[4].numpy()), 1, leap=False)),
            dtype=torch.uint8,  # type: ignore[attr-defined]
        )

    monkeypatch.setattr(calls, "fill", moving_on)
    assert not trial.fill_agrees(UNIFORM, torch.float32, fused=True)
    monkeypatch.setattr(calls, "jump", lambda state, words, leap: jump(state, words + 1, leap=leap))
    assert not trial.jump_agrees()


@built
def test_elements_at_places_that_differ_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    normal_at = calls.normal_at

    def wrong(places: torch.Tensor, values: torch.Tensor, *args: object, **kwargs: object) -> None:
        normal_at(places, values, *args, **kwargs)  # type: ignore[arg-type]
        values[-1] = 0.25

    monkeypatch.setattr(calls, "normal_at", wrong)
    assert not any(trial.fill_agrees(NORMAL, torch.float32, fused=fused) for fused in (True, False))


@built
@pytest.mark.parametrize("at", [8, 16])
def test_bytes_that_are_no_state_are_refused(at: int) -> None:
    state = bytearray(mt19937.state_of(generator_after(1, 9)))
    state[at] = 77
    with pytest.raises(ValueError, match="not the state of a CPU generator"):
        calls.jump(bytes(state), 5, leap=False)
