"""Memory that numpy and others share with a deferred tensor, read and written in every order."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from torch import nn

import lateinit
from lateinit.errors import DeferredTensorError, SeedError

if TYPE_CHECKING:
    from collections.abc import Callable

PROGRAMS: dict[str, Callable[[], Any]] = {}


def program(function: Callable[[], Any]) -> Callable[[], Any]:
    PROGRAMS[function.__name__] = function
    return function


@program
def row_by_row() -> list[Any]:
    weight = nn.Linear(3, 3).weight.data
    for row in range(2):
        weight.numpy()[row] = row
    return [weight]


@program
def two_arrays_of_one_tensor() -> list[Any]:
    tensor = torch.zeros(4)
    first, second = tensor.numpy(), tensor.numpy()
    first[0] = 1
    second[1] = 2
    return [tensor, float(second[0])]


@program
def arrays_of_views_that_overlap() -> list[Any]:
    tensor = torch.randn(5)
    whole, tail = tensor.numpy(), tensor[1:].numpy()
    whole[1] = 7
    tail[1] += 2
    return [tensor, tail.tolist(), whole.tolist()]


@program
def array_of_what_shows_another_storage_now() -> list[Any]:
    tensor = torch.zeros(4)
    array = tensor.numpy()
    tensor.data = torch.ones(4)
    array[:] = 5
    return [tensor, tensor + 1]


@program
def array_of_what_was_transposed_in_place() -> list[Any]:
    tensor = torch.zeros(2, 3)
    array = tensor.numpy()
    tensor.t_()
    array[0, 1] = 5
    return [tensor, tensor * 2]


def read_after_a_write(read: Callable[[torch.Tensor], Any]) -> Callable[[], list[Any]]:
    def run() -> list[Any]:
        tensor = torch.zeros(3)
        tensor.numpy()[1] = 4
        return [tensor, read(tensor)]

    return run


PROGRAMS |= {
    f"written_then_{name}": read_after_a_write(read)
    for name, read in {
        "tolist": torch.Tensor.tolist,
        "repr": repr,
        "formatted": lambda t: f"{t}",
        "as_array": lambda t: np.asarray(t).tolist(),
        "sparse": lambda t: (
            torch.sparse_coo_tensor([[0, 1, 2]], t, (3,), check_invariants=True).to_dense().tolist()
        ),
    }.items()
}


@program
def shown_at_every_write() -> list[Any]:
    parameter = nn.Parameter(torch.zeros(3))
    array, seen = parameter.detach().numpy(), []
    for write in (
        lambda: parameter.data.uniform_(-1, 1),
        lambda: nn.init.normal_(parameter),
        lambda: parameter.data.__setitem__(1, 7),
        lambda: parameter.data[:2].mul_(2),
        lambda: nn.init.trunc_normal_(parameter, a=-0.5, b=0.5),
        lambda: parameter.data.copy_(torch.arange(3.0)),
        lambda: torch.randn(3, out=parameter.data),
    ):
        write()
        seen.append(array.tolist())
    return [parameter, seen]


@program
def written_and_filled_in_turns() -> list[Any]:
    tensor = torch.zeros(3)
    array = tensor.numpy()
    array[0] = 1
    tensor[:2].fill_(2)
    array[1] = 3
    nn.init.normal_(tensor[2:])
    return [tensor, array.tolist()]


@program
def applied_in_place() -> list[Any]:
    tensor, other = torch.randn(4), torch.randn(4)
    same = tensor.apply_(lambda x: 2 * x) is tensor
    tensor.map_(other, lambda x, y: x - y)
    return [tensor, other, same]


@program
def exchanged_by_dlpack() -> list[Any]:
    tensor = torch.randn(4)
    torch.from_dlpack(tensor)[0] = 1
    array = np.from_dlpack(tensor)
    tensor[1] = 2
    return [tensor, array.tolist()]


@pytest.mark.parametrize("run", PROGRAMS.values(), ids=list(PROGRAMS))
def test_shared_memory_is_as_it_is_eagerly(run: Callable[[], list[Any]]) -> None:
    torch.manual_seed(0)
    expected = run()
    torch.manual_seed(0)
    found = lateinit.deferred_init(run)
    assert lateinit.is_deferred(found)
    lateinit.materialize(found)
    for ours, theirs in zip(expected, found, strict=True):
        if isinstance(ours, torch.Tensor):
            assert torch.equal(ours, theirs)
        else:
            assert ours == theirs


def test_what_an_op_without_a_meta_kernel_writes_is_shown() -> None:
    with lateinit.deferred():
        tensor = torch.ones(3)
        array = tensor.numpy()
        torch.masked_select(torch.arange(6.0), torch.arange(6) > 2, out=tensor)
        assert array.tolist() == [3, 4, 5]
        array[0] = 5
    assert lateinit.materialize(tensor).tolist() == [5, 4, 5]


def test_random_values_that_are_shown_bind_to_their_seed() -> None:
    with lateinit.deferred():
        tensor = torch.zeros(3)
        shown = tensor.numpy()
        tensor.normal_()
        other = torch.zeros(2 if shown[0] > 0 else 3)
    with pytest.raises(SeedError, match="read a random value"):
        lateinit.materialize([tensor, other], seed=1)


@pytest.mark.parametrize("name", ["apply_", "map_", "map2_"])
def test_function_of_each_element_needs_values_after_the_block(name: str) -> None:
    tensor = lateinit.deferred_init(lambda: nn.Parameter(torch.ones(3), requires_grad=False))
    others = [tensor] * {"apply_": 0, "map_": 1, "map2_": 2}[name]
    with pytest.raises(DeferredTensorError, match=f"{name} needs the values"):
        getattr(tensor, name)(*others, lambda *x: 0.0)


ALIASES: dict[str, Callable[[torch.Tensor], Any]] = {
    "array": torch.Tensor.numpy,
    "array and back": lambda t: torch.from_numpy(t.numpy()),
    "dlpack": torch.from_dlpack,
    "view of an array": lambda t: t.numpy()[::-1],
}


class Aliased(nn.Module):
    """A buffer, and what shares its memory."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.register_buffer("table", torch.randn(4))
        self.alias = ALIASES[name](self.table)
        self.register_buffer("twice", self.table * 2)


@pytest.mark.parametrize("first", [True, False], ids=["materialised first", "written first"])
@pytest.mark.parametrize("name", sorted(ALIASES))
def test_memory_shared_in_a_block_is_shared_after_it(name: str, first: bool) -> None:
    def used(model: Aliased, materialize: Callable[[Aliased], Any]) -> list[Any]:
        if first:
            materialize(model)
        model.alias[0] = 5
        materialize(model)
        model.table[1] = 6
        return [model.table.tolist(), model.alias.tolist(), model.twice.tolist()]

    torch.manual_seed(0)
    expected = used(Aliased(name), lambda model: model)
    torch.manual_seed(0)
    assert used(lateinit.deferred_init(Aliased, name), lateinit.materialize) == expected


def test_memory_that_was_only_looked_at_is_not_kept() -> None:
    def build() -> torch.Tensor:
        tensor = torch.zeros(4)
        assert tensor.numpy()[0] == 0
        return tensor

    assert lateinit.is_deferred(lateinit.deferred_init(build))
