"""Ctrl-C at every line of lateinit: run a call once, then again for each line that it executed.

A *scenario* prepares something, makes one public call, and compares the result with the eager
twin. The call is interrupted at one line at a time, as `KeyboardInterrupt` would come there. Then
the surroundings are looked at, the same call is repeated, and an unrelated model is built, deferred
and eager. Lines of torch and of `contextlib` count if lateinit's code called them.
"""

from __future__ import annotations

import contextlib
import functools
import os
import random
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.overrides import _get_current_function_mode_stack
from torch.utils import _python_dispatch

import lateinit
from lateinit._recording import current
from tests.support.snapshots import assert_same

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import CodeType, FrameType

ROOT = Path(lateinit.__file__).parent
TORCH = Path(torch.__file__).parent
# Files of others in which an interrupt can come between two steps of a context manager.
CONTEXTS = frozenset(
    {
        contextlib.__file__,
        warnings.__file__,
        str(TORCH / "overrides.py"),
        str(TORCH / "utils" / "_python_dispatch.py"),
        str(TORCH / "utils" / "_device.py"),
        str(TORCH / "autograd" / "grad_mode.py"),
        str(TORCH / "amp" / "autocast_mode.py"),
    }
)
Place = tuple["CodeType", int]  # a line, or an instruction if `opcodes` are counted


class Trace:
    """Counts the lines that run in lateinit's files, and interrupts at one of them.

    Args:
        at: the place to interrupt at and how often it is passed before, None to count only.
        opcodes: the functions of which each instruction counts, by qualified name.
    """

    def __init__(self, at: tuple[Place, int] | None = None, opcodes: str = "") -> None:
        self.passed: dict[Place, int] = {}
        self._at = at
        self._opcodes = opcodes
        self.hit = False

    def __call__(self, frame: FrameType, event: str, _: Any) -> Any:
        if event == "call":
            # Whatever is raised in a __del__ is only printed.
            if not is_ours(frame) or is_in_del(frame):
                return None
            frame.f_trace_opcodes = bool(self._opcodes) and wants_opcodes(frame, self._opcodes)
        counted = "opcode" if frame.f_trace_opcodes else "line"
        if event == counted:
            code = frame.f_code
            place = (code, frame.f_lasti if frame.f_trace_opcodes else frame.f_lineno)
            passed = self.passed.get(place, 0)
            self.passed[place] = passed + 1
            if self._at is not None and not self.hit and self._at == (place, passed):
                self.hit = True
                raise KeyboardInterrupt
        return self

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        before = sys.gettrace()
        sys.settrace(self)
        try:
            yield
        finally:
            sys.settrace(before)


def wants_opcodes(frame: FrameType, names: str) -> bool:
    code = frame.f_code
    return getattr(code, "co_qualname", code.co_name) in names.split()  # from Python 3.11 on


@functools.cache
def is_lateinit(file: str) -> bool:
    return file.startswith(str(ROOT))


def is_in_del(frame: FrameType | None) -> bool:
    while frame is not None and str(ROOT) in frame.f_code.co_filename:
        if frame.f_code.co_name == "__del__":
            return True
        frame = frame.f_back
    return False


def is_ours(frame: FrameType | None) -> bool:
    """Whether a line belongs to lateinit, or to a context manager that lateinit entered."""
    while frame is not None and frame.f_code.co_filename in CONTEXTS:
        frame = frame.f_back
    return frame is not None and is_lateinit(frame.f_code.co_filename)


def ambience() -> dict[str, Any]:
    """All settings of the thread and the process that lateinit touches, and may not leave."""
    return {
        "default dtype": torch.get_default_dtype(),
        "default device": torch.get_default_device(),
        "gradients": torch.is_grad_enabled(),
        "inference mode": torch.is_inference_mode_enabled(),
        "autocast": [torch.is_autocast_enabled(kind) for kind in ("cpu", "cuda")],
        "autocast dtype": torch.get_autocast_dtype("cpu"),
        "autocast cache": torch.is_autocast_cache_enabled(),
        "determinism": torch.are_deterministic_algorithms_enabled(),
        "dispatch modes": _python_dispatch._get_current_dispatch_mode_stack(),
        "flags of dispatch modes": [
            _python_dispatch.is_in_torch_dispatch_mode(),
            _python_dispatch.is_in_torch_dispatch_mode(include_infra_modes=False),
        ],
        "function modes": _get_current_function_mode_stack(),
        "torch functions": torch._C._get_torch_function_state(),
        "excluded keys": str(torch._C._dispatch_tls_local_exclude_set()),
        "included keys": str(torch._C._dispatch_tls_local_include_set()),
        "recorder": current(),
        "swapping": torch.__future__.get_swap_module_params_on_conversion(),
        "registration hooks": [
            dict(hooks)
            for hooks in (
                nn.modules.module._global_parameter_registration_hooks,
                nn.modules.module._global_buffer_registration_hooks,
                nn.modules.module._global_module_registration_hooks,
            )
        ],
        "patched": [
            torch.get_rng_state,
            torch.manual_seed,
            nn.init._no_grad_trunc_normal_,
            nn.Parameter.__dict__["__new__"],
            torch.max_pool1d,
        ],
        "warning filters": list(warnings.filters),
        "random state": torch.default_generator.get_state().numpy().tobytes(),
    }


@dataclass
class Scenario:
    """One public call.

    Attributes:
        name: what it is called.
        prepare: makes what the call needs, anew each time; it is not interrupted.
        call: the call.
        check: compares what it gave with the eager twin.
        opcodes: the functions of which each instruction is interrupted, by qualified name.
        draws: whether what is done when the interrupt comes has moved the generator for good.
    """

    name: str
    prepare: Callable[[], Any]
    call: Callable[[Any], Any]
    check: Callable[[Any, Any], None]
    opcodes: str = ""
    draws: bool = False

    def __str__(self) -> str:
        return self.name


def places_of(scenario: Scenario) -> list[tuple[Place, int]]:
    """Every place that the call executes, with how often it was passed: the first and last time."""
    given = scenario.prepare()
    trace = Trace(opcodes=scenario.opcodes)
    with trace.running():
        made = scenario.call(given)
    scenario.check(given, made)
    return [(p, n) for p, count in trace.passed.items() for n in sorted({0, count - 1})]


def named(at: tuple[Place, int]) -> str:
    (code, line), passed = at
    file = Path(code.co_filename)
    return f"{file.parent.name}/{file.name}:{line} in {code.co_name} ({passed})"


def interrupt(scenario: Scenario, at: tuple[Place, int], *, held: bool) -> bool:
    """Interrupt the call at one place, repeat it, and check what it leaves; whether it was hit.

    Args:
        scenario: the call.
        at: the place.
        held: keep the exception, and so every frame in its traceback, until after the repeat.
    """
    given = scenario.prepare()
    before = ambience()
    if scenario.draws:
        before.pop("random state")
    trace = Trace(at, scenario.opcodes)
    caught: BaseException | None = None
    try:
        with trace.running():
            scenario.call(given)
    except BaseException as error:  # noqa: BLE001 - an interrupt may also come out wrapped
        caught = error if held else None
        kind = type(error)
    else:
        return trace.hit  # swallowed, by what retries or does without
    if not trace.hit:
        raise AssertionError(f"the call raised by itself: {kind}") from caught
    assert kind is KeyboardInterrupt, kind
    if not held:
        same(before, ambience(), "after the interrupt")
    made = scenario.call(given)
    scenario.check(given, made)
    if caught is not None:
        del caught
        now = ambience()
        now.pop("random state")
        same({key: before[key] for key in now}, now, "after the traceback was dropped")
    unrelated()
    return True


def same(before: dict[str, Any], after: dict[str, Any], when: str) -> None:
    for key, value in before.items():
        found = after[key]
        if key == "random state":
            assert value == found, f"{when}: random state"
        else:
            assert value == found, f"{when}: {key}: {found} instead of {value}"


def unrelated() -> None:
    """Another model, built eagerly and deferred, is right."""

    def build() -> nn.Module:
        return nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5))

    torch.manual_seed(5)
    eager = build()
    assert not eager[0].weight.is_meta
    torch.manual_seed(5)
    with lateinit.deferred():
        late = build()
    assert_same(eager, lateinit.materialize(late))


def sample(places: list[Any], most: int) -> list[Any]:
    """Some of them: others in each run, but in CI always the same."""
    if len(places) <= most:
        return places
    chosen = random.Random(0 if os.environ.get("CI") else None).sample(range(len(places)), most)
    return [places[i] for i in sorted(chosen)]
