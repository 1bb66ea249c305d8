"""What a constructor writes to a file or to bytes and reads again, such as its best state."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load, load_file, save, save_file
from torch import Tensor, nn

import lateinit
from lateinit.errors import SeedError

Trip = Callable[[Any, Path], Any]


def _by_torch(saved: Any, folder: Path) -> Any:
    del folder
    data = io.BytesIO()
    torch.save(saved, data)
    data.seek(0)
    return torch.load(data, weights_only=False)


def _by_old_torch(saved: Any, folder: Path) -> Any:
    torch.save(saved, folder / "old.pt", _use_new_zipfile_serialization=False)
    return torch.load(folder / "old.pt", weights_only=False)


def _mapped(saved: Any, folder: Path) -> Any:
    path = folder / f"{len(list(folder.iterdir()))}.pt"  # the mapping of another is in use
    torch.save(saved, path)
    return torch.load(path, weights_only=False, mmap=True)


def _by_pickle(saved: Any, folder: Path) -> Any:
    del folder
    return pickle.loads(pickle.dumps(saved))


def _by_deepcopy(saved: Any, folder: Path) -> Any:
    del folder
    return copy.deepcopy(saved)


TRIPS: dict[str, Trip] = {
    "torch.save": _by_torch,
    "its old format": _by_old_torch,
    "mapped": _mapped,
    "pickle": _by_pickle,
    "deepcopy": _by_deepcopy,
}


def a_tensor(trip: Trip, folder: Path) -> list[Any]:
    drawn = torch.randn(3, 5).t()
    back = trip(drawn, folder)
    back[0] += 1
    return [drawn, back]


def a_list_of_windows(trip: Trip, folder: Path) -> list[Any]:
    whole = torch.randn(12)
    rows, tail = trip([whole.view(3, 4), whole[6:]], folder)
    rows.zero_()
    return [whole, rows, tail]


def a_module(trip: Trip, folder: Path) -> list[Any]:
    module = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    module[0].bias.requires_grad_(False)
    back = trip(module, folder)
    nn.init.ones_(back[0].weight)
    facts = [parameter.requires_grad for parameter in back.parameters()]
    return [*module.state_dict().values(), *back.state_dict().values(), facts]


def a_state_dict(trip: Trip, folder: Path) -> list[Any]:
    module = nn.Linear(3, 3)
    best = trip(module.state_dict(), folder)
    nn.init.zeros_(module.weight)
    other = nn.Linear(3, 3)
    other.load_state_dict(best)
    return [module.weight, other.weight, other.bias]


def a_fit(trip: Trip, folder: Path) -> list[Any]:
    module = nn.Linear(3, 1)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    best, least = None, float("inf")
    for _ in range(3):
        loss = module(torch.randn(4, 3)).square().mean()
        if loss.item() < least:
            best, least = trip(module.state_dict(), folder), loss.item()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    module.load_state_dict(best)
    optimizer.zero_grad()
    return [module.weight, module.bias, least]


class Named(Tensor):
    """A class of tensors that adds nothing."""


def a_subclass(trip: Trip, folder: Path) -> list[Any]:
    if trip is _by_deepcopy:
        return []  # torch refuses it
    drawn = torch.randn(3, 2).as_subclass(Named)
    made = Tensor._make_subclass(Named, torch.randn(2), True)
    made.scale = torch.randn(())
    back, again = trip([drawn, made], folder)
    facts = [type(back), type(again), again.requires_grad]
    return [drawn, back.detach() + 1, again.detach() * again.scale, facts]


KINDS = (a_fit, a_list_of_windows, a_module, a_state_dict, a_subclass, a_tensor)


@pytest.mark.parametrize("trip", TRIPS.values(), ids=list(TRIPS))
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_what_is_read_back_is_what_eager_construction_reads(
    kind: Callable[..., list[Any]], trip: Trip, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    expected = kind(trip, tmp_path)
    torch.manual_seed(0)
    found = lateinit.materialize(lateinit.deferred_init(kind, trip, tmp_path))
    for ours, theirs in zip(expected, found, strict=True):
        if isinstance(ours, Tensor):
            assert ours.stride() == theirs.stride()
            assert torch.equal(ours, theirs)
        else:
            assert ours == theirs


def test_tensors_of_safetensors_are_read_back(tmp_path: Path) -> None:
    def make() -> list[Tensor]:
        drawn = {"a": torch.randn(3), "b": torch.ones(2, 2)}
        save_file(drawn, tmp_path / "x.safetensors")
        back = load(save(drawn)) | {"c": load_file(tmp_path / "x.safetensors")["a"]}
        return [back[name] + 1 for name in sorted(back)]  # a file has them in any order

    torch.manual_seed(0)
    expected = make()
    torch.manual_seed(0)
    assert all(map(torch.equal, expected, lateinit.materialize(lateinit.deferred_init(make))))


def test_large_tensors_on_one_storage_are_pickled_with_one() -> None:
    with lateinit.deferred():
        whole = torch.zeros(17 << 20)  # more than what is kept of computed values
        data = io.BytesIO()
        torch.save([whole, whole[1:]], data)
    data.seek(0)
    first, second = torch.load(data)
    assert first.untyped_storage().data_ptr() == second.untyped_storage().data_ptr()


def test_drawn_value_that_was_pickled_binds_the_seed() -> None:
    with lateinit.deferred():
        back = pickle.loads(pickle.dumps(nn.Linear(2, 2)))
    with pytest.raises(SeedError, match="the constructor read a random value"):
        lateinit.materialize(back, seed=1)


@pytest.mark.parametrize("make", [torch.randn, lambda n: nn.Buffer(torch.randn(n))])
def test_shallow_copy_shares_memory(make: Callable[[int], Tensor]) -> None:
    def run() -> list[Tensor]:
        drawn = make(3)
        alike, row = copy.copy(drawn), copy.copy(drawn[1:])
        drawn[1] = 7
        return [drawn, alike, row]

    torch.manual_seed(0)
    expected = run()
    torch.manual_seed(0)
    found = lateinit.deferred_init(run)
    assert all(map(torch.equal, expected, found))  # each realises itself
    found[1].zero_()
    assert found[0].count_nonzero() == found[2].count_nonzero() == 0


def test_state_that_was_saved_is_set_again(tmp_path: Path) -> None:
    def run() -> list[Tensor]:
        state = _by_torch(torch.get_rng_state(), tmp_path)
        first = torch.randn(3)
        torch.set_rng_state(state)
        return [first, torch.randn(3)]

    first, again = lateinit.materialize(lateinit.deferred_init(run))
    assert torch.equal(first, again)
