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
from lateinit._distributed.training_cost import (
    POLICIES,
    Batch,
    Transformer,
    activation_bytes,
    policy_named,
)
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
        ("pp=x", "pp needs one size"),
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


class Layers(nn.Module):
    """An embedding, five layers, a norm, and a head that is tied or not."""

    def __init__(self, *, tied: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 8)
        self.layers = nn.ModuleList(nn.Linear(8, 8, bias=False) for _ in range(5))
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 10, bias=False)
        if tied:
            self.head.weight = self.embed.weight


def test_stages_hold_their_layers_and_the_largest_is_told() -> None:
    model = lateinit.deferred_init(Layers)
    told = share_of_rank(model, {"pp": 2})
    assert (told.stage, told.rank_parameters) == (0, 80 + 3 * 64)
    assert "stage 0, 272 parameters" in str(told)
    told = share_of_rank(model, {"pp": 5})
    assert (told.stage, told.rank_parameters) == (4, 64 + 16 + 80)
    assert share_of_rank(model, {"pp": 5, "fsdp": 2}).rank_parameters == 32 + 8 + 40


def test_a_tie_is_held_by_both_stages_and_once_in_one() -> None:
    model = lateinit.deferred_init(Layers, tied=True)
    assert share_of_rank(model, {"pp": 1}).rank_parameters == 80 + 5 * 64 + 16
    told = share_of_rank(model, {"pp": 5})
    assert (told.stage, told.rank_parameters) == (4, 64 + 16 + 80)


class Experts(nn.Module):
    """Six experts as a list or in one tensor, a router, and a layer that is no expert's."""

    def __init__(self, *, apart: bool) -> None:
        super().__init__()
        self.router = nn.Linear(8, 6, bias=False)
        self.dense = nn.Linear(8, 8, bias=False)
        self.experts: nn.Module
        if apart:
            self.experts = nn.ModuleList(nn.Linear(8, 4, bias=False) for _ in range(6))
        else:
            self.experts = nn.Module()
            self.experts.up = nn.Parameter(torch.randn(6, 4, 8))


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize(
    ("mesh", "experts", "others"),
    [
        ({"ep": 1}, 6 * 32, 48 + 64),
        ({"ep": 3}, 2 * 32, 16 + 24),
        ({"ep": 4}, 2 * 32, 16 + 16),
        ({"ep": 3, "fsdp": 2}, 32, 8 + 16),
        ({"ep": 3, "fsdp": 4}, 16, 8 + 8),
    ],
)
def test_experts_are_divided_and_the_rest_is_cut_among_all_ranks(
    mesh: dict[str, int], experts: int, others: int, *, apart: bool
) -> None:
    told = share_of_rank(lateinit.deferred_init(Experts, apart=apart), mesh)
    assert told.rank_parameters == experts + others


@pytest.mark.parametrize(
    ("policy", "each"),
    [
        ("recorded", (4, 4, 8)),
        ("mixed", (4, 4, 8)),
        ("bfloat16", (2, 2, 4)),
        ("master", (2, 2, 12)),
    ],
)
def test_training_keeps_so_many_bytes_for_each_trainable_element(
    policy: str, each: tuple[int, int, int]
) -> None:
    model = lateinit.deferred_init(Layers)
    model.embed.weight.requires_grad_(False)
    told = share_of_rank(model, {"fsdp": 2}, policy=policy_named(policy)).training
    trained = 5 * 32 + 8 + 40
    assert told is not None
    assert (told.gradients, told.optimizer) == (trained * each[1], trained * each[2])
    assert told.parameters == trained * each[0] + 4 * 40  # what is frozen stays as it is
    gathered = 4 if policy == "recorded" else 2
    # The layers are gathered one by one; what is outside of them together.
    assert told.gathered == gathered * (64 + 80 + 16 + 80)
    assert told.activations is None
    assert told.total == told.gathered + trained * sum(each) + 4 * 40


def test_adamw_keeps_what_is_estimated() -> None:
    model = Layers()
    optimizer = torch.optim.AdamW(model.parameters())
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    states = [v for s in optimizer.state.values() for k, v in s.items() if k != "step"]
    training = share_of_rank(lateinit.deferred_init(Layers), {}, policy=POLICIES["recorded"])
    assert training.training is not None
    assert training.training.optimizer == sum(state.nbytes for state in states)


GPT_175B = Transformer(hidden=12288, heads=96, layers=96, vocabulary=51200)


def test_activations_are_those_of_the_paper() -> None:
    """Korthikanti et al. 2022: GPT-3 with t=8 and s=2048 keeps 34 + 80 parts, of which 80 go."""
    whole = Batch(1, 2048, "none")
    tokens = 2048 * 12288
    plain = {"tensor": 1, "pipeline": 8, "sequence": False}
    assert activation_bytes(GPT_175B, whole, **plain) == tokens * (96 * (34 + 80) + 8)
    cut = {"tensor": 8, "pipeline": 8, "sequence": True}
    assert activation_bytes(GPT_175B, whole, **cut) == tokens * (96 * (34 + 80) + 8) // 8
    selective = activation_bytes(GPT_175B, Batch(1, 2048), **cut)
    assert selective == tokens * (96 * 34 + 8) // 8
    parallel = {"tensor": 8, "pipeline": 8, "sequence": False}
    assert activation_bytes(GPT_175B, whole, **parallel) == tokens * (96 * (10 + 3 + 10) + 8)
    full = activation_bytes(GPT_175B, Batch(2, 2048, "full"), **plain)
    assert full == 2 * tokens * (96 * 2 + 8)
    alone = activation_bytes(GPT_175B, Batch(1, 2048), tensor=1, pipeline=1, sequence=False)
    assert alone == tokens * (96 * 34 + 5) + 4 * 2048 * 51200


def test_what_cannot_be_estimated_is_told() -> None:
    model = lateinit.deferred_init(Layers)
    with pytest.raises(ShardingError, match=r"pp=6 needs a layer for each.* 5 layers in layers"):
        share_of_rank(model, {"pp": 6})
    with pytest.raises(ShardingError, match="Linear has no list of layers"):
        share_of_rank(lateinit.deferred_init(nn.Linear, 3, 3), {"pp": 2})
    with pytest.raises(ShardingError, match="no module of Layers is called experts"):
        share_of_rank(model, {"ep": 2})
    with pytest.raises(ShardingError, match=r"--train mix: no policy is called so.*mixed"):
        policy_named("mix")
    with pytest.raises(ShardingError, match=r"Layers\.config has no hidden_size, .* leave --batch"):
        share_of_rank(model, {}, policy=POLICIES["mixed"], batch=Batch(1, 8))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--batch", "1", "--sequence", "2"], "--batch goes with --train"),
        (["--mesh", "fsdp=2", "--batch", "1", "--sequence", "2"], "--batch goes with --train"),
        (["--mesh", "fsdp=2", "--train", "mixed", "--batch", "1"], "--sequence go together"),
        (["--mesh", "fsdp=2", "--recompute", "some"], "--recompute some is none of none"),
    ],
)
def test_options_that_do_not_go_together(options: list[str], message: str) -> None:
    arguments = ["inspect", "tests.sharding.placements:Block", *options]
    found = CliRunner().invoke(cli.app, arguments, env={"COLUMNS": "200"})
    assert found.exit_code == 2
    assert message in found.output


def test_command_tells_what_training_takes() -> None:
    spec = ["inspect", "transformers:llama", "--kwargs", '{"num_hidden_layers": 4}']
    asked = [*spec, "--mesh", "fsdp=4,tp=2,pp=2", "--train", "master"]
    asked += ["--batch", "1", "--sequence", "512"]
    pytest.importorskip("transformers")
    found = CliRunner().invoke(cli.app, asked)
    assert found.exit_code == 0, found.output
    assert "activations about" in found.output
    told = json.loads(CliRunner().invoke(cli.app, [*asked, "--json"]).stdout)
    assert told["training"]["gradients"] == 2 * told["rank_parameters"]
    assert told["seconds_to_shard"] > 0


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
