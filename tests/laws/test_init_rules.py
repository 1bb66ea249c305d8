"""The laws under ``init=``: rules act on finished values, and on nothing else."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

import lateinit
from lateinit.errors import SeedError
from tests.support.building import SEED, deferred, eager, models
from tests.support.rules import apply_rules, state_after
from tests.support.snapshots import assert_same
from tests.support.sweep import EVERYTHING

if TYPE_CHECKING:
    from pathlib import Path

    from tests.support.cases import Case


def some(case: Case) -> bool:
    """Every third case, which keeps the time of these laws small."""
    return EVERYTHING or sum(map(ord, case.name)) % 3 == 0


def ruled(case: Case) -> dict[str, Any]:
    """A rule for every second deferred floating-point parameter that has memory of its own."""
    model = deferred(case)
    owners: dict[int, int] = {}
    for parameter in model.parameters():
        if lateinit.is_deferred(parameter):
            key = parameter.untyped_storage()._cdata
            owners[key] = owners.get(key, 0) + 1
    every = [
        name
        for name, parameter in model.named_parameters()
        if lateinit.is_deferred(parameter)
        and parameter.is_floating_point()
        and owners[parameter.untyped_storage()._cdata] == 1
    ]
    kinds = (nn.init.normal_, nn.init.uniform_, nn.init.ones_, lateinit.init.trunc_normal(std=0.3))
    return {name: kinds[i % len(kinds)] for i, name in enumerate(every[::2])}


@models(some)
def test_rules_act_as_initialisers_called_after_construction(case: Case) -> None:
    rules = ruled(case)
    if not rules:
        return
    expected = apply_rules(eager(case), rules, state_after(SEED))
    model = deferred(case)
    before = torch.get_rng_state()
    assert_same(expected, lateinit.materialize(model, init=rules))
    assert torch.equal(before, torch.get_rng_state())
    # Order: parts first, in another order.
    model = deferred(case)
    for name in reversed(rules):
        lateinit.materialize(model, only=name, init={name: rules[name]})
    assert_same(expected, lateinit.materialize(model, init=rules))


@models(some)
def test_another_seed_moves_rules_as_eager_construction_would(case: Case) -> None:
    rules = ruled(case)
    if not rules:
        return
    expected, model = apply_rules(eager(case, seed=5), rules, state_after(5)), deferred(case)
    try:
        lateinit.materialize(model, seed=5, init=rules)
    except SeedError:
        assert case.reads_random
    else:
        assert_same(expected, model)


@models(lambda case: case.loads and some(case))
def test_rules_are_saved_and_loaded(case: Case, tmp_path: Path) -> None:
    rules = ruled(case)
    model = deferred(case)
    if not rules or any(t.is_complex() for t in model.state_dict().values()):
        return
    path = tmp_path / "saved.safetensors"
    lateinit.save_checkpoint(model, path, init=rules)
    assert lateinit.is_deferred(model)
    expected = lateinit.materialize(deferred(case), init=rules)
    lateinit.materialize(model)  # saving has left it as it was
    assert_same(eager(case), model)
    loaded = deferred(case)
    lateinit.load_checkpoint(loaded, path)
    assert {n: t.detach().sum().item() for n, t in loaded.named_parameters() if t.numel()} == {
        n: t.detach().sum().item() for n, t in expected.named_parameters() if t.numel()
    }
