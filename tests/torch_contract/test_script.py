"""What ``_torch.script`` relies on in TorchScript."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lateinit._torch import (
    Held,
    RecursiveScriptModule,
    constants_of_script,
    construct_script_module,
    held_by_script,
)
from lateinit._torch.swap import swap

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit")


class Holder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))
        self.several = [torch.zeros(2)]
        self.count = 3

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x + self.several[0]


def test_a_scripted_module_holds_implementations_until_it_is_given_the_objects() -> None:
    """torch/csrc/jit/python/script_init.cpp: setattr stores the implementation of the object."""
    scripted = torch.jit.script(Holder())
    held: list[Held] = held_by_script([scripted])
    assert sorted(one.name for one in held) == ["several", "weight"]
    before = scripted(torch.ones(2))
    for one in held:
        for tensor in one.tensors():
            swap(tensor, torch.full((2,), 5.0))
    assert scripted(torch.ones(2)).equal(before)
    for one in held:
        one.put_back()
    assert scripted(torch.ones(2)).tolist() == [10.0, 10.0]
    assert scripted.weight is next(one.value for one in held if one.name == "weight")


@pytest.mark.parametrize(
    "make", [torch.jit.script, lambda m: torch.jit.trace(m, torch.ones(2)), nn.Sequential]
)
def test_every_scripted_module_is_made_by_one_function(
    make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch/jit/_script.py: RecursiveScriptModule._construct."""
    made: list[Any] = []

    def noted(module: Any, *args: Any) -> None:
        made.append(module)
        construct_script_module(module, *args)

    monkeypatch.setattr(RecursiveScriptModule, "__init__", noted)
    module = make(Holder())
    assert bool(made) == isinstance(module, torch.jit.ScriptModule)


def test_freezing_makes_constants_of_parameters() -> None:
    """torch/jit/_freeze.py: freeze puts them into the graph, where nothing can replace them."""
    frozen = torch.jit.freeze(torch.jit.script(Holder()).eval())
    assert held_by_script([frozen]) == []
    assert {tuple(constant.shape) for constant in constants_of_script(frozen)} == {(2,)}
    assert constants_of_script(Holder()) == []
