"""Moves, casts and copies in a block: what is a copy eagerly, what is not, and of which dtype."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from torch import nn

import lateinit

if TYPE_CHECKING:
    from collections.abc import Callable

CONVERSIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "type, a class": lambda t: t.type(torch.FloatTensor),
    "type, a name": lambda t: t.type("torch.FloatTensor"),
    "type, a dtype": lambda t: t.type(torch.float32),
    "type, another class": lambda t: t.type(torch.DoubleTensor),
    "type, another name": lambda t: t.type("torch.HalfTensor"),
    "type_as": lambda t: t.type_as(torch.ones(1)),
    "type_as, by name": lambda t: t.type_as(other=torch.ones(1)),
    "type_as, another": lambda t: t.type_as(torch.ones(1, dtype=torch.int64)),
    "to": lambda t: t.to("cpu"),
    "cpu": torch.Tensor.cpu,
    "as_tensor": torch.as_tensor,
    "as_tensor, by name": lambda t: torch.as_tensor(data=t),
    "as_tensor, a device": lambda t: torch.as_tensor(t, device="cpu"),
    "as_tensor, both": lambda t: torch.as_tensor(t, dtype=torch.float32, device="cpu"),
    "as_tensor, a dtype": lambda t: torch.as_tensor(t, dtype=torch.float64, device="cpu"),
    "asarray": torch.asarray,
    "asarray, both": lambda t: torch.asarray(t, dtype=torch.float32, device="cpu"),
    "asarray, copied": lambda t: torch.asarray(t, device="cpu", copy=True),
    "new": lambda t: torch.empty(0).new(t),
    "tensor": lambda t: t.clone().detach(),
    "tensor of numbers": lambda t: torch.tensor([t[0], 2.0]),
    "tensor of rows": lambda t: torch.tensor([[t[0], t[1]], (t[2], 5)], dtype=torch.float64),
    "as_tensor of numbers": lambda t: torch.as_tensor([t[0], t[1]]),
    "asarray of numbers": lambda t: torch.asarray([t[0], t[1]], dtype=torch.float16),
}


@pytest.mark.parametrize("convert", CONVERSIONS.values(), ids=list(CONVERSIONS))
def test_conversion_shares_memory_where_it_does_eagerly(
    convert: Callable[[torch.Tensor], torch.Tensor],
) -> None:
    def run() -> list[Any]:
        drawn = torch.randn(3)
        converted = convert(drawn)
        same = converted is drawn
        converted[:2] = 7
        return [drawn, converted, same]

    torch.manual_seed(0)
    expected = run()
    torch.manual_seed(0)
    found = lateinit.materialize(lateinit.deferred_init(run))
    assert found[2] == expected[2]
    for ours, theirs in zip(expected[:2], found[:2], strict=True):
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours, theirs)


def test_conversion_of_a_parameter_is_of_autograd_what_it_is_eagerly() -> None:
    def run() -> list[torch.Tensor]:
        parameter = nn.Parameter(torch.ones(3))
        detached = torch.asarray(parameter, device="cpu", requires_grad=False)
        return [torch.as_tensor(parameter, device="cpu"), detached]

    facts = [(t.requires_grad, t.is_leaf) for t in run()]
    found = lateinit.materialize(lateinit.deferred_init(run))
    assert [(t.requires_grad, t.is_leaf) for t in found] == facts


MOVES: dict[str, Callable[[torch.Tensor], nn.Module]] = {
    "a module": lambda t: nn.Linear(3, 3).to(t),
    "by name": lambda t: nn.Sequential(nn.Linear(3, 3)).to(tensor=t),
    "of another dtype": lambda t: nn.BatchNorm1d(3).to(t.double(), True),
    "a list": lambda t: nn.ParameterList([nn.Parameter(torch.ones(3))]).to(t),
    "a real module": nn.Linear(3, 3).to,
}


@pytest.mark.parametrize("move", MOVES.values(), ids=list(MOVES))
@pytest.mark.parametrize("after", [False, True], ids=["in a block", "after it"])
def test_module_moved_to_where_a_tensor_is_stays_or_is_converted(
    move: Callable[[torch.Tensor], nn.Module], after: bool
) -> None:
    torch.manual_seed(0)
    expected = move(torch.randn(3)).state_dict()
    torch.manual_seed(0)
    if after:
        found = move(lateinit.deferred_init(torch.randn, 3)).state_dict()
    else:
        found = lateinit.materialize(lateinit.deferred_init(lambda: move(torch.randn(3))))
        found = found.state_dict()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype
        assert torch.equal(found[name], value)


def test_name_of_the_type_is_that_of_the_finished_tensor() -> None:
    with lateinit.deferred():
        assert torch.ones(2).type() == "torch.FloatTensor"
        with pytest.raises(ValueError, match="invalid type"):
            torch.ones(2).type("torch.NoTensor")


INDICES: dict[str, Any] = {
    "rows": [0, 3],
    "from the end": [-1, 0],
    "a mask": [True, False, True, False],
    "none": [],
    "a range": range(2),
    "of numpy": [np.int64(0), np.int64(2)],
    "pairs": ([0, 1], [2, 3]),
    "tuples": ((0, 1), (2, 3)),
    "columns": (slice(None), [0, 2]),
    "a table": ([[0, 1], [2, 3]], 0),
    "with a slice": ([-1, 0], slice(1, 3)),
    "after others": (..., [0]),
    "with a new dim": (None, [1, 2]),
    "an array": np.array([0, 2]),
}


@pytest.mark.parametrize("index", INDICES.values(), ids=list(INDICES))
def test_list_as_an_index_takes_what_it_takes_eagerly(index: Any) -> None:
    def run() -> list[torch.Tensor]:
        table = torch.randn(4, 4)
        taken = table[index].clone()
        table[index] = 2.0
        parameter = nn.Parameter(torch.randn(4, 4))
        parameter.data[index] += 1
        return [table, taken, parameter]

    torch.manual_seed(0)
    expected = run()
    torch.manual_seed(0)
    found = lateinit.materialize(lateinit.deferred_init(run))
    assert all(map(torch.equal, found, expected))
