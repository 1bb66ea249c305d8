"""What a rank would hold, on paper and in truth."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from typer.testing import CliRunner

import lateinit
from lateinit import cli
from lateinit._distributed.mesh_cost import parse_mesh, share_of_rank
from lateinit.errors import ShardingError
from tests.sharding.alone import alone_as
from tests.sharding.placements import Block, fsdp, tensor_parallel

PLAN = {"embed": "embedding_rowwise", "up": "colwise", "down": "rowwise"}
WIDE = {"width": 384, "vocabulary": 1001}


def local(model: nn.Module) -> tuple[int, int]:
    """The elements and the bytes that this rank holds of the parameters."""
    held = [p.to_local() if isinstance(p, DTensor) else p for p in model.parameters()]
    return sum(p.numel() for p in held), sum(p.numel() * p.element_size() for p in held)


@pytest.mark.parametrize(("parts", "axis"), [(1, 1), (3, 1), (8, 1), (1, 2), (3, 2)])
def test_share_is_what_rank_0_holds(parts: int, axis: int) -> None:
    model = lateinit.deferred_init(Block, **WIDE)
    told = share_of_rank(model, {"fsdp": parts, "tp": axis}, PLAN)
    with alone_as(0, parts * axis):
        mesh = init_device_mesh("cpu", (parts, axis), mesh_dim_names=("dp", "tp"))
        if axis > 1:
            tensor_parallel(model, mesh["tp"])
        if parts > 1:
            fsdp(model, mesh["dp"])
        lateinit.materialize(model, check=False)
        elements, nbytes = local(model)
    assert told.rank_parameters == elements
    assert told.rank_bytes == nbytes + model.scale.nbytes
    assert told.buffer_bytes == model.scale.nbytes
    assert told.parameters == sum(p.numel() for p in Block(**WIDE).parameters())
    assert told.seconds > 0


def test_copies_hold_everything() -> None:
    model = lateinit.deferred_init(Block, **WIDE)
    told = share_of_rank(model, {"replicate": 4})
    assert told.rank_bytes == told.model_bytes
    assert told.whole is None


def test_what_must_be_whole_is_named() -> None:
    told = share_of_rank(lateinit.deferred_init(Block, **WIDE), {"fsdp": 4})
    assert told.whole == "down.weight"  # orthogonal
    assert told.whole_bytes == 4 * 384 * 1536
    rows = math.ceil(1001 / 4) * 384 + math.ceil(1536 / 4) * 384
    assert rows < told.drawn < rows + 2 * 384 * 1536 + 5000


def test_the_models_own_plan_is_taken() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4
    )
    model = lateinit.deferred_init(transformers.LlamaForCausalLM, config)
    whole = sum(p.numel() for p in model.parameters() if p.dim() > 1)
    norms = sum(p.numel() for p in model.parameters() if p.dim() == 1)
    assert share_of_rank(model, {"tp": 2}).rank_parameters == whole // 2 + norms


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("fsd=4", "no axis is called 'fsd'; there are: fsdp"),
        ("fsdp", "fsdp needs one size of 1 or more"),
        ("fsdp=0", "fsdp needs one size"),
        ("tp=2,tp=2", "tp needs one size"),
        ("", "no axis is called ''"),
    ],
)
def test_a_mesh_that_is_none(text: str, message: str) -> None:
    with pytest.raises(ShardingError, match=message):
        parse_mesh(text)


def test_a_plan_that_is_missing_or_matches_nothing() -> None:
    model = lateinit.deferred_init(Block)
    with pytest.raises(ShardingError, match="Block has no plan of tensor parallelism"):
        share_of_rank(model, {"tp": 2})
    with pytest.raises(ShardingError, match=r"\*\.upp matches no parameter"):
        share_of_rank(model, {"tp": 2}, {"*.upp": "colwise"})


def test_command() -> None:
    arguments = ["inspect", "tests.sharding.placements:Block", "--mesh", "fsdp=2,tp=2"]
    asked = [*arguments, "--tp-plan", json.dumps(PLAN)]
    found = CliRunner().invoke(cli.app, asked)
    assert found.exit_code == 0, found.output
    assert "4 ranks" in found.output
    told = json.loads(CliRunner().invoke(cli.app, [*asked, "--json"]).stdout)
    assert told["mesh"] == {"fsdp": 2, "tp": 2}
    assert told["rank_bytes"] < told["model_bytes"]
    assert CliRunner().invoke(cli.app, [*arguments[:3], "nonsense"]).exit_code == 2
    assert torch.is_grad_enabled()
