"""Tensors that consist of others, and what a ``DTensor`` keeps of its own."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.fsdp._fully_shard._fsdp_param import FSDPParam
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard
from torch.testing._internal.two_tensor import TwoTensor

from lateinit._torch.swap import swap
from lateinit._torch.wrappers import (
    Cut,
    FakeMode,
    KeptByFsdp,
    axes_as_sharded,
    chunk_of,
    enter_fake_mode,
    fake_like,
    indices_of_part,
    is_dtensor,
    is_fake,
    is_wrapper,
    kept_by_fsdp,
    local_part,
    rewrap,
    tell_of_cuts,
    tell_of_fsdp_parameters,
    tell_of_new_dtensors,
)
from tests.sharding.alone import alone_as

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


@pytest.fixture
def second_of_three() -> Iterator[None]:
    with alone_as(1, 3):
        yield


def sharded(tensor: torch.Tensor) -> DTensor:
    mesh = init_device_mesh("cpu", (3,))
    shard: DTensor = distribute_tensor(tensor, mesh, [Shard(0)], src_data_rank=None)
    return shard


@pytest.mark.usefixtures("second_of_three")
def test_wrappers_can_be_flattened_and_plain_tensors_cannot() -> None:
    """torch/utils/_python_dispatch.py: __tensor_flatten__ makes a traceable wrapper subclass."""
    assert is_wrapper(sharded(torch.ones(6)))
    assert is_wrapper(TwoTensor(torch.ones(1), torch.ones(1)))
    assert not is_wrapper(torch.ones(1))
    assert not is_wrapper(nn.Parameter(torch.ones(1)))


@pytest.mark.usefixtures("second_of_three")
def test_a_parameter_of_a_dtensor_is_a_dtensor(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch/nn/parameter.py: __new__ makes no Parameter of a tensor of a class of its own."""
    parameter = nn.Parameter(sharded(torch.ones(6)))
    assert is_dtensor(parameter)
    assert not is_dtensor(torch.ones(1))
    monkeypatch.delitem(sys.modules, "torch.distributed.tensor")
    assert not is_dtensor(parameter)  # nobody who has not imported it can have made one


def test_a_fake_tensor_says_a_real_device_and_belongs_to_a_mode() -> None:
    """torch/_subclasses/fake_tensor.py: FakeTensor has ``fake_mode``, which makes more of them."""
    fake = FakeTensorMode().from_tensor(torch.ones(2, 3))
    assert is_fake(fake)
    assert not is_fake(torch.ones(1, device="meta"))
    assert (fake.device.type, fake.is_meta) == ("cpu", False)
    other = fake_like(fake, torch.empty(3, 2, device="meta").t(), torch.device("cpu"))
    assert is_fake(other)
    assert (other.shape, other.stride(), other.device.type) == ((2, 3), (1, 2), "cpu")
    assert is_fake(fake + other)


@pytest.mark.usefixtures("second_of_three")
def test_the_memory_of_a_dtensor_is_that_of_its_local_tensor() -> None:
    """torch/distributed/tensor/_api.py: ``_local_tensor``; to_local() gives a view of it."""
    shard = sharded(torch.arange(6.0))
    assert local_part(shard).tolist() == [2, 3]
    assert local_part(shard) is shard._local_tensor
    assert local_part(shard).data_ptr() == shard.to_local().data_ptr()


@pytest.mark.usefixtures("second_of_three")
def test_a_dtensor_has_the_device_that_its_local_part_had_when_it_was_made() -> None:
    """torch/distributed/tensor/_api.py: __new__ gives _make_wrapper_subclass the local device."""
    shard = nn.Parameter(sharded(torch.empty(6, device="meta")))
    swap(local_part(shard), torch.ones(2))
    assert (shard.device.type, local_part(shard).device.type) == ("meta", "cpu")
    held, local = shard, local_part(shard)
    rewrap(shard)
    assert (shard.device.type, shard.shape, shard.placements) == ("cpu", (6,), (Shard(0),))
    assert shard is held
    assert shard.requires_grad
    assert isinstance(shard, nn.Parameter)
    assert local_part(shard) is local
    assert (shard * 2).to_local().tolist() == [2, 2]


@pytest.mark.parametrize("placement", [Shard(1), _StridedShard(1, split_factor=2)], ids=str)
@pytest.mark.parametrize("length", [13, 12, 7, 2, 1, 0])
def test_a_placement_tells_the_indices_that_it_gives_to_a_rank(
    length: int, placement: Placement
) -> None:
    """torch/distributed/tensor/placement_types.py: Shard does as chunk, others say themselves."""
    whole = torch.arange(length).view(1, length)
    for rank in range(3):
        with alone_as(rank, 3):
            mesh = init_device_mesh("cpu", (3,))
            shard = distribute_tensor(whole, mesh, [placement], src_data_rank=None)
            found = indices_of_part(placement, length, 3, rank)
            assert found is not None
            assert list(found) == local_part(shard).flatten().tolist()
            assert (type(found) is range) == (type(placement) is Shard)
    assert indices_of_part(Replicate(), length, 3, 0) is None


def test_axes_cut_from_left_to_right_unless_the_spec_has_an_order() -> None:
    """torch/distributed/tensor/_dtensor_spec.py: ``shard_order``."""
    with alone_as(0, 4):
        mesh = init_device_mesh("cpu", (2, 2))
        for placements in ([Shard(0), Shard(0)], [_StridedShard(0, split_factor=2), Shard(0)]):
            shard = distribute_tensor(torch.arange(8), mesh, placements, src_data_rank=None)
            assert list(axes_as_sharded(shard)) == [0, 1]
        shard = distribute_tensor(torch.arange(8), mesh, [Shard(0)] * 2, src_data_rank=None)
        if hasattr(shard._spec, "shard_order"):  # from torch 2.10 on
            (entry,) = shard._spec.shard_order
            shard._spec.shard_order = (entry._replace(mesh_dims=(1, 0)),)
            assert list(axes_as_sharded(shard)) == [1, 0]


@pytest.mark.usefixtures("second_of_three")
def test_python_code_makes_dtensors_by_the_constructor(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch/distributed/tensor/_api.py: __new__ is C++, and __init__ is called after it."""
    made: list[object] = []
    tell_of_new_dtensors(None)
    constructor = DTensor.__init__
    assert tell_of_new_dtensors(made.append)
    assert tell_of_new_dtensors(made.append)  # the last listener alone is told
    shard = sharded(torch.ones(6))
    assert len(made) == 1
    assert made[0] is shard
    assert tell_of_new_dtensors(None)
    sharded(torch.ones(6))
    assert len(made) == 1
    assert DTensor.__init__ is constructor
    monkeypatch.delitem(sys.modules, "torch.distributed.tensor")
    assert not tell_of_new_dtensors(made.append)


@pytest.mark.parametrize("length", [0, 1, 5, 6, 7])
@pytest.mark.parametrize("parts", [1, 2, 3, 8])
def test_chunks_are_those_that_torch_cuts(length: int, parts: int) -> None:
    """aten/src/ATen/native/TensorShape.cpp: chunk; fewer chunks than parts may be left."""
    cut = [chunk.tolist() for chunk in torch.arange(length).chunk(parts)]
    cut += [[]] * (parts - len(cut))
    assert [list(chunk_of(length, parts, part)) for part in range(parts)] == cut


@pytest.mark.parametrize("rows", [1, 2, 5, 6])
@pytest.mark.parametrize("dim", [0, 1])
def test_fsdp_keeps_one_chunk_of_a_parameter_in_padded_memory(rows: int, dim: int) -> None:
    """torch/distributed/fsdp/_fully_shard/_fsdp_param.py: FSDPParam._init_sharded_param."""
    weight, states = torch.randn(rows, 3), []
    tell_of_fsdp_parameters(None)
    constructor = FSDPParam.__init__

    def told(make: Callable[[], None], state: object, parameter: torch.Tensor) -> None:
        assert parameter.equal(weight)
        make()
        states.append(state)

    for rank in range(3):
        with alone_as(rank, 3):
            layer = nn.Linear(3, rows, bias=False)
            layer.weight = nn.Parameter(weight.clone())
            assert tell_of_fsdp_parameters(told)
            mesh = init_device_mesh("cpu", (3,))
            fully_shard(layer, mesh=mesh, shard_placement_fn=lambda _: Shard(dim))
            assert tell_of_fsdp_parameters(None)
            assert FSDPParam.__init__ is constructor
            kept = kept_by_fsdp(states[rank])
            assert isinstance(kept, KeptByFsdp)
            assert kept.shard is layer.weight
            assert kept.dim == dim
            assert (
                kept.memory.untyped_storage().data_ptr() == kept.local.untyped_storage().data_ptr()
            )
            if kept.length:
                expected = weight.narrow(dim, kept.start, kept.length)
                assert kept.local.equal(expected)
            assert kept.memory[kept.local.numel() :].eq(0).all()
            assert kept.local.size(dim) == kept.length
            padded = weight.chunk(3, dim)[0].numel()
            assert len(kept.memory) == padded


@pytest.mark.parametrize("source", [None, 0])
@pytest.mark.parametrize("rows", [1, 2, 5, 6])
def test_distribute_tensor_takes_one_chunk_along_each_axis(rows: int, source: int | None) -> None:
    """torch/distributed/tensor/placement_types.py: Shard._shard_tensor, as torch.chunk cuts."""
    tell_of_cuts(None)
    weight, cuts = torch.randn(2, rows, device="meta"), []
    original, of_replicas = Shard._shard_tensor, Replicate._make_replicate_tensor

    def told(cut: Cut) -> torch.Tensor:
        cuts.append(cut)
        return cut.take(cut.tensor)

    for rank in range(3):
        with alone_as(rank, 3):
            mesh = init_device_mesh("cpu", (3,))
            assert tell_of_cuts(told)
            assert tell_of_cuts(told)  # the last listener alone is told
            shard = distribute_tensor(weight, mesh, [Shard(1)], src_data_rank=source)
            distribute_tensor(weight, mesh, [Replicate()], src_data_rank=source)
            strided = [_StridedShard(1, split_factor=1)]
            distribute_tensor(weight, mesh, strided, src_data_rank=None)
            assert tell_of_cuts(None)
            distribute_tensor(weight, mesh, [Shard(0)])
        simple, replica, other = cuts[-3:]
        assert len(cuts) == 3 * (rank + 1)
        assert (simple.dim, simple.chunks, simple.chunk) == (1, 3, rank)
        assert simple.tensor.shape == weight.shape
        assert (replica.dim, other.dim) == (None, None)
        chunks = weight.chunk(3, 1)
        length = chunks[rank].size(1) if rank < len(chunks) else 0
        assert local_part(shard).shape == (2, length)
    assert Shard._shard_tensor is original
    assert Replicate._make_replicate_tensor == of_replicas


def test_a_rank_outside_of_the_mesh_takes_no_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch/distributed/device_mesh.py: get_coordinate is None there."""
    cuts: list[Cut] = []
    with alone_as(2, 3):
        assert tell_of_cuts(lambda cut: cuts.append(cut) or cut.take(cut.tensor))
        distribute_tensor(torch.ones(4), DeviceMesh("cpu", [0, 1]), [Shard(0)])
        assert tell_of_cuts(None)
    assert cuts[0].dim is None
    monkeypatch.delitem(sys.modules, "torch.distributed.tensor.placement_types")
    assert not tell_of_cuts(None)


def test_a_fake_mode_is_entered_by_its_method() -> None:
    """torch/_subclasses/fake_tensor.py: FakeTensorMode.__enter__; torch.export enters it too."""
    assert FakeMode is FakeTensorMode
    mode = FakeMode()
    assert enter_fake_mode(mode) is mode
    assert is_fake(torch.ones(2))
    mode.__exit__(None, None, None)
