"""Placeholders: recognised by torch, movable, copied, and refused wherever values are wanted."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.parameter import is_lazy

import lateinit
from lateinit.errors import UninitializedError
from tests.support.snapshots import assert_same

BOTH = pytest.mark.parametrize(
    "cls", [lateinit.nn.UninitializedParameter, lateinit.nn.UninitializedBuffer]
)


@BOTH
def test_torch_recognises_it(cls: Any) -> None:
    assert is_lazy(cls())
    assert isinstance(cls(), getattr(nn, cls.__name__, getattr(nn.parameter, cls.__name__)))


def test_what_is_known_is_shown() -> None:
    assert repr(lateinit.nn.LazyLinear(10).weight) == "<UninitializedParameter (10, ?)>"
    assert repr(lateinit.nn.LazyLinear(10).bias) == "<UninitializedParameter (10,)>"
    assert (
        repr(lateinit.nn.LazyConv2d(8, 3, groups=2).weight)
        == "<UninitializedParameter (8, ?, 3, 3)>"
    )
    assert repr(lateinit.nn.UninitializedBuffer()) == "<UninitializedBuffer (unknown shape)>"
    assert lateinit.nn.LazyLSTM(4).weight_ih_l0.known_shape == (16, None)
    assert lateinit.nn.LazyTransformerEncoderLayer(2, 16).linear1.weight.known_shape == (16, None)


@BOTH
def test_it_is_moved_cast_copied_and_pickled_with_what_is_known(cls: Any) -> None:
    made = cls(known_shape=(3, None), dtype=torch.float64, requires_grad=False)
    for other in (copy.deepcopy(made), pickle.loads(pickle.dumps(made)), made.to(torch.float16)):
        assert type(other) is cls
        assert other.known_shape == (3, None)
        assert other.requires_grad is False
    assert made.half().dtype == torch.float16
    assert copy.deepcopy(made).dtype == torch.float64


@pytest.mark.parametrize(
    "cast", [nn.Module.half, nn.Module.double, nn.Module.bfloat16, nn.Module.cpu]
)
def test_a_lazy_model_is_cast_before_its_first_forward(cast: Any) -> None:
    model = cast(nn.Sequential(lateinit.nn.LazyBatchNorm1d(), lateinit.nn.LazyLinear(3)))
    dtype = cast(nn.Linear(1, 1)).weight.dtype
    assert is_lazy(model[0].running_mean)
    model(torch.ones(2, 4, dtype=dtype))
    assert {t.dtype for t in (*model.parameters(), model[0].running_mean)} == {dtype}
    assert model[0].num_batches_tracked.dtype == torch.int64


def test_materialize_sets_the_shape_and_keeps_the_object_and_its_hooks() -> None:
    made = lateinit.nn.UninitializedParameter()
    seen: list[torch.Tensor] = []
    made.register_hook(seen.append)
    made.materialize((2, 3), dtype=torch.float64)
    assert type(made) is nn.Parameter
    assert (made.shape, made.dtype) == ((2, 3), torch.float64)
    made.sum().backward()
    assert len(seen) == 1


def lazy_linear() -> nn.Module:
    return lateinit.nn.LazyLinear(3)


def test_its_shape_cannot_be_asked_for() -> None:
    with pytest.raises(
        UninitializedError, match=r"shape of LazyLinear\.weight \(3, \?\) is not known"
    ):
        _ = lazy_linear().weight.shape
    # As torch says it, for those who look for its words.
    with pytest.raises(RuntimeError, match="Can't access the shape of an uninitialized"):
        _ = lazy_linear().weight.shape


@BOTH
def test_a_shape_may_be_an_int_as_for_torch_empty(cls: Any) -> None:
    made = cls(known_shape=(None,))
    made.materialize(10)
    assert made.shape == (10,)


def test_computing_with_it_is_refused() -> None:
    with pytest.raises(UninitializedError, match=r"add was given LazyLinear\.weight \(3, \?\)"):
        torch.add(lazy_linear().weight, 1)
    with pytest.raises(ValueError, match="uninitialized parameter"):
        lazy_linear().weight * 2


def test_an_optimizer_step_over_it_is_refused() -> None:
    model = nn.Sequential(lazy_linear(), nn.Linear(3, 2))
    for kind in (torch.optim.SGD, torch.optim.AdamW):
        optimizer = kind(model.parameters(), lr=0.1)
        optimizer.zero_grad()
        with pytest.raises(
            UninitializedError, match=r"cannot step over LazyLinear\.weight \(3, \?\)"
        ):
            optimizer.step()


def test_torch_save_is_refused(tmp_path: Any) -> None:
    for what in (lazy_linear(), lazy_linear().state_dict()):
        with pytest.raises(UninitializedError, match=r"torch\.save cannot save LazyLinear\.weight"):
            torch.save(what, tmp_path / "lazy.pt")


def test_sharing_its_memory_is_refused() -> None:
    with pytest.raises(
        RuntimeError,
        match=r"Can't share memory on an uninitialized parameter or buffer, LazyLinear\.weight",
    ):
        lazy_linear().share_memory()


def test_data_parallel_is_refused() -> None:
    with pytest.raises(RuntimeError, match="can't be used with `DataParallel`"):
        lazy_linear()._replicate_for_data_parallel()


def test_distributed_data_parallel_is_refused(tmp_path: Any) -> None:
    torch.distributed.init_process_group(
        "gloo", rank=0, world_size=1, init_method=f"file://{tmp_path}/rendezvous"
    )
    try:
        with pytest.raises(RuntimeError, match="uninitialized parameter"):
            nn.parallel.DistributedDataParallel(lazy_linear())
    finally:
        torch.distributed.destroy_process_group()


# Deprecated in torch: a DeprecationWarning in 2.13, a FutureWarning since 2.14.
@pytest.mark.filterwarnings("ignore:`torch.jit.script")
def test_scripting_is_refused() -> None:
    with pytest.raises(RuntimeError, match="uninitialized parameters"):
        torch.jit.script(lazy_linear())


def test_weight_norm_and_spectral_norm_are_refused() -> None:
    with pytest.raises(ValueError, match="can't have uninitialized parameters"):
        nn.utils.weight_norm(lazy_linear())
    with pytest.raises(ValueError, match="can't have uninitialized parameters"):
        nn.utils.spectral_norm(lazy_linear())


def test_compile_takes_a_model_after_inference_and_a_lazy_one() -> None:
    ready = nn.Sequential(lazy_linear(), nn.ReLU(), lateinit.nn.LazyBatchNorm1d())
    lateinit.infer_shapes(ready, torch.ones(2, 4))
    lazy = nn.Sequential(lazy_linear(), nn.ReLU(), lateinit.nn.LazyBatchNorm1d())
    for model in (ready, lazy):
        compiled = torch.compile(model, backend="eager")
        x = torch.randn(2, 4)
        found = compiled(x)
        assert torch.equal(found, model(x))
        assert type(model[0]) is nn.Linear


@pytest.mark.parametrize("block", [True, False])
@pytest.mark.parametrize(
    "casts",
    [
        (nn.Module.bfloat16, nn.Module.float),
        (nn.Module.half, nn.Module.double, nn.Module.bfloat16),
        (lambda m: m.to(torch.float16), lambda m: m.to(torch.bfloat16), nn.Module.float),
        (nn.Module.double, nn.Module.float),
    ],
)
def test_each_cast_of_what_is_lazy_rounds(casts: Any, block: bool) -> None:
    def make(lazy: bool) -> nn.Module:
        first = lateinit.nn.LazyLinear(9) if lazy else nn.Linear(7, 9)
        return nn.Sequential(first, lateinit.nn.LazyBatchNorm1d() if lazy else nn.BatchNorm1d(9))

    torch.manual_seed(0)
    twin = make(lazy=False)
    torch.manual_seed(0)
    model = lateinit.deferred_init(make, True) if block else make(lazy=True)
    for cast in casts:
        cast(twin)
        cast(model)
    torch.manual_seed(0)
    lateinit.infer_shapes(model, torch.empty(2, 7, device="meta", dtype=twin[0].weight.dtype))
    assert_same(twin, lateinit.materialize(model))


@pytest.mark.parametrize(
    "make",
    [
        lazy_linear,
        lambda: nn.Sequential(lazy_linear()),
        lambda: lateinit.deferred_init(lazy_linear),
        lambda: lateinit.pfn_extras.LazyLinear(None, 3),
        lambda: nn.Sequential(lateinit.lazy(nn.Linear, in_features=lateinit.size(-1))(2)),
    ],
)
def test_tracing_it_with_fx_says_to_infer_its_shapes_first(make: Any) -> None:
    with pytest.raises(UninitializedError, match=r"traced.*lateinit\.infer_shapes"):
        torch.fx.symbolic_trace(make())
