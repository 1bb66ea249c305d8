"""The storages of deferred tensors: distinct addresses, and no silent reads or writes."""

from __future__ import annotations

import contextlib
import copy
import ctypes
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lateinit
from lateinit.errors import DeferredTensorError


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 5)
        self.second = nn.Linear(3, 5)
        self.second.weight = self.first.weight
        self.register_buffer("row", self.first.weight.data[1])
        self.empty = nn.Parameter(torch.empty(0))
        self.addresses = addresses(self)
        self.first_values = followed(self.first.bias)


def addresses(model: nn.Module) -> dict[str, tuple[int, int, int]]:
    """Each tensor's place on its storage, and the storage's number in order of appearance."""
    numbers: dict[int, int] = {}
    places = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        storage = tensor.untyped_storage().data_ptr()
        assert tensor.storage().data_ptr() == storage
        number = numbers.setdefault(storage, len(numbers))
        places[name] = (number, tensor.data_ptr() - storage, tensor.data_ptr() and 1)
    return places


def followed(tensor: Tensor) -> list[float]:
    return list(ctypes.cast(tensor.data_ptr(), ctypes.POINTER(ctypes.c_float))[:5])


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
def test_addresses_tell_ties_and_views_apart_in_a_block_after_it_and_when_real() -> None:
    expected = Net()
    torch.manual_seed(0)
    model = lateinit.deferred_init(Net)
    assert expected.addresses == model.addresses == addresses(model)
    assert addresses(lateinit.materialize(model)) == expected.addresses


@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
def test_a_pointer_that_is_followed_has_the_values_in_a_block_and_is_refused_after_it() -> None:
    expected = Net()
    torch.manual_seed(0)
    model = lateinit.deferred_init(Net)
    assert model.first_values == expected.first_values
    with pytest.raises(DeferredTensorError, match=r"'first.bias'.*call lateinit.materialize"):
        followed(model.first.bias)


def test_the_storages_of_different_tensors_do_not_overlap() -> None:
    model = lateinit.deferred_init(lambda: nn.ParameterList(torch.ones(n) for n in range(1, 50)))
    ends = sorted((p.data_ptr(), p.data_ptr() + p.nbytes) for p in model)
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(ends))


def test_a_view_of_memory_that_is_real_by_now_has_its_address() -> None:
    model = lateinit.deferred_init(Net)
    row = model.row
    storage = row.untyped_storage()
    lateinit.materialize(model.first)
    assert storage.data_ptr() == model.first.weight.untyped_storage().data_ptr()
    assert row.data_ptr() == model.first.weight[1].data_ptr()


ACCESSES: dict[str, Any] = {
    "copy_": lambda s: s.copy_(torch.ones(5).untyped_storage()),
    "fill_": lambda s: s.fill_(0),
    "setitem": lambda s: s.__setitem__(0, 1),
    "getitem": lambda s: s[0],
    "tolist": lambda s: s.tolist(),
    "iter": list,
    "clone": lambda s: s.clone(),
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "cpu": lambda s: s.cpu(),
    "to": lambda s: s.to(device="cpu"),
    "float": lambda s: s.float(),
    "resize_": lambda s: s.resize_(0),
    "share_memory_": lambda s: s.share_memory_(),
    "byteswap": lambda s: s.byteswap(torch.float32),
}
TYPED = {
    "copy_": lambda s: s.copy_(torch.ones(5).storage()),
    "float": None,  # of a storage of floats: the storage itself
    "to": None,  # wraps the untyped one's
    "byteswap": None,
}


@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
@pytest.mark.parametrize("typed", [False, True], ids=["untyped", "typed"])
@pytest.mark.parametrize("inside", [False, True], ids=["after", "inside"])
@pytest.mark.parametrize("access", ACCESSES)
def test_reading_or_writing_a_storage_is_refused(access: str, inside: bool, typed: bool) -> None:
    way = TYPED.get(access, ACCESSES[access]) if typed else ACCESSES[access]
    if way is None:
        pytest.skip("torch does not have it, or it does nothing")
    model = lateinit.deferred_init(nn.Linear, 3, 5)
    storage = model.bias.storage() if typed else model.bias.untyped_storage()
    block = lateinit.deferred() if inside else contextlib.nullcontext()
    with block, pytest.raises(DeferredTensorError, match="storage of the deferred tensor"):
        way(storage)
    torch.manual_seed(0)
    expected = nn.Linear(3, 5)
    assert torch.equal(lateinit.materialize(model).bias, expected.bias)
