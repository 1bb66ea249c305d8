"""The estimate of what training holds, against what autograd really saves on the CPU."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from typer.testing import CliRunner

import lateinit
from lateinit import cli
from lateinit._distributed.mesh_cost import share_of_rank
from lateinit._distributed.training_cost import POLICIES, Activations, Batch, Training
from lateinit.errors import ShardingError

SHAPE = (2, 48)
TINY = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 101}
GATED = TINY | {"intermediate_size": 160, "num_key_value_heads": 2}
FEW = {"n_embd": 64, "n_layer": 3, "n_head": 4, "vocab_size": 101, "eos_token_id": 0}
GPT = FEW | {"bos_token_id": 0, "attn_pdrop": 0.0}


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        x = x + F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        return x + self.down(F.gelu(self.up(x)))


class Plain(nn.Module):
    """A model of no library, with layers, a buffer and a tie."""

    def __init__(self, width: int = 40, depth: int = 3, *, again: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, width)
        self.layers = nn.ModuleList(Block(width) for _ in range(depth))
        self.head = nn.Linear(width, 50, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("scale", torch.ones(width))
        self.again = again

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids) * self.scale
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=False) if self.again else layer(x)
        return self.head(x)


def really_saved(model: nn.Module, **given: Any) -> int:
    """The bytes of the storages that autograd saves of a forward pass, but for the model's own."""
    own = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    kept: dict[int, torch.UntypedStorage] = {}

    def save(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return tensor

    ids = torch.zeros(SHAPE, dtype=torch.int64)
    with saved_tensors_hooks(save, lambda saved: saved):
        result = model(ids, **dict.fromkeys(given, ids))
    del result
    return sum(storage.nbytes() for storage in kept.values())


def estimated(model: nn.Module, recompute: str = "selective", policy: str = "recorded") -> int:
    share = share_of_rank(model, {}, None, POLICIES[policy], Batch(*SHAPE, recompute))
    assert share.training is not None
    assert share.training.activations is not None
    assert share.training.activations.measured
    return share.training.activations.nbytes


def of_transformers(name: str, dtype: torch.dtype | None = None) -> Any:
    transformers = pytest.importorskip("transformers")
    kind = {"llama": "Llama", "gpt2": "GPT2", "neox": "GPTNeoX"}[name]
    sizes = {"llama": GATED, "gpt2": GPT, "neox": TINY | {"intermediate_size": 256}}[name]
    config = getattr(transformers, f"{kind}Config")(**sizes, dtype=dtype)
    head = {"llama": "LlamaForCausalLM", "gpt2": "GPT2LMHeadModel", "neox": "GPTNeoXForCausalLM"}
    return lambda: getattr(transformers, head[name])(config)


@pytest.mark.parametrize(
    ("name", "near"), [("gpt2", 0.001), ("llama", 0.001), ("neox", 0.06)], ids=str
)
def test_language_models_keep_what_is_estimated(name: str, near: float) -> None:
    build = of_transformers(name)
    model = lateinit.deferred_init(build)
    assert estimated(model) == pytest.approx(really_saved(build(), labels=True), rel=near)
    assert lateinit.is_deferred(model)


def test_a_model_of_no_library_keeps_what_is_estimated() -> None:
    model = lateinit.deferred_init(Plain)
    real = really_saved(Plain())
    assert estimated(model) == pytest.approx(real, rel=0.005)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        whole = really_saved(Plain())
    assert whole > real
    assert estimated(model, "none") == pytest.approx(whole, rel=0.005)


def test_layers_that_are_computed_again_keep_their_inputs_and_one_layer() -> None:
    real = really_saved(Plain(again=True))  # the inputs, and what is outside of the layers
    one = (really_saved(Plain()) - really_saved(Plain(depth=1))) // 2
    known = 2 * 48 * 40 * 4  # the input of that layer, which it keeps in both
    found = estimated(lateinit.deferred_init(Plain), "full")
    assert found == pytest.approx(real + one - known, rel=0.005)


def test_bfloat16_halves_what_is_in_the_models_dtype() -> None:
    whole, half = (
        estimated(lateinit.deferred_init(Plain), policy=p) for p in ("recorded", "master")
    )
    assert half == pytest.approx(whole / 2, rel=0.03)
    real = Plain().bfloat16()
    assert half == pytest.approx(really_saved(real), rel=0.03)


def test_nothing_of_a_model_changes() -> None:
    model = lateinit.deferred_init(Plain)
    before, parameters = torch.get_rng_state(), list(model.parameters())
    for recompute in ("none", "selective", "full"):
        estimated(model, recompute)
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    assert all(p.is_meta and p.grad is None for p in parameters)
    assert torch.equal(before, torch.get_rng_state())
    assert not [m for m in model.modules() if m._forward_hooks or m._forward_pre_hooks]


def test_a_mesh_cuts_what_one_device_would_keep() -> None:
    model = lateinit.deferred_init(of_transformers("llama"))
    alone = estimated(model)
    batch = Batch(*SHAPE)

    def kept(**mesh: int) -> int:
        training = share_of_rank(model, mesh, None, POLICIES["recorded"], batch).training
        assert training is not None
        assert training.activations is not None
        return training.activations.nbytes

    assert kept(fsdp=8) == kept(replicate=4) == alone
    assert alone / 2 < kept(tp=2) < alone
    assert kept(pp=3) < 1.2 * alone


def test_one_device_gathers_nothing_and_autocast_keeps_copies() -> None:
    model = lateinit.deferred_init(Plain)
    count = sum(p.numel() for p in model.parameters())

    def training(policy: str) -> Training:
        found = share_of_rank(model, {}, None, POLICIES[policy]).training
        assert found is not None
        return found

    assert [training(p).gathered for p in ("recorded", "mixed", "bfloat16", "master")] == [
        *(0, 2 * count, 0, 0)
    ]
    assert training("recorded").total == 16 * count
    assert "copies by autocast" in str(training("mixed"))
    assert "gathered" not in str(training("recorded"))


class Choosing(nn.Module):
    """Looks at a value."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(3, 4)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.embed(ids) if ids.sum() > 0 else self.embed(ids) * 2


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (Choosing, "Choosing has no configuration|on token ids without values raises"),
        (lambda: nn.Linear(3, 3), "leave --batch and --sequence out"),
    ],
)
def test_a_model_that_takes_no_token_ids_without_values_is_told(build: Any, message: str) -> None:
    with pytest.raises(ShardingError, match=message):
        estimated(lateinit.deferred_init(build))


def test_layers_to_compute_again_must_be_there() -> None:
    with pytest.raises(ShardingError, match="Choosing has no list of layers to compute again"):
        estimated(lateinit.deferred_init(Choosing), "full")


def test_where_a_formula_is_all_there_is_it_is_said() -> None:
    class Told(Choosing):
        class config:  # noqa: N801
            hidden_size, num_attention_heads, num_hidden_layers, vocab_size = 64, 4, 2, 101

    share = share_of_rank(
        lateinit.deferred_init(Told), {}, None, POLICIES["recorded"], Batch(*SHAPE)
    )
    assert share.training is not None
    assert isinstance(share.training.activations, Activations)
    assert not share.training.activations.measured
    assert "(by formula)" in str(share)


def test_the_command_tells_it_of_one_device() -> None:
    pytest.importorskip("transformers")
    asked = ["inspect", "transformers:llama", "--kwargs", json.dumps(GATED), "--train", "mixed"]
    asked += ["--batch", "2", "--sequence", "48"]
    done = CliRunner().invoke(cli.app, asked)
    assert done.exit_code == 0, done.output
    assert "lm_head.weight" in done.stdout
    assert done.stdout.splitlines()[-1].startswith("training ")
    assert "copies by autocast" in done.stdout
    told = json.loads(CliRunner().invoke(cli.app, [*asked, "--json"]).stdout)
    assert told["training"]["activations"]["measured"] is True
    assert told["training"]["gradients"] == 4 * told["totals"]["parameters"]
