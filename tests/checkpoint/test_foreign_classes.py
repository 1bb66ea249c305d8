"""Files in which objects of other libraries' classes stand beside tensors: none is unpickled."""

from __future__ import annotations

import argparse
import copy
import enum
import io
import os
import pathlib
import pickle
import textwrap
from collections import OrderedDict, defaultdict
from dataclasses import dataclass, field
from fractions import Fraction
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from torch import nn

import lateinit
from lateinit._checkpoint.formats.foreign_classes import (
    _Unpickler,
    foreign_in,
    without_foreign_classes,
)
from lateinit.errors import CorruptCheckpointError, MismatchError
from tests.support.snapshots import assert_same
from tests.support.twins import Net, assert_untouched, twins

if TYPE_CHECKING:
    from pathlib import Path

CALLED: list[str] = []


class Kind(enum.Enum):
    LARGE = "large"


class Noisy:
    """Notes that it was made or given a state."""

    def __init__(self, value: int) -> None:
        CALLED.append("made")
        self.value = value

    def __reduce__(self) -> Any:
        return Noisy, (self.value,), {"value": self.value}

    def __setstate__(self, state: Any) -> None:
        CALLED.append("given a state")


class Evil:
    def __reduce__(self) -> Any:
        return os.system, ("touch evil",)


class OwnDict(dict[str, Any]):
    """As of an attribute dict."""


class OwnList(list[Any]):
    """As of a list of a configuration."""


class Slotted:
    __slots__ = ("a",)


@dataclass
class Config:
    width: int = 3
    more: dict[str, Any] = field(default_factory=lambda: {"kind": Kind.LARGE})


def slotted() -> Slotted:
    made = Slotted()
    made.a = torch.ones(2)  # type: ignore[attr-defined]
    return made


def round_one() -> list[Any]:
    """An object that holds itself."""
    own: list[Any] = OwnList()
    own.append(own)
    return own


FOREIGN = {
    "a config": Config(),
    "a dict by enums": {Kind.LARGE: 1, Fraction(1, 2): {Kind.LARGE}},
    "a dict of its own": OwnDict(a=Config()),
    "a function": textwrap.dedent,
    "a list of its own": OwnList([Config(), 2]),
    "a namespace": argparse.Namespace(lr=0.1, path=pathlib.Path("x"), device=torch.device("cpu")),
    "a partial": partial(int, base=2),
    "a type": {"cls": nn.Linear, "n": int, "dtype": torch.float16},
    "an array": np.arange(3.0),
    "an evil one": Evil(),
    "counts": defaultdict(list, a=[Config()]),
    "itself": round_one(),
    "modules": [nn.Linear(2, 2)],
    "noisy ones": [Noisy(1), {Noisy(2): (Noisy(3),)}],
    "slots": slotted(),
}


@pytest.mark.parametrize("name", sorted(FOREIGN))
def test_tensors_beside_objects_of_any_class_are_loaded_and_none_is_called(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(5)
    trained = Net()
    state = OrderedDict((f"net.{n}", t) for n, t in trained.state_dict().items())
    run = {"epoch": 3, "state_dict": state, "hyper_parameters": {"config": FOREIGN[name]}}
    torch.save(
        {**run, "callbacks": {Config: FOREIGN["a config"]}} if name != "a type" else run, "a.ckpt"
    )
    CALLED.clear()
    _, model = twins(seed=9)
    lateinit.load_checkpoint(model, tmp_path / "a.ckpt")
    assert_same(trained, model)
    assert not CALLED
    assert not (tmp_path / "evil").exists()


def test_tensors_in_a_dict_of_another_class_are_found(tmp_path: Path) -> None:
    torch.manual_seed(5)
    trained = Net()
    torch.save(OwnDict(model=OwnDict(trained.state_dict()), lr=Kind.LARGE), tmp_path / "a.pt")
    _, model = twins(seed=9)
    lateinit.load_checkpoint(model, tmp_path / "a.pt")
    assert_same(trained, model)


def test_parameters_tensors_with_attributes_and_metadata_are_as_without_them(
    tmp_path: Path,
) -> None:
    trained = Net()
    state = trained.state_dict(keep_vars=True)
    next(iter(state.values())).tag = "first"
    extra = torch.ones(2, dtype=torch.uint16)
    extra.tag = "second"
    both = {"state_dict": state, "extra": [extra, b"bytes", {1}, 2j], "config": Config()}
    torch.save(both, tmp_path / "a.pt")
    found = without_foreign_classes(tmp_path / "a.pt")
    assert {n: type(t) for n, t in found["state_dict"].items()} == {
        n: type(t) for n, t in state.items()
    }
    assert all(torch.equal(t, state[n]) for n, t in found["state_dict"].items())
    assert found["state_dict"]._metadata == state._metadata
    assert found["extra"][0].equal(extra)
    assert found["extra"][1:] == both["extra"][1:]
    assert list(foreign_in(found)) == [f"{__name__}.Config"]
    assert list(foreign_in(copy.deepcopy(found))) == [f"{__name__}.Config"]


class WithState(nn.Linear):
    state: Any = None

    def get_extra_state(self) -> Any:
        return [self.state]

    def set_extra_state(self, state: Any) -> None:
        self.state = state


class Hooked(nn.Linear):
    def __init__(self) -> None:
        super().__init__(3, 2)
        self.register_load_state_dict_pre_hook(self._look)

    @staticmethod
    def _look(_: Any, state: Any, *rest: Any) -> None:
        state.pop("config", None)


def test_what_a_module_would_take_of_such_an_object_is_refused_by_name(tmp_path: Path) -> None:
    source = WithState(3, 2)
    source.state = Config()
    torch.save(source.state_dict(), tmp_path / "a.pt")
    model = lateinit.deferred_init(WithState, 3, 2)
    with pytest.raises(
        CorruptCheckpointError, match=r"could run any code: _extra_state \(.*\.Config\)\. Leave"
    ):
        lateinit.load_checkpoint(model, tmp_path / "a.pt")
    assert lateinit.is_deferred(model)
    lateinit.load_checkpoint(model, tmp_path / "a.pt", rename={"_extra_state": None}, strict=False)
    assert model.weight.equal(source.weight)
    assert model.state is None


def test_an_object_in_place_of_a_tensor_is_refused_by_name(tmp_path: Path) -> None:
    state = nn.Linear(3, 2).state_dict()
    torch.save({**state, "bias": Config()}, tmp_path / "a.pt")
    with pytest.raises(CorruptCheckpointError, match=r"any code: bias \(.*\.Config\)"):
        lateinit.load_checkpoint(nn.Linear(3, 2), tmp_path / "a.pt")


def test_an_object_beside_the_names_of_a_module_is_as_any_unexpected_name(tmp_path: Path) -> None:
    source = nn.Linear(3, 2)
    torch.save({**source.state_dict(), "config": Config()}, tmp_path / "a.pt")
    model = lateinit.deferred_init(nn.Linear, 3, 2)
    with pytest.raises(MismatchError, match="config"):
        lateinit.load_checkpoint(model, tmp_path / "a.pt")
    lateinit.load_checkpoint(model, tmp_path / "a.pt", strict=False)
    assert model.weight.equal(source.weight)


def test_a_hook_sees_no_such_object(tmp_path: Path) -> None:
    source = nn.Linear(3, 2)
    torch.save({**source.state_dict(), "config": Config()}, tmp_path / "a.pt")
    model = lateinit.deferred_init(Hooked)
    with pytest.raises(CorruptCheckpointError, match=r"rename=\{'config': None\}"):
        lateinit.load_checkpoint(model, tmp_path / "a.pt")
    lateinit.load_checkpoint(model, tmp_path / "a.pt", rename={"config": None})
    assert model.weight.equal(source.weight)


def test_a_file_of_the_old_format_is_refused_with_the_class(tmp_path: Path) -> None:
    run = {"state_dict": Net().state_dict(), "config": Config()}
    torch.save(run, tmp_path / "a.pt", _use_new_zipfile_serialization=False)
    eager, model = twins()
    with pytest.raises(CorruptCheckpointError, match=r"not unpickled.*\.Config"):
        lateinit.load_checkpoint(model, tmp_path / "a.pt")
    assert_untouched(eager, model)


def test_a_pickle_can_set_no_attribute_of_a_function_of_torch() -> None:
    # The function, and the state (None, {"marked": 1}), which `object` would take as attributes.
    pickled = b"ctorch._utils\n_rebuild_tensor_v2\nN}S'marked'\nI1\ns\x86b."
    assert _Unpickler(io.BytesIO(pickled)).load().marked == 1
    assert not hasattr(torch._utils._rebuild_tensor_v2, "marked")
    pickle.loads(pickled)
    assert torch._utils._rebuild_tensor_v2.marked == 1
    del torch._utils._rebuild_tensor_v2.marked


@pytest.mark.parametrize("named", ["builtins eval", "os system", "torch load", "torch.hub load"])
def test_no_function_that_a_pickle_names_is_called(named: str) -> None:
    module, name = named.split()
    pickled = f"c{module}\n{name}\n(S'1 / 0'\ntR.".encode()
    assert list(foreign_in(_Unpickler(io.BytesIO(pickled)).load())) == [f"{module}.{name}"]
