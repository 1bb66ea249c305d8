"""What ``_torch.script`` relies on in TorchScript."""

from __future__ import annotations

import io
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
    note_new_scripts,
    noted_scripts,
    tell_of_script_saves,
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


@pytest.mark.parametrize("make", [torch.jit.script, lambda m: torch.jit.trace(m, torch.ones(2))])
def test_saving_a_scripted_module_calls_a_method_of_it(make: Any, tmp_path: Any) -> None:
    """torch/jit/_serialization.py: save calls ``m.save`` or ``m.save_to_buffer``."""
    told: list[Any] = []
    module = make(Holder())
    tell_of_script_saves(lambda m, *_, **__: told.append(m))
    try:
        torch.jit.save(module, tmp_path / "a.pt")
        torch.jit.save(module, io.BytesIO())
        module.save(str(tmp_path / "b.pt"))
    finally:
        tell_of_script_saves(None)
    assert told == [module] * 3
    torch.jit.save(module, io.BytesIO())
    assert len(told) == 3


def test_saving_a_scripted_module_asks_no_tensor_on_meta_for_its_values() -> None:
    """torch/csrc/jit/serialization/export_module.cpp: else the guard would hear it."""
    module = torch.jit.script(Holder().to("meta"))
    file = io.BytesIO()
    torch.jit.save(module, file)
    file.seek(0)
    assert torch.jit.load(file).weight.is_meta


@pytest.mark.parametrize("make", [torch.jit.script, lambda m: torch.jit.trace(m, torch.ones(2))])
def test_every_scripted_module_is_made_by_one_constructor(make: Any) -> None:
    """torch/jit/_script.py: RecursiveScriptModule.__init__, for traced modules too."""
    note_new_scripts(on=True)
    try:
        module = make(Holder())
        assert any(found is module or found._c is module._c for found in noted_scripts())
    finally:
        note_new_scripts(on=False)
    assert RecursiveScriptModule.__init__ is construct_script_module
    assert make(Holder()) not in noted_scripts()
