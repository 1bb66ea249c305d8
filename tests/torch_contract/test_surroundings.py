"""What an interrupted call leaves in force is put back, whatever torch's own contexts have done."""

from __future__ import annotations

import gc
import threading
import warnings
from typing import Any

import pytest
import torch
from torch.utils import _python_dispatch

from lateinit._torch import surroundings
from lateinit._torch.modes import dispatch_modes, function_modes, set_functions_state
from lateinit._torch.surroundings import (
    Noted,
    here,
    is_turn_taken,
    let_full_collections_begin,
    let_full_collections_wait,
    mend,
    noted,
    noted_modes,
    restoring,
    turn,
    unhurried,
)
from tests.torch_contract.listeners import Functions, Operators


def leave_modes() -> None:
    Functions().__enter__()
    Operators().__enter__()


def leave_functions_disabled() -> None:
    set_functions_state(torch._C._TorchFunctionState.ALL_DISABLED)


def leave_warnings_off() -> None:
    warnings.catch_warnings(record=True).__enter__()


def leave_autocast() -> None:
    torch.autocast("cpu", torch.bfloat16).__enter__()
    torch.autocast_decrement_nesting()


LEAVING = [
    leave_modes,
    leave_functions_disabled,
    leave_warnings_off,
    leave_autocast,
    lambda: torch._C._set_grad_enabled(False),
    lambda: torch.set_default_dtype(torch.float64),
    lambda: torch.use_deterministic_algorithms(mode=True, warn_only=True),
    lambda: torch.device("meta").__enter__(),
    lambda: torch.__future__.set_swap_module_params_on_conversion(True),
]


def seen() -> tuple[Any, ...]:
    return (
        function_modes(),
        dispatch_modes(),
        _python_dispatch.is_in_torch_dispatch_mode(),
        torch._C._get_torch_function_state(),
        torch.is_grad_enabled(),
        torch.get_default_dtype(),
        torch.get_default_device(),
        torch.is_autocast_enabled("cpu"),
        torch.are_deterministic_algorithms_enabled(),
        torch.__future__.get_swap_module_params_on_conversion(),
        warnings.showwarning,
        warnings.filters,
    )


@pytest.mark.parametrize("leave", LEAVING)
def test_what_an_interrupted_call_has_left_is_put_back(leave: Any) -> None:
    """torch/utils/_python_dispatch.py and others: each __enter__ sets what only __exit__ resets."""

    @restoring
    def interrupted() -> None:
        leave()
        raise KeyboardInterrupt

    before = seen()
    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert seen() == before


def test_nothing_is_put_back_after_a_call_that_returns() -> None:
    """torch/__init__.py: a constructor may set the default dtype for good."""
    before = torch.get_default_dtype()
    try:
        restoring(torch.set_default_dtype)(torch.float64)
        assert torch.get_default_dtype() is torch.float64
    finally:
        torch.set_default_dtype(before)


def test_a_default_device_that_was_set_for_good_stays() -> None:
    """torch/__init__.py: set_default_device enters a mode, and expects it on the stack later."""
    before: Noted = noted()
    torch.set_default_device("meta")
    before.restore(None)
    try:
        assert torch.empty(1).is_meta
    finally:
        torch.set_default_device(None)


def test_modes_of_ours_that_have_ended_are_taken_off() -> None:
    """torch/overrides.py: _pop_mode_temporarily puts a mode back when its generator is dropped."""
    ended = Operators()
    with Operators() as live:
        ended.__enter__()
        ended.ended = True
        mend()
        assert dispatch_modes() == [live]
    assert here.block is None


def test_an_interrupted_thread_does_not_keep_its_turn() -> None:
    """Python's threading.RLock tells its owner, who may have acquired it several times."""
    lock = turn()

    @restoring
    def interrupted() -> None:
        lock.acquire()
        lock.acquire()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    taken: list[bool] = []
    other = threading.Thread(target=lambda: taken.append(lock.acquire(blocking=False)))
    other.start()
    other.join()
    assert taken == [True]


@pytest.mark.parametrize("leave", [leave_modes, leave_functions_disabled, *LEAVING[4:5]])
def test_modes_are_put_back_alone_where_nothing_else_is_changed(leave: Any) -> None:
    """torch/csrc/Module.cpp: the stacks, functions and the grad mode are kept for each thread."""
    before, known = seen(), noted_modes()
    dtype = torch.get_default_dtype()
    try:
        leave()
        torch.set_default_dtype(torch.float64)
        known.restore(None)
        assert torch.get_default_dtype() is torch.float64
    finally:
        torch.set_default_dtype(dtype)
    assert seen() == before


def test_a_thread_knows_whether_it_has_a_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lib/threading.py: an RLock that a thread has is acquired again; ``_is_owned`` tells."""
    # A thread that ended with a turn may have had the number of the thread below.
    monkeypatch.setattr(surroundings, "_turns", [])
    lock, seen = turn(), []
    with lock:
        thread = threading.Thread(target=lambda: seen.append(is_turn_taken()))
        thread.start()
        thread.join()
        assert is_turn_taken()
    assert not is_turn_taken()
    assert seen == [False]


def test_full_collections_wait_as_long_as_anybody_asks_for_it() -> None:
    """Lib/gc: the third threshold; the younger generations are collected, and whatever is asked."""
    before = gc.get_threshold()
    let_full_collections_wait("first")
    assert gc.get_threshold() == (*before[:2], surroundings._NEVER)
    let_full_collections_wait("second")
    let_full_collections_begin("first")
    assert gc.get_threshold() != before
    for _ in range(2):
        let_full_collections_begin("second")
        assert gc.get_threshold() == before


def test_an_interrupted_call_does_not_keep_full_collections_waiting() -> None:
    """Lib/gc: the thresholds are those of the process."""
    before, seen = gc.get_threshold(), []

    @restoring
    @unhurried
    def interrupted() -> None:
        seen.append(gc.get_threshold())
        let_full_collections_wait("interrupted")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert seen != [before]
    assert gc.get_threshold() == before
