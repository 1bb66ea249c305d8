"""Law 3 in one process: every rank in turn, with a process group that sends nothing."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

import lateinit
from lateinit._distributed import shard_ranges
from lateinit._materialize import scheduler
from lateinit._replay import chunks
from lateinit._tensors.realize import device_to_move_to
from lateinit._torch.modules import REGISTRATION_HOOKS
from lateinit.errors import (
    CheckpointError,
    DeferredTensorError,
    ShardingError,
)
from tests.sharding.alone import alone_as
from tests.sharding.compare import differences
from tests.sharding.placements import ON_A_GRID, PLACEMENTS, grid, line
from tests.support.building import deferred, eager
from tests.support.models import MODELS, REPRESENTATIVE
from tests.support.sweep import part_of

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.support.cases import Case

RANKS = {"fsdp": (1, 3), "rows": (8,), "columns": (3,)}
UNSHARDABLE = (NotImplementedError, RuntimeError, ValueError, AssertionError, KeyError, TypeError)


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have small tensors cut into shards as large ones are."""
    monkeypatch.setattr(chunks, "_SMALLEST", 32)
    monkeypatch.setattr(shard_ranges, "_ROWS", 48)
    monkeypatch.setattr(shard_ranges, "_GAP", 16)
    monkeypatch.setattr(shard_ranges, "_APART", 64)


def columns_by_hand(model: nn.Module) -> None:
    mesh = init_device_mesh("cpu", (2,))
    model[0].weight = nn.Parameter(distribute_tensor(model[0].weight, mesh, [Shard(0)]))


def by_from_local(model: nn.Module) -> None:
    mesh = init_device_mesh("cpu", (2,))
    local = model[0].weight.detach()
    model[0].weight = nn.Parameter(DTensor.from_local(local, mesh, [Shard(0)]))


def by_plan(model: nn.Module) -> None:
    plan = {"0": ColwiseParallel(), "1": RowwiseParallel()}
    parallelize_module(model, init_device_mesh("cpu", (2,)), plan)


def ways() -> Iterator[tuple[str, int]]:
    for name in PLACEMENTS:
        yield from ((name, ranks) for ranks in RANKS.get(name, (2,)))
    yield from ((name, 4) for name in ON_A_GRID)


def sharded() -> Iterator[tuple[Case, str, int]]:
    """Every model in a part of the ways, and those of ``make quick`` in all of them."""
    for number, case in enumerate(MODELS):
        whole = case.name in REPRESENTATIVE
        for way, ranks in part_of(list(ways()), number, 1 if whole else 3):
            yield case, way, ranks


@pytest.mark.parametrize(("case", "way", "ranks"), list(sharded()), ids=str)
def test_shard_then_materialise_equals_materialise_then_shard(
    case: Case, way: str, ranks: int
) -> None:
    place = (PLACEMENTS | ON_A_GRID)[way]
    for rank in range(ranks):
        with alone_as(rank, ranks):
            mesh = grid(ranks) if way in ON_A_GRID else line(ranks)
            expected = eager(case)
            try:
                place(expected, mesh, None)
            except UNSHARDABLE as error:
                pytest.skip(f"the eager twin cannot be sharded: {error}")
            model = deferred(case)
            # Real tensors would wait for the data of rank 0.
            real = any(not lateinit.is_deferred(p) for p in model.parameters())
            place(model, mesh, None if real else 0)
            held = {name: id(p) for name, p in model.named_parameters()}
            # Meshes are cached across process groups: there is nobody to ask.
            assert lateinit.materialize(model, check=False) is model
            assert not lateinit.is_deferred(model)
            assert held == {name: id(p) for name, p in model.named_parameters()}
            assert differences(expected, model) == []


# What is computed, and what is not.


def big(rows: int = 96, columns: int = 160) -> nn.Module:
    return nn.Sequential(nn.Linear(columns, rows), nn.Linear(rows, columns, bias=False))


class Drawn:
    """How many elements are drawn for shards, and how many tensors as wholes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.elements = self.wholes = 0
        draw, run = shard_ranges.FlatReader._draw, scheduler.run_piece

        def counted(reader: Any, values: torch.Tensor, start: int) -> None:
            self.elements += values.numel()
            draw(reader, values, start)

        def whole(*arguments: Any) -> None:
            self.wholes += 1
            run(*arguments)

        monkeypatch.setattr(shard_ranges.FlatReader, "_draw", counted)
        monkeypatch.setattr(scheduler, "run_piece", whole)


@pytest.mark.parametrize("rank", range(4))
def test_rows_are_drawn_alone(rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = Drawn(monkeypatch)
    with alone_as(rank, 4):
        model = lateinit.deferred_init(big)
        PLACEMENTS["fsdp"](model, line(4))
        lateinit.materialize(model, check=False)
    share = sum(p.numel() for p in big().parameters()) // 4
    assert drawn.wholes == 0
    assert share <= drawn.elements <= share + 3 * 2 * shard_ranges.UNIT


def test_columns_are_drawn_a_few_rows_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    largest = 0
    read = shard_ranges.FlatReader.read

    def measured(reader: Any, start: int, end: int) -> torch.Tensor:
        nonlocal largest
        values = read(reader, start, end)
        largest = max(largest, reader._values.numel())
        return values

    monkeypatch.setattr(shard_ranges, "_ROWS", 512)
    monkeypatch.setattr(shard_ranges.FlatReader, "read", measured)
    with alone_as(2, 4):
        model = lateinit.deferred_init(big)
        PLACEMENTS["columns"](model, line(4), 0)
        lateinit.materialize(model, check=False)
    assert 0 < largest <= 512 + 160 + 3 * shard_ranges.UNIT


def test_what_is_not_flat_is_computed_whole_and_freed(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = Drawn(monkeypatch)

    def orthogonal() -> nn.Module:
        model = big()
        nn.init.orthogonal_(model[0].weight)
        return model

    torch.manual_seed(0)
    expected = orthogonal()
    with alone_as(1, 4):
        torch.manual_seed(0)
        model = lateinit.deferred_init(orthogonal)
        PLACEMENTS["fsdp"](model, line(4))
        lateinit.materialize(model, check=False)
        local = model[0].weight.to_local()
    assert torch.equal(local, expected[0].weight[24:48])
    assert local.untyped_storage().nbytes() == local.numel() * 4
    assert drawn.elements < expected[1].weight.numel()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_cast_before_sharding_is_made_of_the_shard_alone(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = Drawn(monkeypatch)
    torch.manual_seed(0)
    expected = big().to(dtype)
    with alone_as(1, 4):
        torch.manual_seed(0)
        model = lateinit.deferred_init(big).to(dtype)
        PLACEMENTS["fsdp"](model, line(4))
        lateinit.materialize(model, check=False)
        assert torch.equal(model[0].weight.to_local(), expected[0].weight[24:48])
    assert drawn.wholes == 0


def test_parts_in_any_order_and_other_seeds() -> None:
    with alone_as(1, 2):
        torch.manual_seed(7)
        expected = big()
        PLACEMENTS["fsdp"](expected, line(2))
        torch.manual_seed(0)
        model = lateinit.deferred_init(big)
        PLACEMENTS["fsdp"](model, line(2))
        for pattern in ("1.*", "0.bias", "0.weight"):
            lateinit.materialize(model, only=pattern, seed=7, check=False)
        assert differences(expected, model) == []


def test_a_lazy_model_is_inferred_sharded_and_materialised() -> None:
    def lazy() -> nn.Module:
        return nn.Sequential(lateinit.nn.LazyLinear(96), lateinit.nn.LazyLinear(160, bias=False))

    with alone_as(1, 2):
        torch.manual_seed(0)
        expected = big()
        PLACEMENTS["fsdp"](expected, line(2))
        torch.manual_seed(0)
        model = lateinit.deferred_init(lazy)
        lateinit.infer_shapes(model, torch.empty(3, 160, device="meta"))
        PLACEMENTS["fsdp"](model, line(2))
        lateinit.materialize(model, check=False)
        assert differences(expected, model) == []


@pytest.mark.parametrize("stage", [0, 1])
def test_a_pipeline_stage_is_right_without_the_others(stage: int) -> None:
    torch.manual_seed(0)
    whole = big()
    with alone_as(1, 2):
        torch.manual_seed(0)
        model = lateinit.deferred_init(big)
        del model[1 - stage]
        PLACEMENTS["fsdp"](model, line(2))
        lateinit.materialize(model, check=False)
        expected = nn.Sequential(whole[stage])
        PLACEMENTS["fsdp"](expected, line(2))
        assert differences(expected, model) == []


@pytest.mark.parametrize("rank", range(4))
def test_fsdp_along_another_dim(rank: int) -> None:
    def last(parameter: nn.Parameter) -> Shard:
        return Shard(parameter.dim() - 1)

    with alone_as(rank, 4):
        torch.manual_seed(0)
        expected = big()
        fully_shard(expected, mesh=line(4), shard_placement_fn=last)
        torch.manual_seed(0)
        model = lateinit.deferred_init(big)
        fully_shard(model, mesh=line(4), shard_placement_fn=last)
        lateinit.materialize(model, check=False)
        assert differences(expected, model) == []


def test_a_plan_tells_what_is_computed_whole_for_shards() -> None:
    def build() -> nn.Module:
        model = nn.Sequential(nn.Linear(600, 500), nn.Linear(300, 600), nn.Linear(7, 3))
        nn.init.orthogonal_(model[1].weight)
        return model

    with alone_as(1, 2):
        model = lateinit.deferred_init(build)
        assert "computed whole" not in str(lateinit.plan(model))
        fully_shard(model, mesh=line(2))
        text = str(lateinit.plan(model))
    orthogonal = re.search(r"-> 1\.weight \(a shard of ([\d,]+) bytes, computed whole\)", text)
    assert orthogonal is not None
    assert int(orthogonal[1].replace(",", "")) >= 4 * 300 * 600
    assert "-> 2.weight (a shard of 84 bytes, computed whole)" in text  # small
    assert re.search(r"-> 0\.weight$", text, re.MULTILINE)
    # How many elements are drawn for each, and kept with FSDP2's padding. Which biases are drawn
    # along with the weight before them depends on the kernels.
    sizes = {
        "0.bias": (500, 250),
        "1.weight": (600 * 300, 300 * 300),
        "1.bias": (600, 300),
        "2.weight": (3 * 7, 2 * 7),
        "2.bias": (3, 2),
    }
    whole = re.findall(r"-> (\S+) \(a shard of", text)
    drawn, kept = (sum(sizes[name][i] for name in whole) for i in (0, 1))
    expected = (
        rf"^{len(whole)} steps for shards computed whole: [\d,]+ bytes, [\d,]+ at once, and "
        rf"{drawn:,} elements drawn, of which {4 * kept:,} bytes are kept$"
    )
    assert re.search(expected, text, re.MULTILINE)


def test_optimizers_hooks_and_names_stay() -> None:
    with alone_as(0, 2):
        model = lateinit.deferred_init(big)
        PLACEMENTS["fsdp"](model, line(2))
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        assert lateinit.is_deferred(model)
        assert "0.weight" in str(lateinit.plan(model))
        assert lateinit.summary(model).totals.parameters == sum(
            p.numel() for p in big().parameters()
        )
        lateinit.materialize(model, check=False)
        assert optimizer.param_groups[0]["params"][0] is model[0].weight
        assert model[0].weight.device.type == "cpu"


def test_a_shard_moves_to_the_device_of_its_mesh(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, other = torch.device("cpu"), torch.device("meta", 3)
    here = SimpleNamespace(current_device=lambda: 3)
    monkeypatch.setattr(torch, "get_device_module", lambda kind: here)
    with alone_as(0, 2):
        shard = distribute_tensor(torch.zeros(4), line(2), [Shard(0)], src_data_rank=None)
        assert device_to_move_to(shard, cpu) is None
        monkeypatch.setattr(shard._spec.mesh, "_device_type", "meta")
        assert device_to_move_to(shard, cpu) == other
        assert device_to_move_to(shard, cpu, cpu) == cpu
        assert device_to_move_to(torch.zeros(1), cpu) is None


# What cannot be honoured.


def test_a_partial_placement_is_refused() -> None:
    with alone_as(0, 2):
        layer = lateinit.deferred_init(nn.Linear, 4, 4)
        local = DTensor.from_local(layer.weight.detach(), line(2), [Partial()], run_check=False)
        layer.weight = nn.Parameter(local)
        with pytest.raises(ShardingError, match=r"weight: a Partial placement"):
            lateinit.materialize(layer, check=False)
        assert lateinit.is_deferred(layer)


def test_a_shard_of_unwritten_memory_is_refused() -> None:
    with alone_as(0, 2):
        layer = lateinit.deferred_init(nn.Linear, 4, 4)
        local = torch.empty_like(layer.weight[:2])
        layer.weight = nn.Parameter(DTensor.from_local(local, line(2), [Shard(0)]))
        with pytest.raises(ShardingError, match=r"weight: sharded by a means"):
            lateinit.materialize(layer, check=False)


@pytest.mark.parametrize("way", PLACEMENTS)
@pytest.mark.parametrize("rank", [0, 1])
def test_a_cast_after_sharding_is_honoured(way: str, rank: int) -> None:
    with alone_as(rank, 2):
        torch.manual_seed(0)
        expected = big()
        torch.manual_seed(0)
        model = lateinit.deferred_init(big)
        PLACEMENTS[way](expected, line(2), None)
        PLACEMENTS[way](model, line(2), 0)
        lateinit.materialize(model.bfloat16(), check=False)
        assert differences(expected.bfloat16(), model) == []


def test_saving_shards_in_one_file_is_refused(tmp_path: Path) -> None:
    with alone_as(0, 2):
        model = lateinit.deferred_init(big)
        PLACEMENTS["fsdp"](model, line(2))
        with pytest.raises(CheckpointError, match="shards are written into a folder"):
            lateinit.save_checkpoint(model, tmp_path / "model.safetensors")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("distribute", [columns_by_hand, by_from_local, by_plan, fully_shard])
def test_no_hook_of_modules_is_left_behind(distribute: Any) -> None:
    before = [dict(hooks) for hooks in REGISTRATION_HOOKS]
    with alone_as(0, 2):
        model = lateinit.deferred_init(lambda: nn.Sequential(nn.Linear(6, 10), nn.Linear(10, 6)))
        distribute(model)
        assert [dict(hooks) for hooks in REGISTRATION_HOOKS] == before
        lateinit.materialize(model)
    assert [dict(hooks) for hooks in REGISTRATION_HOOKS] == before


@pytest.mark.parametrize("distribute", [columns_by_hand, by_from_local, by_plan])
def test_what_is_done_to_local_parts_is_recorded_or_refused(distribute: Any) -> None:
    def build() -> nn.Module:
        return nn.Sequential(nn.Linear(6, 10), nn.Linear(10, 6))

    with alone_as(0, 2):
        torch.manual_seed(0)
        eager, changed = build(), True
        distribute(eager)
        torch.manual_seed(0)
        model = lateinit.deferred_init(build)
        distribute(model)
        with torch.no_grad():
            try:
                model[0].weight.to_local().mul_(3)
            except DeferredTensorError:
                changed = False
            else:
                eager[0].weight.to_local().mul_(3)
        found = lateinit.materialize(model)[0].weight.to_local()
        # Rank 0 of a process group that sends nothing has its own rows of the eager one too.
        assert torch.equal(found, eager[0].weight.to_local())
        assert type(found) is torch.Tensor
        assert changed or distribute is by_from_local
