"""Frames of Python as torch's functions and libraries leave them on the stack."""

from __future__ import annotations

import contextlib
import inspect
import sys
from typing import Any

import pytest
import torch
from torch import fx, nn

from lateinit._torch.frames import (
    Caller,
    call_path,
    caller,
    calling_modules,
    close_contexts,
    frame_above,
    innermost_foreign_line,
    is_frame_of,
    is_library,
    is_on_stack,
    is_running,
    stack_depth,
    upwards,
)
from tests.torch_contract.listeners import Functions, function_of


def test_a_frame_is_counted_from_the_function_that_asks() -> None:
    """sys._getframe: a C function has no frame, so a property's getter is called by its reader."""

    def helper(above: int) -> str:  # as those of callers.py
        return frame_above(above).f_code.co_name

    def ask() -> tuple[str, str]:
        return helper(0), helper(1)

    here = "test_a_frame_is_counted_from_the_function_that_asks"
    assert ask() == ("ask", here)
    assert next(frame.f_code.co_name for frame in upwards(inspect.currentframe())) == here
    assert list(upwards(None)) == []


def test_the_frames_above_a_module_are_those_of_torch_that_call_it() -> None:
    """torch/nn/modules/module.py: _wrapped_call_impl calls _call_impl, which calls forward."""
    layer = nn.Identity()
    layer.forward = lambda *_: [f.f_code.co_name for f in upwards(inspect.currentframe())][:3]
    assert layer(1) == ["<lambda>", "_call_impl", "_wrapped_call_impl"]


def test_the_modules_of_callers_are_told_innermost_first() -> None:
    """A frame has the name of its module among its globals."""
    ask = function_of("some.module", "ask()", ask=lambda: list(calling_modules()))
    told = ask()
    assert told[:3] == [__name__, "some.module", __name__]
    assert "_pytest.python" in told


def test_an_initialiser_that_asks_a_mode_is_two_frames_above_it() -> None:
    """torch/nn/init.py, torch/overrides.py: kaiming_uniform_ calls handle_torch_function."""
    code, other = nn.init.kaiming_uniform_.__code__, nn.init.normal_.__code__
    asks = lambda: (is_running(code, 1), is_running(code, 2), is_running(other, 9))  # noqa: E731
    with Functions(asks) as mode:
        nn.init.kaiming_uniform_(torch.ones(2, 2))
    assert mode.answers[mode.heard.index(nn.init.kaiming_uniform_)] == (False, True, False)


def test_torch_s_python_is_under_one_folder_and_graphs_have_no_file() -> None:
    """torch/fx/graph_module.py: generated code is of ``<eval_with_key>``, whichever line it has."""
    traced = fx.symbolic_trace(nn.Sequential(nn.ReLU()))
    assert traced.forward.__code__.co_filename.startswith("<eval_with_key>")
    assert [is_library(f) for f in (nn.__file__, inspect.getfile(caller), __file__)] == [1, 1, 0]
    found: list[Any] = []
    traced.get_submodule("0").forward = function_of(
        "torch", "found.append(ask())", found=found, ask=innermost_foreign_line
    )
    traced(torch.ones(1))
    line = inspect.currentframe().f_lineno - 1
    assert found == [f"{__file__}:{line} in {inspect.currentframe().f_code.co_name}"]


def entered() -> Caller:
    return caller(0)


def test_a_frame_is_on_the_stack_until_it_returns() -> None:
    """Python gives each running call a frame, and frees it when it returns."""
    here = caller(0)
    assert is_on_stack(here)
    assert list(map(is_on_stack, [here]))
    assert here.thread
    assert not is_on_stack(entered())


def test_a_frame_is_known_by_its_file_or_its_function() -> None:
    """Python's gc gives frames among those who refer to an object, while a traceback holds them."""
    frame = inspect.currentframe()
    assert is_frame_of(frame, __file__, entered)
    assert is_frame_of(frame, "elsewhere.py", test_a_frame_is_known_by_its_file_or_its_function)
    assert not is_frame_of(frame, "elsewhere.py", entered)
    assert not is_frame_of([frame], __file__, entered)


def test_a_context_manager_whose_exit_was_interrupted_is_run_to_its_end() -> None:
    """torch/overrides.py: _pop_mode_temporarily is a generator that contextlib ends."""
    ends: list[str] = []

    @contextlib.contextmanager
    def context() -> Any:
        try:
            yield
        finally:
            ends.append("end")

    def trace(frame: Any, event: str, _: Any) -> Any:
        if frame.f_code is contextlib._GeneratorContextManager.__exit__.__code__:
            raise KeyboardInterrupt
        return None

    before = sys.gettrace()
    with pytest.raises(KeyboardInterrupt) as caught:  # noqa: PT012 - the end of the block raises
        sys.settrace(trace)
        try:
            with context():
                pass
        finally:
            sys.settrace(before)
    assert ends == []
    close_contexts(caught.value.__traceback__)
    assert ends == ["end"]


def test_a_call_path_tells_places_in_one_line_apart_and_leaves_torch_out() -> None:
    """torch/nn/modules/module.py: ``__call__`` and ``_call_impl`` lie between two frames."""

    def path() -> Any:
        return call_path(base)

    class Asking(nn.Module):
        def forward(self) -> Any:
            return path(), path()

    base = stack_depth()
    # A generator has a frame of its own; a comprehension has none since Python 3.12 (PEP 709).
    once, twice = path(), tuple(path() for _ in range(2))
    assert once != twice[0]
    assert twice[0] == twice[1]
    # Through nn.Module.__call__, whose frames are torch's.
    first, second = Asking()()
    assert first != second
    assert [code.co_name for code, _ in first][:2] == ["path", "forward"]
    assert not any(is_library(code.co_filename) for code, _ in first)
