"""A check that cannot fail is a defect: each law test is run here on a lateinit that breaks it."""

from __future__ import annotations

import copy
import pickle
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

import lateinit
from tests.laws import test_identity, test_load, test_loud, test_order, test_parity, test_skip_init
from tests.support import building
from tests.support.models import MODELS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

LAWS = (test_identity, test_load, test_loud, test_order, test_parity, test_skip_init)
BY_NAME = {case.name: case for case in MODELS}

materialize, deferred, skip_init = lateinit.materialize, lateinit.deferred, lateinit.skip_init


def flips_a_bit(model: nn.Module, **options: Any) -> nn.Module:
    next(materialize(model, **options).parameters()).data.view(torch.int32).flatten()[0] ^= 1
    return model


def draws(model: nn.Module, **options: Any) -> nn.Module:
    torch.rand(1)
    return materialize(model, **options)


def forgets_the_stream_of_a_part(target: Any, only: Any = None, **options: Any) -> Any:
    whole = only is None and isinstance(target, nn.Sequential)
    return materialize(target, only=only, seed=None if whole else 7, **options)


def ignores_the_seed(model: nn.Module, seed: int) -> nn.Module:
    assert seed
    return materialize(model)


def computes_in_the_dtype_of_the_caller(model: nn.Module) -> nn.Module:
    return materialize(model, dtype=torch.get_default_dtype())


def makes_new_parameters(model: nn.Module) -> nn.Module:
    for module in materialize(model).modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(parameter.detach()))
    return model


def writes_again(model: nn.Module, **options: Any) -> nn.Module:
    with torch.no_grad():
        for parameter in materialize(model, **options).parameters():
            parameter.add_(1)
    return model


def leaves_an_element_unwritten(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        materialize(model)[0].weight.view(-1)[:1].copy_(torch.empty(1))
    return model


def thaws(model: nn.Module) -> nn.Module:
    return materialize(model).requires_grad_()


def casts_to_float(model: nn.Module) -> nn.Module:
    return materialize(model).float()


@contextmanager
def draws_nothing(**_: Any) -> Iterator[None]:
    with deferred(advance_rng=False):
        yield


@contextmanager
def always_advances(**_: Any) -> Iterator[None]:
    with deferred():
        yield


@contextmanager
def forgets_to_restore() -> Iterator[None]:
    try:
        with deferred():
            yield
    finally:
        torch.manual_seed(7)


def is_no_copy(model: nn.Module) -> nn.Module:
    return model


def reads_another_model(_: bytes) -> nn.Module:
    return building.deferred(BY_NAME["multilayer_perceptron"], seed=7)


def wipes_buffers(*arguments: Any) -> nn.Module:
    model = skip_init(*arguments)
    for buffer in model.buffers():
        buffer.fill_(7)
    return model


def materialises(model: nn.Module) -> str:
    return repr(materialize(model))


@dataclass(frozen=True, slots=True)
class Break:
    """A law, what breaks it, and what the law's test then says."""

    law: Callable[..., None]
    broken: Any
    message: str
    name: str = "materialize"
    owner: Any = lateinit
    case: str = "multilayer_perceptron"
    options: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.law.__name__}-{self.broken.__name__}"


PARITY = test_parity.test_materialised_model_equals_its_eager_twin
BREAKS = [
    Break(PARITY, flips_a_bit, "1 of 35 elements differ"),
    Break(PARITY, draws, r"torch\.equal"),
    Break(PARITY, draws_nothing, r"torch\.equal", name="deferred"),
    Break(PARITY, makes_new_parameters, "object: expected 0", case="one_parameter_under_two_names"),
    Break(
        test_parity.test_generator_can_be_left_where_it_was,
        always_advances,
        r"torch\.equal",
        name="deferred",
    ),
    Break(
        test_parity.test_another_seed_gives_what_eager_gives_from_it,
        ignores_the_seed,
        r"0\.weight: bits",
    ),
    Break(
        test_parity.test_surroundings_of_materialising_do_not_matter,
        computes_in_the_dtype_of_the_caller,
        r"0\.weight: dtype",
    ),
    Break(
        test_parity.test_no_element_is_left_unwritten,
        leaves_an_element_unwritten,
        r"0\.weight: bits: 1 of 35 .* found nan",
    ),
    Break(
        test_order.test_names_in_any_order_give_the_same_bits,
        forgets_the_stream_of_a_part,
        r"0\.weight: bits",
        options={"order": 0},
    ),
    Break(
        test_order.test_tensors_in_any_order_give_the_same_bits,
        forgets_the_stream_of_a_part,
        r"0\.weight: bits",
        options={"order": 0},
    ),
    Break(
        test_order.test_submodules_in_any_order_give_the_same_bits,
        forgets_the_stream_of_a_part,
        "bits",
    ),
    Break(
        test_order.test_tensors_recorded_side_by_side_do_not_disturb_each_other,
        writes_again,
        r"0\.weight: bits",
    ),
    Break(test_order.test_materialising_again_changes_nothing, writes_again, r"0\.weight: bits"),
    Break(
        test_identity.test_objects_stay_the_objects_they_were, makes_new_parameters, r"0\.weight"
    ),
    Break(
        test_identity.test_optimizer_built_before_trains_as_the_eager_twin,
        makes_new_parameters,
        r"0\.weight: bits",
    ),
    Break(test_identity.test_hooks_set_before_fire_after, makes_new_parameters, "accumulated"),
    Break(
        test_identity.test_deep_copy_of_a_deferred_model_is_a_model_of_its_own,
        is_no_copy,
        "assert not",
        name="deepcopy",
        owner=copy,
    ),
    Break(
        test_identity.test_pickled_deferred_model_materialises_to_the_same_bits,
        reads_another_model,
        r"0\.weight: bits",
        name="loads",
        owner=pickle,
    ),
    Break(
        test_parity.test_cast_of_a_deferred_model_is_honoured,
        casts_to_float,
        r"0\.weight: dtype",
        options={"cast": test_parity.CASTS["bfloat16"]},
    ),
    Break(
        test_parity.test_flags_set_on_a_deferred_model_are_kept, thaws, r"0\.weight: requires_grad"
    ),
    Break(
        test_load.test_state_dict_loaded_over_a_deferred_model_is_really_loaded,
        writes_again,
        r"0\.weight: bits",
    ),
    Break(test_load.test_what_a_state_dict_lacks_has_its_initial_value, writes_again, "bits"),
    Break(test_load.test_state_dict_assigned_to_a_deferred_model_is_kept, writes_again, "bits"),
    Break(
        test_skip_init.test_skip_init_keeps_true_buffers,
        wipes_buffers,
        "running_mean",
        name="skip_init",
        case="batch_norm_buffers",
    ),
    Break(
        test_loud.test_exception_inside_the_block_leaves_no_trace,
        forgets_to_restore,
        r"torch\.equal",
        name="deferred",
    ),
    Break(
        test_loud.test_asking_about_a_deferred_model_changes_nothing,
        materialises,
        "False",
        name="summary",
    ),
]


@pytest.mark.parametrize("harm", BREAKS, ids=str)
def test_law_fails_where_it_is_broken(
    harm: Break, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    if harm.law is test_parity.test_no_element_is_left_unwritten:
        request.getfixturevalue("fresh_memory_of_nan")
    harm.law(BY_NAME[harm.case], **harm.options)
    monkeypatch.setattr(harm.owner, harm.name, harm.broken)
    with pytest.raises(AssertionError, match=harm.message):
        harm.law(BY_NAME[harm.case], **harm.options)


def test_every_law_is_broken_once() -> None:
    broken = {harm.law for harm in BREAKS}
    alike = {  # which fail as another one does
        test_parity.test_surroundings_of_the_construction_are_kept,
        test_parity.test_inference_mode_around_materialising_does_not_matter,
        test_identity.test_graph_made_in_a_constructor_is_refused_rather_than_cut,
        test_identity.test_what_a_constructor_computed_can_be_written_in_place_afterwards,
    }
    every = {law for file in LAWS for name, law in vars(file).items() if name.startswith("test_")}
    assert every == broken | alike
