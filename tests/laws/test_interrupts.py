"""Ctrl-C at any line: the same call can be repeated, gives the right bits, and harms nothing else.

Each run tries other lines; ``LATEINIT_INTERRUPTS`` is how many for each scenario (``all`` for every
line).
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import sys
from typing import TYPE_CHECKING, Any

import pytest
import torch

import lateinit
from lateinit._torch import surroundings
from lateinit.errors import RecordingError
from tests.support.interrupt_scenarios import Net, scenarios
from tests.support.interrupts import Scenario, ambience, interrupt, named, places_of, same, sample

if TYPE_CHECKING:
    from collections.abc import Iterator

ASKED = os.environ.get("LATEINIT_INTERRUPTS", "8")
MOST = sys.maxsize if ASKED == "all" else int(ASKED)
QUICK = ("block", "materialize", "load", "infer_shapes")  # the others are too many for `--quick`
OTHERS = (
    "deferred_init",
    "nested",
    "without_advance",
    "skip_init",
    "declare_lazy",
    "only",
    "shared",
    "part_of_shared",
    "cast",
    "threads",
    "follow",
    "pickle",
    "load_state_dict",
    "copy_",
    "load_part",
    "load_pt",
    "load_dcp",
    "load_hooked",
    "load_shared",
    "load_lazy",
    "load_cast",
    "save",
    "save_file",
    "save_resumed",
    "infer_shapes_real",
    "infer_shapes_now",
)
# What must hold between any two instructions too: a signal comes between them, not between lines.
CRITICAL = (
    "give guard guard_again unguard swap swap_with_hooks without_modes.__enter__ "
    "without_modes.__exit__ in_force deferred._begin deferred._end Recording.begin Recording.end "
    "Patches.enter Patches.leave"
)
SIGNALS = 30
# A file that was being opened is closed when it is dropped, and Python says so.
pytestmark = [
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Scenario]:
    return {s.name: s for s in scenarios(tmp_path_factory.mktemp("interrupts"))}


def interrupt_some(scenario: Scenario, places: list[Any]) -> None:
    for number, place in enumerate(sample(places, MOST)):
        try:
            interrupt(scenario, place, held=number % 2 == 1)
        except BaseException as error:
            error.add_note(f"interrupted at {named(place)}") if hasattr(error, "add_note") else None
            raise


@pytest.mark.parametrize(
    "name", [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)]
)
def test_an_interrupted_call_can_be_repeated(name: str, found: dict[str, Scenario]) -> None:
    interrupt_some(found[name], places_of(found[name]))


@pytest.mark.slow
def test_every_scenario_is_interrupted(found: dict[str, Scenario]) -> None:
    assert found.keys() == {*QUICK, *OTHERS}


@pytest.mark.skipif(sys.version_info < (3, 11), reason="code has no qualified name")
@pytest.mark.parametrize("name", ["block", "materialize", "shared"])
def test_an_interrupt_between_two_instructions_is_no_worse(
    name: str, found: dict[str, Scenario]
) -> None:
    scenario = found[name]
    each = Scenario(scenario.name, scenario.prepare, scenario.call, scenario.check, CRITICAL)
    wanted = CRITICAL.split()
    places = [p for p in places_of(each) if p[0][0].co_qualname in wanted]
    assert places
    interrupt_some(each, places)


@contextlib.contextmanager
def interrupted_after(seconds: float) -> Iterator[None]:
    """A real signal: Python's own handler of SIGINT, on the alarm of a timer."""
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("name", ["block", "materialize", "load"])
def test_a_real_signal_at_any_time_is_no_worse(name: str, found: dict[str, Scenario]) -> None:
    scenario, chance = found[name], random.Random()
    scenario.call(scenario.prepare())
    complete = ambience()
    for _ in range(SIGNALS if ASKED != "all" else 20 * SIGNALS):
        given = scenario.prepare()
        before = ambience()
        try:
            with interrupted_after(10 ** chance.uniform(-4.5, -2)):
                scenario.call(given)
        except KeyboardInterrupt:
            pass
        else:
            continue
        if ambience()["random state"] == complete["random state"] != before["random state"]:
            # It came behind the call, whose draws count then.
            same(complete, ambience(), "after the signal")
            continue
        same(before, ambience(), "after the signal")
        scenario.check(given, scenario.call(given))


def test_a_block_whose_exit_never_began_is_ended_by_the_next_call() -> None:
    """A traceback may keep it alive, as in an interactive session."""

    def trace(frame: Any, event: str, _: Any) -> Any:
        if event == "call" and frame.f_code is lateinit.deferred.__exit__.__code__:
            raise KeyboardInterrupt
        return None

    def build() -> None:
        with lateinit.deferred():
            Net()

    before, tracing = ambience(), sys.gettrace()
    with pytest.raises(KeyboardInterrupt) as held:  # noqa: PT012 - tracing has to end in it
        sys.settrace(trace)
        try:
            build()
        finally:
            sys.settrace(tracing)
    assert ambience()["recorder"] is not None
    lateinit.is_deferred(torch.nn.Identity())
    same(before, ambience(), "after another call")
    assert held.traceback


def test_a_block_that_somebody_holds_is_not_taken_for_an_abandoned_one() -> None:
    with contextlib.ExitStack() as stack:

        def enter() -> None:
            stack.enter_context(lateinit.deferred())

        enter()
        assert not lateinit.is_deferred(torch.nn.Identity())
        assert lateinit.is_deferred(lateinit.deferred_init(torch.nn.Linear, 2, 2))
        assert torch.nn.Linear(2, 2).weight.device.type == "cpu"
        assert ambience()["recorder"] is not None
    assert ambience()["recorder"] is None


def test_a_block_is_refused_where_it_would_hear_nothing() -> None:
    with (
        torch._C.DisableTorchFunction(),
        pytest.raises(RecordingError, match="torch functions are disabled"),
    ):
        lateinit.deferred_init(torch.nn.Linear, 2, 2)
    assert not lateinit.is_deferred(torch.nn.Linear(2, 2))


def restores_nothing(*_: Any) -> None: ...


def test_the_check_fails_where_nothing_is_put_back(
    found: dict[str, Scenario], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A check that cannot fail is a defect."""
    monkeypatch.setattr(surroundings.Noted, "restore", restores_nothing)
    scenario = found["materialize"]
    ends = lateinit._torch.without_modes.__exit__.__code__
    places = [p for p in places_of(scenario) if p[0][0] is ends]
    with pytest.raises(AssertionError, match="after the interrupt"):
        interrupt(scenario, places[0], held=False)
    torch._C._set_torch_function_state(torch._C._TorchFunctionState.ENABLED)
    torch._C._set_grad_enabled(True)
