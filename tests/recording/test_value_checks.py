"""A kernel's refusal of values is raised at its line in a constructor, and may be caught there."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import lateinit
from lateinit.errors import SeedError
from tests.support.snapshots import assert_same
from tests.support.twins import twins

if TYPE_CHECKING:
    from collections.abc import Callable

ones, zeros, arange = torch.ones, torch.zeros, torch.arange
NAN = float("nan")


def far() -> Tensor:
    """An index that is too large for what it is tried on."""
    return torch.tensor([5])


def late_in_the_row() -> Tensor:
    """Probabilities of which the last one is none."""
    return torch.cat([0.5 * ones(20), 2 * ones(1)])


def none() -> Tensor:
    """Integers to divide by."""
    return zeros(3, dtype=torch.int64)


REFUSED: dict[str, Callable[[], Any]] = {
    # Draws.
    "multinomial": lambda: torch.multinomial(zeros(3), 1),
    "multinomial of less than zero": lambda: torch.multinomial(-ones(3), 1),
    "bernoulli": lambda: torch.bernoulli(2 * ones(5)),
    "bernoulli when it has drawn": lambda: torch.bernoulli(late_in_the_row()),
    "bernoulli_": lambda: zeros(5).bernoulli_(2 * ones(5)),
    "bernoulli of an array": lambda: torch.bernoulli(torch.from_numpy(late_in_the_row().numpy())),
    "bernoulli of a drawn array": lambda: torch.bernoulli(
        torch.from_numpy(torch.rand(20).numpy()).add_(0.3)
    ),
    "bernoulli of a number": lambda: torch.bernoulli(ones(3), 2.0),
    "bernoulli from another generator": lambda: torch.bernoulli(
        late_in_the_row(), generator=torch.Generator().manual_seed(2)
    ),
    "normal": lambda: torch.normal(zeros(3), -ones(3)),
    "normal around a number": lambda: torch.normal(0.0, -ones(3)),
    "poisson": lambda: torch.poisson(-ones(3)),
    "randint": lambda: torch.randint(5, 2, (3,)),
    "random_": lambda: zeros(3, dtype=torch.int64).random_(5, 2),
    # Matrices.
    "cholesky": lambda: torch.linalg.cholesky(-torch.eye(3)),
    "inverse": lambda: torch.inverse(zeros(3, 3)),
    "inv_ex": lambda: torch.linalg.inv_ex(zeros(3, 3), check_errors=True),
    "solve": lambda: torch.linalg.solve(zeros(3, 3), ones(3)),
    "eigh": lambda: torch.linalg.eigh(torch.full((3, 3), NAN)),
    "svd": lambda: torch.linalg.svd(torch.full((3, 3), NAN)),
    "svdvals": lambda: torch.linalg.svdvals(torch.full((3, 3), NAN)),
    "eig": lambda: torch.linalg.eig(torch.full((3, 3), NAN)),
    "pinv": lambda: torch.linalg.pinv(torch.full((3, 3), NAN)),
    "lu_unpack": lambda: torch.lu_unpack(torch.eye(3), torch.full((3,), 9, dtype=torch.int32)),
    # Indices.
    "embedding": lambda: functional.embedding(far(), ones(3, 2)),
    "embedding_bag": lambda: functional.embedding_bag(far(), ones(3, 2), arange(1)),
    "index": lambda: ones(3)[far()],
    "index of a draw": lambda: torch.randperm(3)[arange(9)],
    "setitem": lambda: ones(3).__setitem__(far(), 1),
    "index_select": lambda: ones(3).index_select(0, far()),
    "index_add": lambda: ones(3).index_add(0, far(), ones(1)),
    "index_copy_": lambda: ones(3).index_copy_(0, far(), ones(1)),
    "gather": lambda: ones(3).gather(0, far()),
    "scatter_": lambda: ones(3).scatter_(0, far(), 1),
    "scatter_reduce": lambda: ones(3).scatter_reduce(0, far(), ones(1), "sum"),
    "take": lambda: ones(3).take(far()),
    "put": lambda: ones(3).put(far(), ones(1)),
    "one_hot": lambda: functional.one_hot(far(), 3),
    "cross_entropy": lambda: functional.cross_entropy(ones(1, 3), far()),
    "nll_loss of images": lambda: functional.nll_loss(ones(1, 3, 1, 1), far().view(1, 1, 1)),
    "masked_scatter": lambda: zeros(5).masked_scatter(ones(5) > 0, ones(2)),
    "max_unpool2d": lambda: functional.max_unpool2d(
        ones(1, 1, 2, 2), torch.full((1, 1, 2, 2), 99), 2
    ),
    # Integers and bounds.
    "binary_cross_entropy": lambda: functional.binary_cross_entropy(2 * ones(3), ones(3)),
    "floor_divide": lambda: arange(3) // none(),
    "div": lambda: torch.div(arange(3), none(), rounding_mode="trunc"),
    "remainder": lambda: arange(3) % none(),
    "remainder of a number": lambda: arange(3) % 0,
    "fmod": lambda: torch.fmod(arange(3), none()),
    "floor_divide_": lambda: arange(3).floor_divide_(none()),
    "histc": lambda: torch.histc(torch.full((3,), NAN)),
}


def trying(call: Callable[[], Any]) -> Callable[[], nn.Module]:
    """A constructor that draws, catches an error, and draws again."""

    def build() -> nn.Module:
        model = nn.Module()
        model.register_buffer("before", torch.randn(3))
        with pytest.raises((RuntimeError, IndexError)) as found:
            call()
        model.said = str(found.value)
        model.register_buffer("after", torch.randn(17))
        return model

    return build


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_a_refusal_of_values_can_be_caught_in_a_constructor_as_eagerly(name: str) -> None:
    expected, found = twins(trying(REFUSED[name]))
    assert_same(expected, lateinit.materialize(found))


@pytest.mark.parametrize(
    "call",
    [
        lambda: torch.bernoulli(late_in_the_row()),
        lambda: torch.bernoulli(torch.full((20,), 2.0) + torch.rand(20)),
    ],
    ids=["the generator was moved", "the values were random"],
)
def test_what_follows_a_refusal_is_bound_to_the_seed(call: Callable[[], Tensor]) -> None:
    _, found = twins(trying(call))
    with pytest.raises(SeedError, match="bernoulli failed"):
        lateinit.materialize(found, seed=1)


def test_values_that_are_accepted_are_computed_once_more_and_draw_once() -> None:
    def build() -> nn.Module:
        model = nn.Module()
        model.mask = torch.bernoulli(torch.rand(40))
        model.picked = torch.multinomial(torch.rand(9), 4)
        model.rows = torch.randn(5, 3)[torch.randperm(5)]
        model.written = torch.randn(5).index_put_((arange(2),), zeros(2))
        model.noise = torch.normal(zeros(3), torch.rand(3), generator=torch.Generator())
        return model

    expected, found = twins(build)
    assert_same(expected, lateinit.materialize(found))
    with torch.random.fork_rng():
        other, _ = twins(build, seed=5)
    assert_same(other, lateinit.materialize(twins(build)[1], seed=5))


def test_the_values_of_a_large_tensor_are_looked_at_when_they_are_computed() -> None:
    with lateinit.deferred():
        model = nn.Module()
        model.register_buffer("rows", torch.randn(1000, 100)[torch.tensor([2000])])
    with pytest.raises(lateinit.errors.MaterializeError, match="index 2000 is out of bounds"):
        lateinit.materialize(model)


def test_the_probabilities_of_a_large_tensor_are_refused_by_name_at_the_end_of_the_block() -> None:
    with (
        pytest.raises(lateinit.errors.MaterializeError, match=r"bernoulli.* to be true"),
        lateinit.deferred(),
    ):
        torch.bernoulli(torch.full((300, 300), 2.0))
