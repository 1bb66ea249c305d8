"""What is recorded for a GPU is replayed there, and gives the bits that eager gives there."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.testing._internal.distributed.fake_pg import FakeStore

import lateinit
from tests.support.snapshots import assert_same

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def model() -> nn.Module:
    stack = nn.Sequential(
        nn.Linear(300, 400), nn.BatchNorm1d(400), nn.Linear(400, 7), nn.Embedding(50, 33)
    )
    nn.init.normal_(stack[0].weight, std=0.02)
    nn.init.trunc_normal_(stack[2].weight, std=0.02)
    stack.register_buffer("drawn", torch.randn(1000) * 2 + torch.rand(1000))
    stack.register_buffer("order", torch.randperm(50))
    return stack


def states() -> list[torch.Tensor]:
    return [torch.get_rng_state(), torch.cuda.get_rng_state()]


def test_model_built_on_the_gpu_equals_its_eager_twin_there() -> None:
    torch.manual_seed(0)
    with torch.device("cuda"):
        expected = model()
    ended = states()
    torch.manual_seed(0)
    with lateinit.deferred(), torch.device("cuda"):
        late = model()
    assert all(map(torch.equal, ended, states()))
    allocated = torch.cuda.memory_allocated()
    lateinit.materialize(late)
    assert torch.cuda.memory_allocated() > allocated
    assert all(map(torch.equal, ended, states()))
    assert_same(expected, late)


def test_parts_on_the_gpu_in_any_order_give_the_same_bits() -> None:
    torch.manual_seed(0)
    with torch.device("cuda"):
        expected = model()
    torch.manual_seed(0)
    with lateinit.deferred(), torch.device("cuda"):
        late = model()
    for part in ("3.weight", "drawn", "0.*", "*"):
        lateinit.materialize(late, only=part)
    assert_same(expected, late)


def test_model_moved_to_the_gpu_in_its_constructor_equals_its_eager_twin() -> None:
    torch.manual_seed(0)
    expected = model().cuda()
    torch.manual_seed(0)
    with lateinit.deferred():
        late = model().cuda()
    assert_same(expected, lateinit.materialize(late))


def test_model_recorded_for_the_cpu_is_computed_there_and_put_on_the_gpu() -> None:
    torch.manual_seed(0)
    expected = model().cuda()
    torch.manual_seed(0)
    late = lateinit.materialize(lateinit.deferred_init(model), device="cuda")
    assert_same(expected, late)


def test_another_seed_on_the_gpu_gives_what_eager_gives_from_it() -> None:
    with lateinit.deferred(), torch.device("cuda"):
        late = model()
    lateinit.materialize(late, seed=3)
    torch.manual_seed(3)
    with torch.device("cuda"):
        expected = model()
    assert_same(expected, late)


def test_half_precision_on_the_gpu() -> None:
    torch.manual_seed(0)
    with torch.device("cuda"):
        expected = model().bfloat16()
    torch.manual_seed(0)
    with lateinit.deferred(), torch.device("cuda"):
        late = model()
    assert_same(expected, lateinit.materialize(late.bfloat16()))


def test_autocast_on_the_gpu_inside_a_constructor() -> None:
    def build() -> nn.Module:
        layer = nn.Linear(8, 8, device="cuda")
        with torch.autocast("cuda", dtype=torch.bfloat16), torch.no_grad():
            layer.register_buffer("product", layer.weight @ layer.weight)
        return layer

    torch.manual_seed(0)
    expected = build()
    torch.manual_seed(0)
    assert_same(expected, lateinit.materialize(lateinit.deferred_init(build)))


def test_shards_go_to_the_devices_of_their_mesh(tmp_path: Path) -> None:
    dist.init_process_group("fake", rank=1, world_size=2, store=FakeStore())
    try:
        mesh = init_device_mesh("cuda", (2,))
        torch.manual_seed(0)
        expected = nn.Linear(600, 800)
        lateinit.save_checkpoint(expected, tmp_path / "linear.safetensors")
        torch.manual_seed(0)
        drawn = lateinit.deferred_init(nn.Linear, 600, 800)
        loaded = lateinit.deferred_init(nn.Linear, 600, 800)
        for late in (drawn, loaded):
            fully_shard(late, mesh=mesh)
        lateinit.materialize(drawn)
        lateinit.load_checkpoint(loaded, tmp_path / "linear.safetensors")
        for late in (drawn, loaded):
            assert late.weight.device.type == late.weight.to_local().device.type == "cuda"
            assert torch.equal(late.weight.to_local().cpu(), expected.weight[400:])
    finally:
        dist.destroy_process_group()


def test_a_map_sends_parts_of_a_model_to_several_devices() -> None:
    torch.manual_seed(0)
    expected = nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 16))
    torch.manual_seed(0)
    model = lateinit.deferred_init(lambda: nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 16)))
    lateinit.materialize(
        model, device={"0": 0, "*": "cpu"}, dtype={"1": torch.bfloat16, "0": torch.float32}
    )
    assert model[0].weight.device == torch.device("cuda:0")
    assert model[1].weight.device.type == "cpu"
    assert torch.equal(model[0].weight.cpu(), expected[0].weight)
    assert torch.equal(model[1].bias, expected[1].bias.bfloat16())


def test_rules_for_what_was_recorded_on_the_gpu_leave_its_generator_alone() -> None:
    def build() -> nn.Module:
        torch.manual_seed(0)
        with torch.device("cuda"):
            return lateinit.deferred_init(nn.Linear, 64, 32)

    first, second = build(), build()
    before = torch.cuda.get_rng_state()
    lateinit.materialize(first, init={"weight": "normal"})
    lateinit.materialize(second, init={"*": "normal"})
    assert torch.equal(before, torch.cuda.get_rng_state())
    assert torch.equal(first.weight, second.weight)
    assert first.weight.std() > 0.5
