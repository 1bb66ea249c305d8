"""torch's operators: their schemas and tags, and which of them torch calls."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lateinit._torch import operators
from lateinit._torch.op_table import OpTraits
from lateinit._torch.operators import (
    CONSTANT,
    REFUSED,
    TRUNC_NORMAL,
    TRUNCATED,
    OpInfo,
    OpOverload,
    by_name,
    copy_into,
    op_behind,
    op_info,
    overload_for,
    parse_to,
    register,
    spoken,
    to_copy,
    to_dlpack,
)
from tests.torch_contract.listeners import Operators

aten = torch.ops.aten


def test_an_overload_has_a_name_a_schema_and_tags() -> None:
    """torch/_ops.py: OpOverload.name() leaves out ``.default`` and ._schema lists arguments."""
    assert isinstance(aten.add.Tensor, OpOverload)
    assert (aten.add.Tensor.name(), aten.relu.default.name()) == ("aten::add.Tensor", "aten::relu")
    assert [a.name for a in aten.add.Tensor._schema.arguments] == ["self", "other", "alpha"]


@pytest.mark.parametrize("name", [CONSTANT, TRUNCATED, REFUSED])
def test_torch_has_no_operator_with_a_name_of_ours(name: str) -> None:
    """torch/_ops.py: a namespace that nobody has registered anything in has no operators."""
    namespace, _, base = name.partition("::")
    assert namespace == "lateinit"
    assert not hasattr(getattr(torch.ops, namespace), base)


def test_schemas_say_what_is_written_and_where_the_result_goes() -> None:
    """torch/csrc/utils/schema_info.h: ``alias_info.is_write`` is the ``!`` of ``Tensor(a!)``."""
    info = op_info(aten.add_.Tensor)
    assert isinstance(info, OpInfo)
    assert (info.mutates, info.mutates_kw, info.scalar_inplace) == ((0,), (), True)
    out = op_info(aten.add.out)
    assert (out.mutates, out.mutates_kw, out.scalar_inplace) == ((), ("out",), False)
    assert op_info(aten.zeros.default).takes_device
    assert op_info(aten.empty_like.default).from_sizes
    assert not op_info(aten._assert_async.default).returns_tensor


def test_tags_say_what_draws_and_what_changes_only_metadata() -> None:
    """aten/src/ATen/native/tags.yaml: nondeterministic_seeded draws; inplace_view moves nothing."""
    draws = {"normal_": True, "native_dropout": True, "rand_like": True, "neg": False}
    assert {name: by_name(f"aten::{name}").random for name in draws} == draws
    assert op_info(aten.randperm.generator).takes_generator
    assert op_info(aten.t_.default).metadata_only
    assert not op_info(aten.neg_.default).metadata_only


def test_a_collective_is_told_by_its_namespace_for_its_schema_says_no_write() -> None:
    """torch/csrc/distributed/c10d/Ops.cpp: ``broadcast_(Tensor[] tensors, ...)``, without (a!)."""
    for name in (
        "c10d::broadcast_",
        "_c10d_functional::all_reduce",
        "_dtensor::shard_dim_alltoall",
    ):
        info = by_name(name)
        assert info.collective
        assert not info.mutates
    assert not by_name("aten::add.Tensor").collective


def test_batch_norm_updates_statistics_that_its_schema_does_not_mark() -> None:
    """aten/src/ATen/native/native_functions.yaml: native_batch_norm has ``running_mean`` bare."""
    schema = aten.native_batch_norm.default._schema.arguments
    assert [a.name for a in schema if a.alias_info and a.alias_info.is_write] == []
    mean, var = torch.zeros(3), torch.ones(3)
    given = (torch.randn(4, 3), None, None, mean, var)
    aten.native_batch_norm(*given, True, 0.1, 1e-5)
    assert mean.abs().min() > 0
    assert by_name("aten::native_batch_norm").mutates == (3, 4)


def test_torch_tells_which_overload_takes_some_arguments() -> None:
    """torch/csrc/jit/python/init.cpp: _jit_resolve_packet gives the name of the overload."""
    x = torch.ones(2)
    assert overload_for("aten::linalg_norm", (x, 2), {"dim": 0}).name == "aten::linalg_norm"
    assert overload_for("aten::linalg_norm", (x, "fro"), {}).name == "aten::linalg_norm.ord_str"
    assert overload_for("aten::relu", (x,), {}).func is aten.relu.default
    given = (x.view(1, 2), (torch.zeros(1, 2),) * 2, [torch.ones(8, 2)] * 2)
    assert overload_for("aten::lstm", (*given, False, 1, 0.0, False, False, False), {}).name == (
        "aten::lstm.input"
    )


def test_torch_parses_what_a_conversion_was_given() -> None:
    """torch/csrc/autograd/python_nn_functions (generated): _parse_to, for nn.Module.to."""
    meta = torch.device("meta")
    assert parse_to("meta", torch.half) == (meta, torch.half, False, None)
    assert parse_to(torch.ones(1).double(), True) == (
        torch.device("cpu"),
        torch.double,
        True,
        None,
    )
    assert parse_to(memory_format=torch.channels_last)[3] is torch.channels_last


def test_a_conversion_that_copies_is_one_operator_to_the_dispatcher() -> None:
    """aten/src/ATen/native/TensorConversions.cpp: ``to`` is composite, and calls _to_copy."""
    tensor = torch.ones(2)
    with Operators() as mode:
        tensor.to(torch.float64)
        assert tensor.to(torch.float32) is tensor
    assert mode.heard == [to_copy.name()] == ["aten::_to_copy"]


def test_copying_into_a_tensor_is_one_operator_to_the_dispatcher() -> None:
    """aten/src/ATen/native/Copy.cpp: copy_ is a kernel of its own."""
    with Operators() as mode:
        torch.ones(2).copy_(torch.zeros(2))
    assert mode.heard[-1] == copy_into.name() == "aten::copy_"


def test_trunc_normal_looks_its_worker_up_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch/nn/init.py: trunc_normal_ returns _no_grad_trunc_normal_(tensor, mean, std, a, b)."""
    found = []
    name = TRUNC_NORMAL.__name__
    assert getattr(nn.init, name) is TRUNC_NORMAL
    monkeypatch.setattr(nn.init, name, lambda *args, generator: found.append((args, generator)))
    tensor = torch.ones(2)
    nn.init.trunc_normal_(tensor, 1, 2, -3, 4)
    assert found == [((tensor, 1, 2, -3, 4), None)]


def test_a_filler_of_ours_draws_from_the_generator_that_it_is_given(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """aten/src/ATen/native/Distributions.cpp: a given generator is drawn from, no other."""
    monkeypatch.setattr(operators, "_BY_NAME", dict(operators._BY_NAME))
    info = register(
        "lateinit::filled",
        lambda tensor, *, generator: tensor.normal_(0, 1, generator=generator),
        OpTraits(fills=True, draws="values"),
    )
    assert by_name("lateinit::filled") is info
    before = torch.get_rng_state()
    first, second = (
        info.func(torch.empty(5), generator=torch.Generator().manual_seed(3)) for _ in range(2)
    )
    assert torch.equal(first, second)
    assert torch.equal(torch.get_rng_state(), before)


def test_an_operator_is_found_by_its_qualified_name() -> None:
    """torch/_ops.py: torch.ops.NAMESPACE.BASE.OVERLOAD, ``default`` where it has no name."""
    for func in (aten.relu.default, aten.add.Tensor, torch.ops.prims.exp.default):
        assert by_name(func.name()).func is func


def test_item_is_an_operator_with_another_name() -> None:
    """aten/src/ATen/native/Scalar.cpp: ``item`` is composite, and calls _local_scalar_dense."""
    tensor = torch.ones(())
    with Operators() as mode:
        tensor.item()
    assert [spoken(name) for name in mode.heard] == ["item"]
    assert mode.heard == ["aten::_local_scalar_dense"]


def test_the_op_behind_a_function_is_found_by_name_if_it_makes_no_view() -> None:
    """tools/autograd/templates/python_torch_functions.cpp: functions are named as their ops are."""
    state = torch.zeros(3, 30, dtype=torch.int64)
    found = op_behind(torch._sobol_engine_initialize_state_, (state, 3), {})
    assert found is not None
    assert found.name == "aten::_sobol_engine_initialize_state_"
    assert found.mutates == (0,)
    assert op_behind(torch.tensor_split, (torch.ones(4), torch.tensor([2])), {}) is None
    assert op_behind(torch.nn.init.orthogonal_, (torch.ones(2, 2),), {}) is None


def test_a_capsule_of_dlpack_shares_the_memory() -> None:
    """torch/csrc/Module.cpp: DLPack_Module.to_dlpack, which asks no mode."""
    tensor = torch.ones(3)
    torch.utils.dlpack.from_dlpack(to_dlpack(tensor)).mul_(2)
    assert tensor.tolist() == [2, 2, 2]
    assert torch.utils.dlpack.to_dlpack is torch.to_dlpack is to_dlpack
