import random
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lateinit._rng import consumption as consumption_module
from lateinit._rng import position as seeker_module
from lateinit._rng.consumption import DrawSpec, consumption
from lateinit._rng.mt19937 import generator_at, has_normal, jump, state_of
from lateinit._rng.position import Cost, Seeker
from lateinit._torch import OP_TABLE, OpTraits, by_name
from tests.support.twins import interrupted_at

REAL = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
FLOATING = (*REAL, torch.complex64, torch.complex128)
INTEGER = (torch.int64, torch.int32, torch.int16, torch.uint8)
SIZES = (0, 1, 2, 3, 7, 8, 15, 16, 17, 31, 32, 33, 311, 312, 313, 623, 624, 625, 1300)


# Each op with the dtypes that it takes and some of the numbers that it can be given.
OPS = {
    "uniform_": (FLOATING, [(), (-0.5, 0.5), (2.0, 2.0)]),
    "normal_": (FLOATING, [(), (1.0, 0.02), (0.0, 0.0)]),
    "random_": ((*REAL, *INTEGER, torch.bool), [()]),
    "random_.to": ((*REAL, *INTEGER), [(2,), (100,)]),
    "random_.from": ((*REAL, *INTEGER), [(0, 7), (3, 90)]),
    "bernoulli_.float": ((*REAL, *INTEGER, torch.bool), [(), (0.0,), (0.3,), (1.0,)]),
    "exponential_": (REAL, [(), (2.5,), (float("inf"),)]),
    "cauchy_": (REAL, [(), (1.0, 3.0)]),
    "log_normal_": (REAL, [(), (0.5, 1.5)]),
    "geometric_": ((*REAL, *INTEGER), [(0.1,), (0.9,)]),
    "randperm": ((torch.float32, torch.float64, torch.int64, torch.int32), [()]),
}
WIDE = [(torch.int64, args) for args in [(0, 2**28), (-(2**40), 2**40), (5, None), (-9, 2**28 - 9)]]
WIDE += [(torch.int32, (0, 2**28 - 1)), (torch.int64, (-(2**63), None)), (torch.uint8, (1, None))]


@dataclass(frozen=True)
class Call:
    """An op on a tensor, to be made and to be counted."""

    op: str
    dtype: torch.dtype
    numel: int
    layout: str = "contiguous"
    args: tuple = ()

    def draw(self):
        contiguous = self.op == "randperm" or self.tensor().is_contiguous()
        return DrawSpec(f"aten::{self.op}", self.numel, self.dtype, contiguous, self.args)

    def tensor(self):
        if self.layout == "strided":
            return torch.empty(self.numel, 2, dtype=self.dtype)[:, 0]
        if self.layout == "transposed" and self.numel % 2 == 0:
            return torch.empty(2, self.numel // 2, dtype=self.dtype).t()
        if self.layout == "channels last" and self.numel % 4 == 0:
            image = torch.empty(1, 2, 2, self.numel // 4, dtype=self.dtype)
            return image.contiguous(memory_format=torch.channels_last)
        return torch.empty(self.numel, dtype=self.dtype)

    def make(self, generator):
        if self.op == "randperm":
            torch.randperm(self.numel, dtype=self.dtype, generator=generator)
        else:
            by_name(f"aten::{self.op}").func(self.tensor(), *self.args, generator=generator)


@st.composite
def calls(draw):
    op = draw(st.sampled_from(sorted(OPS)))
    dtypes, numbers = OPS[op]
    dtype = draw(st.sampled_from(dtypes))
    numel = draw(st.sampled_from(SIZES))
    layout = draw(st.sampled_from(["contiguous", "strided", "transposed", "channels last"]))
    return Call(op, dtype, numel, layout, draw(st.sampled_from(numbers)))


@st.composite
def starts(draw):
    """A fresh seed, or a state anywhere in a block, with a cached normal or not."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**64 - 1)))
    if draw(st.booleans()):
        torch.empty(1).normal_(generator=generator)
    torch.empty(draw(st.sampled_from([0, 1, 300, 619, 620, 623, 624, 625]))).uniform_(
        generator=generator
    )
    return state_of(generator)


def start_at(seed, *, normal=False):
    generator = torch.Generator().manual_seed(seed)
    if normal:
        torch.empty(1).normal_(generator=generator)
    return state_of(generator)


def eager_states(sequence, start):
    """The states before each call and after the last, as torch makes them."""
    generator = generator_at(start)
    states = [start]
    for call in sequence:
        call.make(generator)
        states.append(state_of(generator))
    return states


def seeker_over(sequence, start):
    seeker = Seeker(start)
    for call in sequence:
        seeker.append(consumption(call.draw()))
    return seeker


def never(index, generator):
    raise AssertionError(f"draw {index} is known, and was made")


class Runner:
    """Makes draws for a seeker and counts them."""

    def __init__(self, sequence):
        self.sequence = sequence
        self.made = []

    def __call__(self, index, generator):
        self.made.append(index)
        self.sequence[index].make(generator)


@settings(deadline=None, max_examples=400)
@given(st.lists(calls(), max_size=12), starts(), st.randoms(use_true_random=False))
def test_every_position_is_the_eager_one_in_whatever_order_it_is_asked(sequence, start, order):
    expected = eager_states(sequence, start)
    seeker = seeker_over(sequence, start)
    positions = list(range(len(sequence) + 1))
    order.shuffle(positions)
    for index in positions:
        assert seeker.state(index, never) == expected[index]


@settings(deadline=None, max_examples=250)
@given(st.lists(st.tuples(calls(), st.booleans()), max_size=12), starts(), st.data())
def test_unknown_draws_are_made_once_each_in_order(sequence, start, data):
    made = [call for call, _ in sequence]
    expected = eager_states(made, start)
    runner = Runner(made)
    seeker = Seeker(start)
    for call, known in sequence:
        seeker.append(consumption(call.draw()) if known else None)
    positions = st.lists(st.integers(0, len(sequence)), max_size=8)
    for index in [*data.draw(positions), len(sequence)]:
        assert seeker.state(index, runner) == expected[index]
    assert runner.made == [i for i, (_, known) in enumerate(sequence) if not known]


@pytest.mark.parametrize("numel", [1_000_000, 1_000_003])
@pytest.mark.parametrize("layout", ["contiguous", "strided", "transposed"])
@pytest.mark.parametrize("op", sorted(OPS))
def test_large_tensors_take_what_small_ones_let_expect(op, layout, numel):
    dtypes, numbers = OPS[op]
    for dtype in dtypes:
        sequence = [Call(op, dtype, numel, layout, numbers[-1])]
        start = start_at(3, normal=True)
        seeker = seeker_over(sequence, start)
        assert seeker.state(1, never) == eager_states(sequence, start)[1], dtype


@pytest.mark.parametrize(("dtype", "args"), WIDE)
def test_integers_from_a_wide_range_take_what_torch_takes(dtype, args):
    sequence = [Call("random_.from", dtype, n, "contiguous", args) for n in (3, 16, 700)]
    start = start_at(4)
    seeker = seeker_over(sequence, start)
    assert [seeker.state(i, never) for i in range(4)] == eager_states(sequence, start)


@pytest.mark.parametrize("op", ["uniform_", "normal_"])
@pytest.mark.parametrize("dtype", REAL)
@pytest.mark.parametrize("contiguous", [True, False])
@pytest.mark.parametrize("numel", [2, 15, 16, 10**9])
def test_what_initialises_most_models_is_known(op, dtype, contiguous, numel):
    assert consumption(DrawSpec(f"aten::{op}", numel, dtype, contiguous)) is not None


@pytest.mark.parametrize("numel", [0, 1])
def test_what_has_at_most_one_element_counts_as_contiguous(numel):
    costs = {consumption(DrawSpec("aten::normal_", numel, torch.float32, c)) for c in (True, False)}
    assert costs == {Cost(0, numel)}


@pytest.mark.parametrize(
    "draw",
    [
        DrawSpec("aten::multinomial", 10, torch.int64, contiguous=True),
        DrawSpec("aten::normal_", 10, torch.int64, contiguous=True),
        DrawSpec("aten::randint", 10, torch.int64, contiguous=True),
        DrawSpec("aten::random_.from", 10, torch.float32, contiguous=True, args=(0, 2**30)),
        DrawSpec("aten::randperm", 2**30, torch.int64, contiguous=True),
    ],
    ids=["no such op", "no such dtype", "no bound", "rounded bounds", "another shuffle"],
)
def test_what_cannot_be_foretold_is_unknown(draw):
    assert consumption(draw) is None


def test_a_cached_normal_outlives_the_draws_that_do_not_use_it():
    sequence = [
        Call("normal_", torch.float32, 5),
        Call("uniform_", torch.float32, 2_000_000),
        Call("normal_", torch.float32, 1_000_000),
        Call("normal_", torch.float16, 2, "strided"),
    ]
    expected = eager_states(sequence, start_at(1))
    for index in (3, 4):
        state = seeker_over(sequence, start_at(1)).state(index, never)
        assert has_normal(state)
        assert state == expected[index]


def test_positions_far_beyond_what_could_be_drawn_are_found():
    seeker = Seeker(start_at(0))
    for _ in range(3):
        draw = DrawSpec("aten::normal_", 10**13, torch.float32, contiguous=True)
        seeker.append(consumption(draw))
    assert seeker.state(3, never) == jump(start_at(0), 3 * 10**13)


def test_draws_are_made_where_the_self_test_fails(monkeypatch):
    sequence = [Call("uniform_", torch.float32, 20), Call("normal_", torch.float32, 5)] * 3
    expected = eager_states(sequence, start_at(2))
    runner = Runner(sequence)
    monkeypatch.setattr(consumption_module, "_follows", lambda *_: False)
    consumption_module._rule.cache_clear()
    try:
        seeker = seeker_over(sequence, start_at(2))
        assert [seeker.state(i, runner) for i in range(7)] == expected
        assert seeker_over(sequence, start_at(2)).state(6, runner) == expected[6]
    finally:
        consumption_module._rule.cache_clear()
    assert runner.made == [0, 1, 2, 3, 4, 5] * 2


def test_a_rule_that_torch_does_not_follow_is_not_believed(monkeypatch):
    monkeypatch.setattr(
        consumption_module,
        "_RULES",
        (consumption_module._each(2), consumption_module._seed(1), consumption_module._swaps),
    )
    consumption_module._rule.cache_clear()
    try:
        for numel in (5, 100):
            draw = DrawSpec("aten::uniform_", numel, torch.float32, contiguous=True)
            assert consumption(draw) is None
            wide = DrawSpec("aten::uniform_", numel, torch.float64, contiguous=True)
            assert consumption(wide) == Cost(2 * numel)
    finally:
        consumption_module._rule.cache_clear()


def test_one_seed_for_another_engine_is_found_out(monkeypatch):
    def seed_another_engine(_probe, dtype, _contiguous, numel, _args):
        before = start_at(1)
        yield consumption_module._elements(numel, dtype), before, jump(before, 1 if numel else 0)

    monkeypatch.setattr(consumption_module, "_trials", seed_another_engine)
    consumption_module._rule.cache_clear()
    try:
        costs = [
            consumption(DrawSpec("aten::exponential_", n, torch.float32, contiguous=True))
            for n in (0, 1, 15, 16, 10**6)
        ]
    finally:
        consumption_module._rule.cache_clear()
    assert costs == [Cost(0), Cost(1), Cost(1), Cost(1), Cost(1)]


def test_an_overload_that_this_torch_lacks_is_unknown(monkeypatch):
    monkeypatch.setitem(OP_TABLE, "aten::uniform_.of_another_version", OpTraits(draws="fixed"))
    draw = DrawSpec("aten::uniform_.of_another_version", 20, torch.float32, contiguous=True)
    assert consumption(draw) is None


def test_what_makes_a_draw_may_ask_for_states_up_to_it():
    sequence = [Call("normal_", torch.float32, n) for n in (3, 20, 7, 40)]
    expected = eager_states(sequence, start_at(6))
    seeker = Seeker(start_at(6))
    seen = []

    def run(index, generator):
        seen.extend(seeker.state(j, run) == expected[j] for j in range(index + 1))
        sequence[index].make(generator)

    for i, call in enumerate(sequence):
        seeker.append(None if i % 2 else consumption(call.draw()))
    assert seeker.state(4, run) == expected[4]
    assert seen == [True] * 6


def test_what_makes_a_draw_may_not_ask_for_the_state_after_it():
    seeker = Seeker(start_at(6))
    seeker.append(None)
    with pytest.raises(RuntimeError, match="draw 0 asks for a state after itself"):
        seeker.state(1, lambda _index, _generator: seeker.state(1, never))


def test_a_draw_that_fails_can_be_made_again():
    sequence = [Call("normal_", torch.float32, 3)]
    seeker = Seeker(start_at(6))
    seeker.append(None)
    with pytest.raises(AssertionError, match="draw 0 is known"):
        seeker.state(1, never)
    assert seeker.state(1, Runner(sequence)) == eager_states(sequence, start_at(6))[1]


def test_a_generator_set_anew_by_an_unknown_draw_goes_on_from_there():
    sequence = [Call("normal_", torch.float32, 3), Call("uniform_", torch.float32, 5)]
    seeker = Seeker(start_at(6))
    seeker.append(None)
    seeker.append(consumption(sequence[1].draw()))
    after = seeker.state(2, lambda _index, generator: generator.manual_seed(12))
    assert after == eager_states(sequence[1:], start_at(12))[1]


def test_draws_may_be_added_after_states_were_asked_for():
    sequence = [Call("normal_", torch.float32, n) for n in (3, 20, 7)]
    expected = eager_states(sequence, start_at(6))
    seeker = Seeker(start_at(6))
    for i, call in enumerate(sequence):
        assert len(seeker) == i
        assert seeker.state(i, never) == expected[i]
        seeker.append(consumption(call.draw()))
    assert seeker.state(3, never) == expected[3]


@pytest.mark.parametrize("index", [-1, 2])
def test_a_position_that_does_not_exist_is_refused(index):
    seeker = seeker_over([Call("normal_", torch.float32, 3)], start_at(0))
    with pytest.raises(IndexError, match=f"no position {index}: there are 1 draws"):
        seeker.state(index, never)


def test_threads_may_share_a_seeker():
    sequence = [Call("normal_", torch.float32, n) for n in (3, 200, 1_000_000, 7, 16)] * 3
    expected = eager_states(sequence, start_at(8))
    seeker = Seeker(start_at(8))
    runner = Runner(sequence)
    for i, call in enumerate(sequence):
        seeker.append(None if i in (4, 8) else consumption(call.draw()))
    positions = list(range(len(sequence) + 1)) * 4
    random.Random(0).shuffle(positions)
    with ThreadPoolExecutor(4) as pool:
        states = list(pool.map(lambda i: seeker.state(i, runner), positions))
    assert states == [expected[i] for i in positions]
    assert runner.made == [4, 8]


def test_a_seeker_that_is_interrupted_anywhere_goes_on_from_there():
    sequence = [Call("normal_", torch.float32, n) for n in (3, 20, 7, 40, 5, 16)]
    expected = eager_states(sequence, start_at(6))
    line, done = 0, False
    while not done:
        line += 1
        seeker = Seeker(start_at(6))
        for i, call in enumerate(sequence):
            seeker.append(None if i in (1, 3) else consumption(call.draw()))
        # No signal is handled before the one line that clears up has run.
        with (
            suppress(KeyboardInterrupt),
            interrupted_at(line, seeker_module.__file__, spared="self._running = None"),
        ):
            seeker.state(len(sequence), Runner(sequence))
            done = True
        states = [seeker.state(i, Runner(sequence)) for i in reversed(range(len(expected)))]
        assert states[::-1] == expected, line
    assert line > 50


def test_the_global_generator_is_not_used():
    before = torch.get_rng_state()
    consumption_module._rule.cache_clear()
    for op, (dtypes, numbers) in OPS.items():
        consumption(DrawSpec(f"aten::{op}", 40, dtypes[0], contiguous=True, args=numbers[0]))
    assert torch.equal(torch.get_rng_state(), before)
