"""Native fills are used where they may be, and torch's where they may not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import lateinit
from lateinit import _native
from lateinit._rng import fills, mt19937, truncated_normal
from lateinit._rng.truncated_normal import Normal

native = pytest.mark.skipif(
    not (fills.is_native("aten::uniform_", torch.float32) and mt19937._is_native()),
    reason="there are no native kernels",
)


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The native functions that are called."""
    names: list[str] = []

    def noting(name: str) -> None:
        function = getattr(_native, name)

        def noted(*args: Any) -> Any:
            names.append(name)
            return function(*args)

        monkeypatch.setattr(_native, name, noted)

    for name in ("fill", "normal_at", "jump"):
        noting(name)
    return names


@native
def test_materialising_draws_natively(called: list[str]) -> None:
    model = lateinit.materialize(lateinit.deferred_init(nn.Linear, 30, 41))
    assert not lateinit.is_deferred(model)
    assert called.count("fill") == 2


@native
def test_the_words_of_other_parameters_are_jumped_over_natively(called: list[str]) -> None:
    model = lateinit.deferred_init(nn.Linear, 300, 41)
    called.clear()
    lateinit.materialize(model, only="bias")
    assert called.count("jump") == 1
    assert called.count("fill") == 1


@native
def test_rounds_of_redrawing_are_searched_natively(called: list[str]) -> None:
    state = mt19937.state_of(torch.Generator().manual_seed(0))
    _, late = truncated_normal.after(state, torch.float32, 5000, Normal(0, 1, -2, 2), most=5000)
    assert late is not None
    assert called.count("normal_at") > 1


def test_few_elements_are_left_to_torch(called: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_native, "WORTH", 2000)
    lateinit.materialize(lateinit.deferred_init(nn.Linear, 30, 41))
    assert "fill" not in called


@pytest.mark.parametrize("numbers", [(), (0.5,), (-1, 2), (False, True)])
@pytest.mark.parametrize("op", ["aten::normal_", "aten::uniform_"])
def test_numbers_that_a_call_leaves_out_are_those_of_torch(
    op: str, numbers: tuple[float, ...]
) -> None:
    ours, theirs = torch.zeros(2, 100)
    ours_from, theirs_from = (torch.Generator().manual_seed(1) for _ in range(2))
    (theirs.normal_ if op == "aten::normal_" else theirs.uniform_)(*numbers, generator=theirs_from)
    if fills.fill(op, ours, numbers, ours_from):
        assert torch.equal(ours, theirs)
        assert torch.equal(ours_from.get_state(), theirs_from.get_state())


def test_other_ops_are_left_to_torch() -> None:
    generator = torch.Generator().manual_seed(0)
    assert not fills.fill("aten::exponential_", torch.zeros(100), (1.0,), generator)
    assert not fills.fill("aten::normal_", torch.zeros(100, dtype=torch.int64), (), generator)
