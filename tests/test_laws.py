"""The laws of construction, each over every model of `tests.models`."""

from __future__ import annotations

import copy
import pickle
import random
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

import lateinit
from lateinit.errors import DeferredTensorError, SeedError
from tests.laws import SEED, deferred, eager, step, trainable
from tests.models import MODELS
from tests.snapshots import assert_same, snapshot, tensors_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.cases import Case


def models(which: Callable[[Case], bool] = lambda _: True) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", [case for case in MODELS if which(case)], ids=str)


# Law 1: parity.


@models()
def test_materialised_model_equals_its_eager_twin(case: Case) -> None:
    expected, ended = eager(case), torch.get_rng_state()
    model = deferred(case)
    assert torch.equal(ended, torch.get_rng_state())
    torch.manual_seed(99)
    elsewhere = torch.get_rng_state()
    assert lateinit.materialize(model) is model
    assert torch.equal(elsewhere, torch.get_rng_state())
    assert not lateinit.is_deferred(model)
    assert_same(expected, model)


@models()
def test_generator_can_be_left_where_it_was(case: Case) -> None:
    expected = eager(case)
    torch.manual_seed(SEED)
    before = torch.get_rng_state()
    model = deferred(case, advance_rng=False)
    assert torch.equal(before, torch.get_rng_state())
    assert_same(expected, lateinit.materialize(model))


@models()
def test_another_seed_gives_what_eager_gives_from_it(case: Case) -> None:
    model = deferred(case)
    try:
        lateinit.materialize(model, seed=5)
    except SeedError:
        assert case.reads_random
        assert_same(eager(case), lateinit.materialize(model))
    else:
        assert_same(eager(case, seed=5), model)


@contextmanager
def another_default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@models()
def test_surroundings_of_the_construction_are_kept(case: Case) -> None:
    with another_default_dtype(torch.float64):
        expected = eager(case)
        model = deferred(case)
    assert_same(expected, lateinit.materialize(model))


@models()
def test_surroundings_of_materialising_do_not_matter(case: Case) -> None:
    model = deferred(case)
    with ExitStack() as stack:
        stack.enter_context(another_default_dtype(torch.bfloat16))
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch.autocast("cpu", dtype=torch.bfloat16))
        stack.enter_context(torch.device("meta"))
        lateinit.materialize(model)
    assert_same(eager(case), model)


@models()
def test_inference_mode_around_materialising_does_not_matter(case: Case) -> None:
    model = deferred(case)
    with torch.inference_mode():
        lateinit.materialize(model)
    assert_same(eager(case), model)


@pytest.mark.usefixtures("fresh_memory_of_nan")
@models()
def test_no_element_is_left_unwritten(case: Case) -> None:
    expected = eager(case)
    assert_same(expected, lateinit.materialize(deferred(case)))


# Law 2: order.


def shuffled(things: list[Any], order: int) -> list[Any]:
    return random.Random(order).sample(things, len(things))


@pytest.mark.parametrize("order", range(2))
@models()
def test_names_in_any_order_give_the_same_bits(case: Case, order: int) -> None:
    model = deferred(case)
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    names += [name for name, _ in model.named_buffers(remove_duplicate=False)]
    for name in shuffled(names, order):
        lateinit.materialize(model, only=[name])
        owner, _, last = name.rpartition(".")
        assert not lateinit.is_deferred(getattr(model.get_submodule(owner), last))
    assert_same(eager(case), lateinit.materialize(model))


@pytest.mark.parametrize("order", range(2))
@models()
def test_tensors_in_any_order_give_the_same_bits(case: Case, order: int) -> None:
    model = deferred(case)
    for _, tensor in shuffled(tensors_of(model), order):
        assert lateinit.materialize(tensor) is tensor
    assert_same(eager(case), model)


@models()
def test_submodules_in_any_order_give_the_same_bits(case: Case) -> None:
    model = deferred(case)
    for module in shuffled(list(model.modules()), 0):
        lateinit.materialize(module)
    assert_same(eager(case), model)


@models()
def test_tensors_recorded_side_by_side_do_not_disturb_each_other(case: Case) -> None:
    torch.manual_seed(SEED)
    expected = [MODELS[0].build(), case.build(), MODELS[0].build()]
    torch.manual_seed(SEED)
    with lateinit.deferred():
        first = MODELS[0].build()
        middle = case.build()
        last = MODELS[0].build()
    for model in (last, middle, first):
        lateinit.materialize(model)
    for twin, model in zip(expected, (first, middle, last), strict=True):
        assert_same(twin, model)


@models()
def test_materialising_again_changes_nothing(case: Case) -> None:
    model = lateinit.materialize(deferred(case))
    with torch.inference_mode(mode=any(t.is_inference() for _, t in tensors_of(model))):
        for parameter in model.parameters():
            parameter.data.zero_()
    changed = snapshot(model)
    assert_same(changed, lateinit.materialize(model))


# Law 8: identity.


@models()
def test_objects_stay_the_objects_they_were(case: Case) -> None:
    model = deferred(case)
    before = tensors_of(model)
    lateinit.materialize(model)
    for (path, tensor), (_, after) in zip(before, tensors_of(model), strict=True):
        assert tensor is after, path


@models(lambda case: case.trains)
def test_optimizer_built_before_trains_as_the_eager_twin(case: Case) -> None:
    expected, model = eager(case), deferred(case)
    if not trainable(expected):
        assert not trainable(model)
        return
    optimizers = [
        torch.optim.SGD(trainable(twin), lr=0.1, momentum=0.9) for twin in (expected, model)
    ]
    lateinit.materialize(model)
    for _ in range(2):
        step(expected, optimizers[0])
        step(model, optimizers[1])
    assert_same(expected, model)


@models(lambda case: case.trains)
def test_hooks_set_before_fire_after(case: Case) -> None:
    model = deferred(case)
    fired = []
    for index, parameter in enumerate(trainable(model)):
        parameter.register_hook(lambda _, index=index: fired.append(("gradient", index)))
        parameter.register_post_accumulate_grad_hook(
            lambda _, index=index: fired.append(("accumulated", index))
        )
    lateinit.materialize(model)
    if count := len(trainable(model)):
        step(model, torch.optim.SGD(trainable(model)))
        assert sorted(fired) == [
            (kind, index) for kind in ("accumulated", "gradient") for index in range(count)
        ]


def test_graph_made_in_a_constructor_is_refused_rather_than_cut() -> None:
    case = next(case for case in MODELS if case.name == "attribute_that_is_not_a_leaf")
    expected, model = eager(case), lateinit.materialize(deferred(case))
    expected.normalised.square().sum().backward()
    with pytest.raises(DeferredTensorError, match="its graph was not"):
        model.normalised.square().sum().backward()


# What users do to a model between recording and materialising.


@models(lambda case: case.deepcopies)
def test_deep_copy_of_a_deferred_model_is_a_model_of_its_own(case: Case) -> None:
    expected, model = eager(case), deferred(case)
    copied = copy.deepcopy(model)
    lateinit.materialize(copied)
    assert_same(copy.deepcopy(expected), copied)
    theirs = {tensor.untyped_storage()._cdata for _, tensor in tensors_of(copied)}
    lateinit.materialize(model)
    assert_same(expected, model)
    ours = {tensor.untyped_storage()._cdata for _, tensor in tensors_of(model)}
    assert not ours & theirs


# What is inside a graph or was made in inference mode comes out of a pickle as a plain leaf.
@models(lambda case: case.pickles and case.deepcopies and case.trains)
def test_pickled_deferred_model_materialises_to_the_same_bits(case: Case) -> None:
    expected, model = eager(case), deferred(case)
    loaded = pickle.loads(pickle.dumps(model))
    assert_same(expected, lateinit.materialize(loaded))


CASTS = {
    "bfloat16": lambda model: model.bfloat16(),
    "half and back": lambda model: model.half().float(),
    "double": lambda model: model.double(),
}


@pytest.mark.parametrize("cast", CASTS.values(), ids=CASTS.keys())
@models(lambda case: case.casts)
def test_cast_of_a_deferred_model_is_honoured(case: Case, cast: Callable[..., nn.Module]) -> None:
    expected, model = eager(case), deferred(case)
    try:
        cast(expected)
    except RuntimeError:  # what eager refuses is no model to compare with
        return
    assert_same(expected, lateinit.materialize(cast(model)))


@models()
def test_flags_set_on_a_deferred_model_are_kept(case: Case) -> None:
    expected, model = eager(case), deferred(case)
    for twin in (expected, model):
        twin.eval()
        for parameter in twin.parameters():
            if parameter.is_floating_point():
                parameter.requires_grad_(not parameter.requires_grad)
    assert_same(expected, lateinit.materialize(model))


def other_values(model: nn.Module) -> dict[str, torch.Tensor]:
    """A checkpoint for `model` with the same ties and none of the same floating-point values."""
    return {
        name: tensor.clone() if tensor.dtype.itemsize == 1 else tensor.clone().mul_(3)
        for name, tensor in model.state_dict().items()
    }


@models(lambda case: case.loads)
def test_state_dict_loaded_over_a_deferred_model_is_really_loaded(case: Case) -> None:
    expected, model = eager(case), deferred(case)
    state = other_values(expected)
    expected.load_state_dict(state)
    model.load_state_dict(state)
    assert_same(expected, lateinit.materialize(model))


@models(lambda case: case.loads)
def test_what_a_state_dict_lacks_has_its_initial_value(case: Case) -> None:
    expected, model = eager(case), deferred(case)
    state = dict(list(other_values(expected).items())[::2])
    expected.load_state_dict(state, strict=False)
    model.load_state_dict(state, strict=False)
    assert_same(expected, lateinit.materialize(model))


@models(lambda case: case.loads)
def test_state_dict_assigned_to_a_deferred_model_is_kept(case: Case) -> None:
    expected, model = eager(case), deferred(case)
    state = other_values(expected)
    expected.load_state_dict(state, assign=True)
    model.load_state_dict(copy.deepcopy(state), assign=True)
    assert_same(expected, lateinit.materialize(model))


# skip_init: parameters allocated, buffers true.


class Holder(nn.Module):
    def __init__(self, case: Case) -> None:
        super().__init__()
        self.held = case.build()


@models()
def test_skip_init_keeps_true_buffers(case: Case) -> None:
    expected = snapshot(eager(case))
    torch.manual_seed(SEED)
    model = lateinit.skip_init(Holder, case).held
    assert not lateinit.is_deferred(model)
    found = snapshot(model)
    assert found.tensors.keys() == expected.tensors.keys()
    parameters = {
        expected.tensors[path].storage
        for path, tensor in tensors_of(model)
        if isinstance(tensor, nn.Parameter)
    }
    for path, fact in expected.tensors.items():
        other = found.tensors[path]
        assert (other.shape, other.dtype, other.stride) == (fact.shape, fact.dtype, fact.stride)
        assert (other.storage, other.object) == (fact.storage, fact.object)
        if fact.storage not in parameters:
            assert other.bits == fact.bits, path


# Law 9: nothing is left half done, and nothing is disturbed.


class HalfwayError(Exception):
    pass


def build_and_raise(case: Case) -> None:
    with lateinit.deferred():
        case.build()
        raise HalfwayError


@models()
def test_exception_inside_the_block_leaves_no_trace(case: Case) -> None:
    expected = eager(case)
    torch.manual_seed(SEED)
    before = torch.get_rng_state()
    with pytest.raises(HalfwayError):
        build_and_raise(case)
    assert torch.equal(before, torch.get_rng_state())
    assert_same(expected, case.build())


@models()
def test_asking_about_a_deferred_model_changes_nothing(case: Case) -> None:
    expected, model = eager(case), deferred(case)
    state = torch.get_rng_state()
    before = {path: tensor.is_meta for path, tensor in tensors_of(model)}
    assert str(lateinit.plan(model))
    assert str(lateinit.summary(model))
    assert torch.equal(state, torch.get_rng_state())
    assert {path: tensor.is_meta for path, tensor in tensors_of(model)} == before
    assert_same(expected, lateinit.materialize(model))
