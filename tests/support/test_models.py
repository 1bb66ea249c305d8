"""The models and the helpers that the laws stand on, proved on eager construction alone."""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace

import pytest
import torch
from torch import nn

from tests.support.cases import Bag, Case
from tests.support.models import MODELS
from tests.support.snapshots import assert_same, first_difference, snapshot, tensors_of

every_model = pytest.mark.parametrize("case", MODELS, ids=str)


def build(case: Case, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return case.build()


@every_model
def test_model_is_deterministic_eagerly(case: Case) -> None:
    first, ended = build(case), torch.get_rng_state()
    torch.rand(7)
    assert_same(first, build(case))
    assert torch.equal(ended, torch.get_rng_state())


@every_model
def test_model_is_small(case: Case) -> None:
    assert sum(tensor.nbytes for _, tensor in tensors_of(build(case))) < 2**20


def succeeds(action, *arguments) -> bool:
    try:
        action(*arguments)
    except (RuntimeError, TypeError, ValueError):
        return False
    return True


@every_model
def test_flags_say_what_eager_torch_can_do(case: Case) -> None:
    model = build(case)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert succeeds(copy.deepcopy, model) is case.deepcopies
    assert succeeds(pickle.dumps, model) is case.pickles
    assert succeeds(model.load_state_dict, state) is case.loads


def test_model_names_are_unique_and_there_are_enough() -> None:
    names = {case.name for case in MODELS}
    assert len(names) == len(MODELS)
    assert len(names) >= 36


def test_most_models_change_with_the_seed() -> None:
    moved = sum(
        first_difference(snapshot(build(case)), snapshot(build(case, seed=1))) is not None
        for case in MODELS
    )
    assert moved > len(MODELS) / 2


# A check that cannot fail is a defect: each of these breaks a model in one way.


def twins() -> tuple[nn.Module, nn.Module]:
    def twin() -> nn.Module:
        torch.manual_seed(0)
        shared = torch.arange(12.0)
        model = Bag(
            layer=nn.Linear(4, 4),
            tied=nn.Linear(4, 4),
            head=shared[:8],
            tail=shared[4:],
            doubled=torch.ones(4).view(2, 2),
        )
        model.tied.weight = model.layer.weight
        model.listed = [torch.zeros(2), {"deep": torch.tensor(1 + 1j)}, 0.5]
        return model

    return twin(), twin()


def flip_a_bit(model: nn.Module) -> None:
    model.layer.weight.data.view(torch.int32)[1, 2] ^= 1


def turn_a_zero_negative(model: nn.Module) -> None:
    model.listed[0][1] = -0.0


def change_a_nested_complex(model: nn.Module) -> None:
    model.listed[1]["deep"].add_(1j)


def change_a_value(model: nn.Module) -> None:
    model.listed[2] = 0.25


def cast(model: nn.Module) -> None:
    model.doubled = model.doubled.double()


def transpose(model: nn.Module) -> None:
    model.doubled = model.doubled.T


def reshape(model: nn.Module) -> None:
    model.doubled = model.doubled.flatten()


def untie(model: nn.Module) -> None:
    model.tied.weight = nn.Parameter(model.layer.weight.detach().clone())


def keep_storage_but_not_the_object(model: nn.Module) -> None:
    model.tied.weight = nn.Parameter(model.layer.weight.detach())


def cut_a_view(model: nn.Module) -> None:
    model.tail = model.tail.clone()


def shift_a_view(model: nn.Module) -> None:
    model.head.fill_(0)
    model.tail = model.head.as_strided((8,), (1,), 0)


def freeze(model: nn.Module) -> None:
    model.layer.bias.requires_grad_(False)


def make_a_parameter_of_a_buffer(model: nn.Module) -> None:
    head = model.head
    del model.head
    model.head = nn.Parameter(head, requires_grad=False)


def leave_a_graph(model: nn.Module) -> None:
    model.layer.scaled = model.layer.weight * 1


def mark_a_parameter(model: nn.Module) -> None:
    model.layer.weight.partition_dim = 1


def drop_persistence(model: nn.Module) -> None:
    model._non_persistent_buffers_set.add("doubled")


def stop_training(model: nn.Module) -> None:
    model.layer.eval()


def lose_a_buffer(model: nn.Module) -> None:
    del model.head


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (flip_a_bit, r"layer\.weight: bits: 1 of 16 elements differ, the first at 6"),
        (turn_a_zero_negative, r"listed\.0: bits: .*found -0\.0"),
        (change_a_nested_complex, r"listed\.1\.deep: bits: .*found \(1\+2j\)"),
        (change_a_value, r"listed\.2: expected 0\.5, found 0\.25"),
        (cast, r"doubled: dtype: expected torch\.float32, found torch\.float64"),
        (transpose, r"doubled: stride: expected \(2, 1\), found \(1, 2\)"),
        (reshape, r"doubled: shape"),
        (untie, r"tied\.weight: object: expected layer\.weight, found tied\.weight"),
        (keep_storage_but_not_the_object, r"tied\.weight: object"),
        (cut_a_view, r"tail: storage: expected head, found tail"),
        (shift_a_view, r"tail: bytes_from_first: expected 16, found 0|head: bits"),
        (freeze, r"layer\.bias: requires_grad: expected True, found False"),
        (make_a_parameter_of_a_buffer, r"head: kind: expected Tensor, found Parameter"),
        (leave_a_graph, r"layer\.scaled is one too many"),
        (mark_a_parameter, r"layer\.weight: attributes"),
        (drop_persistence, r"_non_persistent_buffers_set: expected"),
        (stop_training, r"layer\.training: expected True, found False"),
        (lose_a_buffer, r"tensor head is missing"),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_a_harmed_model_is_seen_to_differ(harm, message: str) -> None:
    expected, found = twins()
    assert_same(expected, found)
    harm(found)
    with pytest.raises(AssertionError, match=message):
        assert_same(expected, found)


def test_a_deferred_tensor_is_not_taken_for_a_value() -> None:
    with pytest.raises(AssertionError, match=r"^weight has no values: it is still on meta"):
        snapshot(nn.Linear(2, 2, device="meta"))


def test_nan_is_compared_by_its_bits() -> None:
    first = snapshot(Bag(value=torch.tensor([float("nan")])))
    assert_same(first, Bag(value=torch.tensor([float("nan")])))
    other = replace(first.tensors["value"], bits=b"\x01\x00\xc0\x7f")
    assert first_difference(first, replace(first, tensors={"value": other})) is not None
