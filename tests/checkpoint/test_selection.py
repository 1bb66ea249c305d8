"""Checkpoints of training runs: the state dict of a module among others, under other names."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

import lateinit
from lateinit.errors import CheckpointError, CorruptCheckpointError, MismatchError
from tests.support.formats import FORMATS, SAFETENSORS, State
from tests.support.snapshots import assert_same
from tests.support.twins import Net, assert_untouched, twins

if TYPE_CHECKING:
    from pathlib import Path

NESTING = ("dcp", "old pt", "pt")


def trained() -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(8)
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters())
    for _ in range(2):
        step(model, optimizer)
    return model, optimizer


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    model(torch.arange(12.0).view(3, 4)).square().mean().backward()
    optimizer.step()


def under(prefix: str, state: State) -> State:
    return {prefix + name: value for name, value in state.items()}


def run_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> State:
    return {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": 3}


# What a run saves of a state dict, and what its names begin with then.
LAYOUTS: dict[str, tuple[Any, str]] = {
    "a list": (lambda s: [s, {"loss": torch.ones(1)}], "0."),
    "a run": (
        lambda s: {"model": s, "optimizer": {"state": {0: {"step": torch.ones(())}}}},
        "model.",
    ),
    "beside others": (lambda s: {**s, "optimizer": {"state": {0: {"step": torch.ones(())}}}}, ""),
    "in an app": (lambda s: {"app": {"model": s, "optim": {"lr": torch.ones(())}}}, "app.model."),
    "lightning": (
        lambda s: {
            "epoch": 3,
            "state_dict": under("model.", s),
            "optimizer_states": [{"state": {0: {"step": torch.ones(())}}, "param_groups": []}],
            "callbacks": {"best": torch.ones(())},
        },
        "state_dict.model.",
    ),
    "of a compiled module": (lambda s: {"state_dict": under("_orig_mod.", s)}, "state_dict."),
    "under several prefixes": (lambda s: {"net": under("module._orig_mod.a.", s)}, "net.module.a."),
}


@pytest.mark.parametrize("format_", NESTING)
@pytest.mark.parametrize("layout", sorted(LAYOUTS))
def test_the_state_dict_in_the_checkpoint_of_a_run_is_found(
    layout: str, format_: str, tmp_path: Path
) -> None:
    source, _ = trained()
    build, begins = LAYOUTS[layout]
    expected, model = twins()
    expected.load_state_dict(source.state_dict())
    state = build(source.state_dict())
    if format_ == "dcp" and isinstance(state, list):
        state = {str(number): value for number, value in enumerate(state)}
    report = lateinit.load_checkpoint(model, FORMATS[format_](state, tmp_path))
    assert_same(expected, model)
    assert report.under == begins
    assert not report.unexpected
    assert not begins or f"(under {begins!r})" in str(report)


@pytest.mark.parametrize("format_", sorted(FORMATS))
@pytest.mark.parametrize("prefix", ["_orig_mod.", "model.net.", "module."])
def test_a_prefix_is_found_in_every_format(prefix: str, format_: str, tmp_path: Path) -> None:
    source, _ = trained()
    expected, model = twins()
    expected.load_state_dict(source.state_dict())
    path = FORMATS[format_](under(prefix, source.state_dict()), tmp_path)
    lateinit.load_checkpoint(model, path)
    assert_same(expected, model)


def test_a_wrapper_in_the_middle_of_names_is_passed_over_on_both_sides(tmp_path: Path) -> None:
    source = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    wrapped = {
        n.replace("1.", "1._checkpoint_wrapped_module."): t for n, t in source.state_dict().items()
    }
    model = lateinit.deferred_init(lambda: nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)))
    lateinit.load_checkpoint(model, FORMATS["safetensors"](wrapped, tmp_path))
    assert_same(source, model)
    model = lateinit.deferred_init(lambda: nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)))
    compiled = nn.ModuleDict({"_orig_mod": model})  # as torch.compile calls it
    lateinit.load_checkpoint(compiled, FORMATS["pt"](source.state_dict(), tmp_path))
    assert_same(source, model)


def test_versions_and_extra_state_follow_their_modules(tmp_path: Path) -> None:
    class Counting(nn.Linear):
        epoch: Any = 0
        _version = 7

        def get_extra_state(self) -> Any:
            return {"epoch": self.epoch, "scales": [torch.ones(2)]}

        def set_extra_state(self, state: Any) -> None:
            self.epoch = state["epoch"], len(state["scales"])

        def _load_from_state_dict(self, state: Any, prefix: str, metadata: Any, *rest: Any) -> None:
            self.found = metadata.get("version")
            super()._load_from_state_dict(state, prefix, metadata, *rest)

    source = nn.Sequential(nn.Sequential(Counting(2, 2)))
    source[0][0].epoch = 5
    for format_ in NESTING:
        model = lateinit.deferred_init(lambda: nn.Sequential(Counting(2, 2)))
        path = FORMATS[format_]({"model": source.state_dict(), "other": torch.ones(1)}, tmp_path)
        lateinit.load_checkpoint(model, path)
        assert model[0].epoch == (5, 1)
        assert format_ == "dcp" or model[0].found == 7
        assert torch.equal(source[0][0].weight, model[0].weight)


def test_several_parts_that_fit_are_listed_and_one_can_be_named(tmp_path: Path) -> None:
    source, _ = trained()
    other = {name: torch.zeros_like(tensor) for name, tensor in source.state_dict().items()}
    for format_ in NESTING:
        state = {"model": source.state_dict(), "ema": under("module.", other)}
        path = FORMATS[format_](state, tmp_path)
        eager, model = twins()
        with pytest.raises(MismatchError, match=r"2 parts that fit Net.*key='model'") as caught:
            lateinit.load_checkpoint(model, path)
        assert "key='ema', prefix='module.'" in str(caught.value)
        assert_untouched(eager, model)
        lateinit.load_checkpoint(model, path, key="model")
        eager.load_state_dict(source.state_dict())
        assert_same(eager, model)
        eager, model = twins()
        lateinit.load_checkpoint(model, path, key="ema")
        assert not model.enc.weight.any()
        eager, model = twins()
        lateinit.load_checkpoint(model, path, prefix="module.")
        assert not model.enc.weight.any()


def test_what_a_found_prefix_leaves_out_is_an_error_unless_it_was_given(tmp_path: Path) -> None:
    source, _ = trained()
    state = {"state_dict": {**under("net.", source.state_dict()), "loss.weight": torch.ones(2)}}
    path = FORMATS["pt"](state, tmp_path)
    eager, model = twins()
    with pytest.raises(MismatchError, match=r"loss\.weight is not in.*\n  \(prefix='net\.' leaves"):
        lateinit.load_checkpoint(model, path)
    assert_untouched(eager, model)
    report = lateinit.load_checkpoint(model, path, prefix="net.")
    eager.load_state_dict(source.state_dict())
    assert_same(eager, model)
    assert not report.unexpected


RENAMES: dict[str, Any] = {
    "a dict": {"old.weight": "enc.weight", "old.bias": "enc.bias", "junk": None},
    "a function": lambda name: None if name == "junk" else name.replace("old.", "enc."),
}


@pytest.mark.parametrize("rename", sorted(RENAMES))
@pytest.mark.parametrize("format_", ["dcp", "pt", "safetensors"])
def test_names_are_renamed_after_key_and_prefix(format_: str, rename: str, tmp_path: Path) -> None:
    source, _ = trained()
    state = {n.replace("enc.", "old."): t for n, t in source.state_dict().items()}
    state["junk"] = torch.ones(1)
    expected, model = twins()
    expected.load_state_dict(source.state_dict())
    options = {} if format_ in SAFETENSORS else {"key": "run"}
    saved = under("a.", state) if format_ in SAFETENSORS else {"run": under("a.", state)}
    path = FORMATS[format_](saved, tmp_path)
    lateinit.load_checkpoint(model, path, prefix="a.", rename=RENAMES[rename], **options)
    assert_same(expected, model)


WRONG: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "a key that is not there": (
        {"key": "modle"},
        MismatchError,
        r"no name of Net there.*key='model' with",
    ),
    "a key of something else": (
        {"key": "optimizer.state.0"},
        MismatchError,
        "is not in the checkpoint",
    ),
    "a key that is no string": ({"key": 3}, TypeError, "key: a string is meant"),
    "a lost name": (
        {"rename": {"enk.weight": "a"}},
        MismatchError,
        r"no 'enk\.weight'; near: enc\.weight",
    ),
    "a name that is no string": ({"rename": lambda _: 3}, TypeError, "became a <class 'int'>"),
    "a prefix that is not there": ({"prefix": "modul."}, MismatchError, "no name of Net there"),
    "a rename of no kind": ({"rename": "x"}, TypeError, "rename: a function or a dict is meant"),
    "two names that become one": (
        {"key": "model", "rename": {"dec.bias": "enc.bias"}},
        MismatchError,
        r"two tensors for 'enc\.bias': model\.enc\.bias and model\.dec\.bias",
    ),
}


@pytest.mark.parametrize("wrong", sorted(WRONG))
@pytest.mark.parametrize("format_", ["dcp", "pt"])
def test_what_is_wrong_of_a_choice_is_told_before_anything_changes(
    format_: str, wrong: str, tmp_path: Path
) -> None:
    options, kind, message = WRONG[wrong]
    eager, model = twins()
    path = FORMATS[format_](run_of(*trained()), tmp_path)
    with pytest.raises(kind, match=message):
        lateinit.load_checkpoint(model, path, **options)
    assert_untouched(eager, model)


@pytest.mark.parametrize("format_", NESTING)
def test_a_run_of_another_model_is_not_called_corrupt(format_: str, tmp_path: Path) -> None:
    state = {"a": {"x": torch.ones(1)}, "b": {"y": torch.ones(1)}}
    eager, model = twins()
    with pytest.raises(CheckpointError, match="key='a' with 1 tensors") as caught:
        lateinit.load_checkpoint(model, FORMATS[format_](state, tmp_path), strict=False)
    assert not isinstance(caught.value, CorruptCheckpointError)
    assert_untouched(eager, model)


def test_a_dict_that_is_a_part_of_the_module_is_loaded_as_it_is(tmp_path: Path) -> None:
    source = nn.ModuleDict({"model": Net()})
    model = lateinit.deferred_init(lambda: nn.ModuleDict({"model": Net()}))
    path = FORMATS["dcp"]({"model": source["model"].state_dict(), "step": {"n": 3}}, tmp_path)
    lateinit.load_checkpoint(model, path)
    assert_same(source, model)


def test_the_outermost_dict_counts_first(tmp_path: Path) -> None:
    source, _ = trained()
    state = {**source.state_dict(), "ema": {"enc.weight": torch.zeros(8, 4)}}
    for format_ in NESTING:
        eager, model = twins()
        eager.load_state_dict(source.state_dict())
        lateinit.load_checkpoint(model, FORMATS[format_](state, tmp_path))
        assert_same(eager, model)


@pytest.mark.parametrize("format_", NESTING)
def test_a_run_goes_on_with_an_optimizer_that_was_built_over_the_deferred_model(
    format_: str, tmp_path: Path
) -> None:
    def build() -> nn.Module:
        return nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 2))

    source = build()
    theirs = torch.optim.AdamW(source.parameters())
    step(source, theirs)
    path = FORMATS[format_](run_of(source, theirs), tmp_path)
    saved = copy.deepcopy(theirs.state_dict())
    by_name = copy.deepcopy(get_optimizer_state_dict(source, theirs))
    step(source, theirs)
    for by_torch in ("load_state_dict", "set_optimizer_state_dict"):
        model = lateinit.deferred_init(build)
        optimizer = torch.optim.AdamW(model.parameters())
        lateinit.load_checkpoint(model, path)
        if by_torch == "load_state_dict":
            optimizer.load_state_dict(saved)
        else:
            set_optimizer_state_dict(model, optimizer, by_name)
        step(model, optimizer)
        assert_same(source, model)
