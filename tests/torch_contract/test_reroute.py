"""The code of a function is exchanged in place, for whoever holds the function."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
from torch.nn import init

from lateinit._recording.postponed import INITIALISERS
from lateinit._torch import Rerouted


def doubled(value: int, *, plus: int = 1) -> int:
    return 2 * value + plus


def test_calls_of_a_function_go_elsewhere_by_every_name_and_come_back() -> None:
    """Of Python, not of torch: a function reads its code anew at each call."""
    held, seen = doubled, []

    def to(rerouted: Rerouted, *args: Any, **kwargs: Any) -> Any:
        seen.append((args, kwargs))
        return -rerouted.found(*args, **kwargs)

    before, signature = doubled.__code__, inspect.signature(doubled)
    rerouted = Rerouted(doubled, to)
    for _ in range(2):
        rerouted.begin()
        rerouted.begin()  # as after an interrupt
        assert (held(3), held(value=3, plus=2)) == (-7, -8)
        assert inspect.signature(held) == signature
        rerouted.end()
        rerouted.end()
        assert (held(3), held(3, plus=2)) == (7, 8)
    assert seen == [((3,), {}), ((), {"value": 3, "plus": 2})] * 2
    assert doubled.__code__ is before
    assert not vars(doubled)


@pytest.mark.parametrize("name", [heard.function.__name__ for heard in INITIALISERS])
def test_initialisers_have_no_closure_and_no_keyword_only_arguments_of_that_name(name: str) -> None:
    """torch/nn/init.py: plain functions, so that their code can be exchanged."""
    function = getattr(init, name)
    assert not function.__code__.co_freevars
    assert "_lateinit_to" not in inspect.signature(function).parameters
