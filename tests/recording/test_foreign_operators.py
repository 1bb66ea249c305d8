"""Operators of other libraries, whose schemas need not say that they draw random numbers."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lateinit
from lateinit.errors import MaterializeError

REAL = torch.arange(3.0)


@torch.library.custom_op("lateinit_tests::noisy", mutates_args=())
def noisy(tensor: torch.Tensor) -> torch.Tensor:
    return tensor + torch.randn(tensor.shape)


@noisy.register_fake
def _(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(tensor)


@torch.library.custom_op("lateinit_tests::noisy_unseen", mutates_args=())
def noisy_unseen(tensor: torch.Tensor) -> torch.Tensor:
    return tensor + torch.rand(tensor.shape)


@torch.library.custom_op("lateinit_tests::redrawn_", mutates_args=("tensor",))
def redrawn_(tensor: torch.Tensor) -> None:
    tensor.normal_()


@torch.library.custom_op("lateinit_tests::doubled", mutates_args=())
def doubled(tensor: torch.Tensor) -> torch.Tensor:
    return tensor * 2


@doubled.register_fake
def _(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(tensor)


def build() -> list[torch.Tensor]:
    first = torch.randn(20)
    second = noisy(first)
    third = noisy_unseen(torch.zeros(3))
    redrawn_(first)
    layer = nn.Linear(5, 5)
    return [first, second, third, layer.weight.data, doubled(layer.weight.detach()), doubled(REAL)]


@pytest.mark.parametrize("seed", [None, 7])
def test_foreign_op_draws_where_it_draws_eagerly(seed: int | None) -> None:
    torch.manual_seed(0)
    model = lateinit.deferred_init(build)
    ended = torch.get_rng_state()
    torch.manual_seed(0)
    expected = build()
    assert torch.equal(ended, torch.get_rng_state())
    if seed is not None:
        torch.manual_seed(seed)
        expected = build()
    lateinit.materialize(list(reversed(model)), seed=seed)
    assert all(map(torch.equal, model, expected))


def test_foreign_op_on_real_data_draws_where_it_draws_eagerly() -> None:
    def made() -> list[torch.Tensor]:
        return [torch.randn(2), noisy(REAL), torch.randn(20), doubled(REAL), torch.randn(2)]

    torch.manual_seed(0)
    expected = made()
    torch.manual_seed(0)
    assert all(map(torch.equal, lateinit.materialize(lateinit.deferred_init(made)), expected))


def test_foreign_op_after_the_block_may_compute_and_not_draw() -> None:
    weight = lateinit.deferred_init(torch.randn, 3)
    twice, noise = doubled(weight), noisy(weight)
    assert torch.equal(lateinit.materialize(twice), 2 * lateinit.materialize(weight))
    before = torch.get_rng_state()
    with pytest.raises(MaterializeError, match="drew random numbers after the block"):
        lateinit.materialize(noise)
    assert torch.equal(before, torch.get_rng_state())


@torch.library.custom_op("lateinit_tests::failing", mutates_args=())
def failing(tensor: torch.Tensor) -> torch.Tensor:
    raise ValueError("nothing to draw")


def test_an_op_that_fails_in_a_constructor_leaves_the_program_whole() -> None:
    def made() -> list[torch.Tensor]:
        first = torch.randn(3)
        with pytest.raises(ValueError, match="nothing to draw"):
            failing(first)
        return [first, torch.randn(4), torch.rand(2)]

    torch.manual_seed(0)
    expected, ended = made(), torch.get_rng_state()
    torch.manual_seed(0)
    model = lateinit.deferred_init(made)
    assert torch.equal(ended, torch.get_rng_state())
    assert all(map(torch.equal, lateinit.materialize(model), expected))
