"""Some values of a tensor, found without the rest, are the values that materialising gives."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import lateinit
from lateinit._checkpoint.formats import open_checkpoint
from lateinit._report import excerpts
from lateinit._report.excerpts import excerpt_of, excerpt_of_stored


def _half() -> Tensor:
    return nn.Parameter(torch.empty(300, 301, dtype=torch.bfloat16).normal_(1, 2))


def _scaled() -> Tensor:
    return torch.empty(700, 301).uniform_(-1, 1).mul_(3).add_(1)


def _truncated() -> Tensor:
    return nn.init.trunc_normal_(torch.empty(400, 331), std=2.0, a=-1.0, b=3.0)


def _second_half() -> Tensor:
    return torch.empty(600, 333).normal_()[300:]


LARGE: dict[str, Callable[[], Tensor]] = {
    "bfloat16": _half,
    "double": lambda: torch.empty(80_003, dtype=torch.float64).uniform_(),
    "fill": lambda: torch.full((300, 300), 7.0),
    "normal": lambda: nn.Linear(301, 700).weight,
    "part": _second_half,
    "scaled": _scaled,
    "transposed": lambda: torch.empty(300, 500).normal_().t(),
    "truncated": _truncated,
}


def flat(tensor: Tensor) -> Tensor:
    """The values in the order in which they lie in memory."""
    return torch.as_strided(tensor.detach(), (tensor.numel(),), (1,), tensor.storage_offset())


@pytest.mark.parametrize("name", sorted(LARGE))
def test_ranges_have_the_values_that_materialising_gives(name: str) -> None:
    torch.manual_seed(3)
    with lateinit.deferred():
        torch.rand(77)
        tensor = LARGE[name]()
    state = torch.get_rng_state()
    found = excerpt_of(tensor, "deferred")
    assert torch.equal(state, torch.get_rng_state())
    assert lateinit.is_deferred(tensor)
    lateinit.materialize(tensor)
    values = flat(tensor).double()
    parts = list(excerpts._parts(0, tensor.numel()))
    assert torch.equal(found.values, torch.cat([values[start:end] for start, end in parts]))
    assert not found.whole


def test_of_a_huge_tensor_only_ranges_are_drawn() -> None:
    with lateinit.deferred():
        weight = nn.Linear(1 << 20, 1 << 20).weight  # 4 TB
    found = excerpt_of(weight, "deferred")
    assert found.values.unique().numel() > 8000
    bound = 1 / math.sqrt(1 << 20)
    assert 0.9 * bound < float(found.values.abs().max()) <= bound


@pytest.mark.parametrize(
    ("make", "mean", "std"),
    [
        (lambda: torch.empty(300, 300).normal_(1, 2), 1.0, 2.0),
        (lambda: torch.empty(300, 300).normal_(), 0.0, 1.0),
        (lambda: torch.empty(300, 300).uniform_(0, 12), 6.0, math.sqrt(12)),
        (lambda: torch.empty(300, 300).uniform_(), 0.5, 1 / math.sqrt(12)),
        (lambda: torch.full((300, 300), 0.5).mul_(3), 1.5, 0.0),
        (lambda: torch.empty(300, 300).normal_().mul_(2), None, None),
    ],
)
def test_the_law_of_a_plain_draw_is_known(
    make: Callable[[], Tensor], mean: float | None, std: float | None
) -> None:
    found = excerpt_of(lateinit.deferred_init(make), "deferred")
    assert found.mean == pytest.approx(mean)
    assert found.std == pytest.approx(std)


def test_small_and_computed_tensors_are_computed_whole() -> None:
    with lateinit.deferred():
        small, computed = torch.randn(7, 3), torch.randn(90, 90) @ torch.randn(90, 90)
    for tensor in (small, computed):
        found = excerpt_of(tensor, "deferred")
        lateinit.materialize(tensor)
        assert found.whole
        assert torch.equal(found.values, tensor.double().flatten())


def test_a_large_tensor_that_is_no_fill_is_not_computed() -> None:
    with lateinit.deferred():
        tensor = torch.randn(3000, 3000) @ torch.randn(3000, 3000)
    found = excerpt_of(tensor, "deferred")
    assert not found.values.numel()
    assert found.why == "not shown: 27,000,000 elements would have to be computed for it"


def test_what_comes_after_an_open_hole_says_why_it_is_not_known() -> None:
    with lateinit.deferred():
        model = nn.Sequential(lateinit.nn.LazyLinear(4), nn.Linear(400, 400))
    assert "whose shape is not known yet" in excerpt_of(model[1].weight, "deferred").why
    assert excerpt_of(model[0].weight, "lazy").why == "its shape is not known yet"


@pytest.mark.parametrize("size", [3, 400])
def test_memory_that_nothing_is_written_to_is_not_shown(size: int) -> None:
    with lateinit.deferred():
        tensor = torch.empty(size, size)
    assert excerpt_of(tensor, "deferred").why == "it is not initialised"


def test_a_tensor_without_values_says_so() -> None:
    assert "on meta" in excerpt_of(torch.empty(3, device="meta"), "meta").why
    assert "sparse" in excerpt_of(torch.eye(3).to_sparse(), "real").why


@pytest.mark.parametrize(
    "shape", [(), (0, 3), (7,), (90_001,), (3, 5, 70_000), (301, 303), (40_000, 2, 3)]
)
def test_blocks_of_a_checkpoint_are_spread_over_a_tensor(
    shape: tuple[int, ...], tmp_path: Path
) -> None:
    values = torch.arange(math.prod(shape), dtype=torch.float64).reshape(shape)
    torch.save({"a": values}, tmp_path / "a.pt")
    found = excerpt_of_stored(open_checkpoint(tmp_path / "a.pt"), "a")
    limit = excerpts._RANGES * excerpts._RANGE
    assert len(found.values) <= limit
    assert found.whole == (values.numel() <= limit)
    if values.numel():
        assert float(found.values.min()) == 0
        assert float(found.values.max()) == values.numel() - 1
        assert len(found.values) > 0.5 * min(limit, values.numel())
    assert torch.equal(found.values, excerpt_of(values, "real").values)


def test_complex_numbers_show_both_parts(tmp_path: Path) -> None:
    torch.save({"a": torch.tensor([1 + 2j, 3 - 4j])}, tmp_path / "a.pt")
    found = excerpt_of_stored(open_checkpoint(tmp_path / "a.pt"), "a")
    assert found.values.tolist() == [1, 2, 3, -4]
