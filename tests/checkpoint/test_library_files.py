"""What is saved is found by the library that the model is of, under the names that it looks for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import lateinit
from lateinit import errors
from lateinit._integrations import saved_files
from tests.sharding.alone import alone_as


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def assert_same(found: nn.Module, expected: nn.Module) -> None:
    theirs = expected.state_dict()
    assert found.state_dict().keys() == theirs.keys()
    assert all(torch.equal(t, theirs[name]) for name, t in found.state_dict().items())


# -- libraries -------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", ["5GB", "10kB"])
def test_transformers_finds_what_is_saved(size: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 2, "vocab_size": 51}
    config = transformers.LlamaConfig(**sizes)
    torch.manual_seed(0)
    eager = transformers.LlamaForCausalLM(config)
    torch.manual_seed(0)
    lateinit.save_checkpoint(
        lateinit.deferred_init(transformers.LlamaForCausalLM, config),
        tmp_path / "m",
        max_shard_size=size,
    )
    eager.save_pretrained(tmp_path / "theirs", max_shard_size=size)
    ours, theirs = names_in(tmp_path / "m"), names_in(tmp_path / "theirs")
    assert {n for n in ours if "-of-" not in n} == {
        n for n in theirs if "-of-" not in n and n != "generation_config.json"
    }
    assert_same(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m"), eager)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("size", ["10GB", "10kB"])
def test_diffusers_finds_what_is_saved(size: str, tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    sizes: dict[str, Any] = {"block_out_channels": (8, 8), "norm_num_groups": 4, "in_channels": 3}
    sizes |= {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    sizes |= {"layers_per_block": 1, "sample_size": 8, "out_channels": 3}
    torch.manual_seed(0)
    eager = diffusers.UNet2DModel(**sizes)
    torch.manual_seed(0)
    late = lateinit.deferred_init(diffusers.UNet2DModel, **sizes)
    lateinit.save_checkpoint(late, tmp_path / "m", max_shard_size=size)
    eager.save_pretrained(tmp_path / "theirs", max_shard_size=size)
    ours, theirs = names_in(tmp_path / "m"), names_in(tmp_path / "theirs")
    assert {n.split("-")[0] for n in ours} == {n.split("-")[0] for n in theirs}
    assert "config.json" in ours
    assert_same(diffusers.UNet2DModel.from_pretrained(tmp_path / "m"), eager)
    again = lateinit.deferred_init(diffusers.UNet2DModel, **sizes)
    lateinit.load_checkpoint(again, tmp_path / "m")
    assert_same(again, eager)


def test_the_files_of_a_library_are_named_after_its_stem(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As diffusers does it, which is not installed everywhere."""
    monkeypatch.setattr(saved_files, "_is_of_diffusers", lambda model: isinstance(model, Net))
    lateinit.save_checkpoint(Net(), tmp_path / "one")
    assert names_in(tmp_path / "one") == ["config.json", "diffusion_pytorch_model.safetensors"]
    lateinit.save_checkpoint(Net(), tmp_path / "more", max_shard_size="30B")
    index = tmp_path / "more" / "diffusion_pytorch_model.safetensors.index.json"
    places = json.loads(index.read_text())["weight_map"]
    assert places["up.bias"] == "diffusion_pytorch_model-00002-of-00002.safetensors"
    assert set(places.values()) < set(names_in(tmp_path / "more"))
    assert json.loads((tmp_path / "more" / "config.json").read_text()) == {"_class_name": "Net"}


def test_shards_of_ranks_are_named_after_the_stem_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(saved_files, "_is_of_diffusers", lambda model: isinstance(model, Net))
    torch.manual_seed(0)
    eager = Net()
    torch.manual_seed(0)
    model = lateinit.deferred_init(Net)
    with alone_as(0, 1):
        fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
        lateinit.save_checkpoint(model, tmp_path / "out", format="safetensors")
    assert {n.partition("-")[0].partition(".")[0] for n in names_in(tmp_path / "out")} == {
        "config",
        "diffusion_pytorch_model",
    }
    found = lateinit.deferred_init(Net)
    lateinit.load_checkpoint(found, tmp_path / "out")
    assert_same(found, eager)


class Net(nn.Module):
    """Stands for a model of diffusers."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(2, 3)

    def to_json_string(self) -> str:
        return '{"_class_name": "Net"}'


def test_peft_finds_an_adapter_that_is_saved_as_a_dict(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")

    def build() -> Any:
        base = nn.Sequential(nn.Linear(5, 6), nn.Linear(6, 7))
        return peft.get_peft_model(base, peft.LoraConfig(target_modules=["0", "1"], r=2))

    torch.manual_seed(0)
    eager = build()
    torch.manual_seed(0)
    late = lateinit.deferred_init(build)
    late.peft_config["default"].save_pretrained(tmp_path)
    weights = peft.get_peft_model_state_dict(late)
    lateinit.save_checkpoint(weights, tmp_path / "adapter_model.safetensors")
    base = nn.Sequential(nn.Linear(5, 6), nn.Linear(6, 7))
    found = peft.get_peft_model_state_dict(peft.PeftModel.from_pretrained(base, tmp_path))
    theirs = peft.get_peft_model_state_dict(eager)
    assert found.keys() == theirs.keys()
    assert all(torch.equal(t, theirs[name]) for name, t in found.items())


# -- dictionaries ----------------------------------------------------------------------------------


def test_a_dict_of_tensors_is_written_as_a_model_is(tmp_path: Path) -> None:
    torch.manual_seed(0)
    eager = nn.Linear(5, 3)
    torch.manual_seed(0)
    with lateinit.deferred():
        late = nn.Linear(5, 3)
        loose = torch.randn(4)
    whole = torch.arange(6.0)
    given = {"w": late.weight, "tied": late.weight, "b": late.bias, "loose": loose}
    given |= {"low": whole[:3], "high": whole[3:], "t": whole.view(2, 3).t(), "same": whole[:3]}
    saved = lateinit.save_checkpoint(given, tmp_path / "a.safetensors", dtype=torch.float64)
    assert saved.tensors == 6
    found = load_file(tmp_path / "a.safetensors")
    assert found.keys() == {"w", "b", "loose", "low", "high", "t"}
    assert torch.equal(found["w"], eager.weight.double())
    assert torch.equal(found["t"], whole.view(2, 3).t().double())
    assert lateinit.is_deferred(late.weight)
    assert lateinit.is_deferred(loose)
    lateinit.load_checkpoint(
        late,
        tmp_path / "a.safetensors",
        rename={"w": "weight", "b": "bias", "tied": None}
        | dict.fromkeys(["loose", "low", "high", "t", "same"]),
    )
    assert torch.equal(late.weight, eager.weight)


def test_a_dict_goes_into_a_folder_and_resumes_and_takes_a_seed(tmp_path: Path) -> None:
    with lateinit.deferred():
        layer = nn.Linear(5, 3)
    given = dict(layer.named_parameters())
    lateinit.save_checkpoint(given, tmp_path / "out", max_shard_size="20B", seed=7)
    assert "model.safetensors.index.json" in names_in(tmp_path / "out")
    torch.manual_seed(7)
    expected = nn.Linear(5, 3)
    found = lateinit.deferred_init(nn.Linear, 5, 3)
    lateinit.load_checkpoint(found, tmp_path / "out")
    assert_same(found, expected)
    with pytest.raises(errors.OutputExistsError, match="overwrite it with force=True"):
        lateinit.save_checkpoint(given, tmp_path / "out")


def test_an_empty_dict_is_an_empty_checkpoint(tmp_path: Path) -> None:
    assert lateinit.save_checkpoint({}, tmp_path / "a.safetensors").tensors == 0
    assert load_file(tmp_path / "a.safetensors") == {}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"a": {"b": torch.ones(1)}}, "a has the type dict"),
        ({"a": 1}, "a has the type int"),
        ({"a": None}, "a has the type NoneType"),
        ({3: torch.ones(1)}, "3 is no name of a tensor"),
        ({"__metadata__": torch.ones(1)}, "'__metadata__' is no name of a tensor"),
        ({"a": torch.ones(1, dtype=torch.complex128)}, "a is torch.complex128"),
        ({"a": torch.eye(2).to_sparse()}, "a has the layout torch.sparse_coo"),
        ({"a": lateinit.nn.UninitializedParameter()}, "a is lazy"),
    ],
    ids=str,
)
def test_what_a_checkpoint_cannot_hold_is_refused(
    given: dict[Any, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(errors.CheckpointError, match=message):
        lateinit.save_checkpoint(given, tmp_path / "a.safetensors")
    assert not names_in(tmp_path)


def test_a_tensor_on_meta_is_refused(tmp_path: Path) -> None:
    given = {"a": torch.ones(1, device="meta")}
    with pytest.raises(errors.NotRecordedError, match="recorded construction: a"):
        lateinit.save_checkpoint(given, tmp_path / "a.safetensors")


@pytest.mark.parametrize("given", [[torch.ones(1)], torch.ones(1), "model", None, nn.Linear])
def test_only_modules_and_dicts_are_saved(given: Any, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="takes a module or a dict of tensors, not"):
        lateinit.save_checkpoint(given, tmp_path / "a.safetensors")


@pytest.mark.parametrize("name", ["format", "lateinit", "seed", "torch"])
def test_a_tie_may_have_the_name_of_a_metadata_key(name: str, tmp_path: Path) -> None:
    shared = torch.ones(3)
    given = {"other": shared, name: shared, "pt": torch.zeros(2)}
    lateinit.save_checkpoint(given, tmp_path / "a.safetensors", seed=None)
    model = nn.Module()
    for key, value in given.items():
        model.register_buffer(key, torch.full_like(value, 5.0))
    loaded = lateinit.load_checkpoint(model, tmp_path / "a.safetensors")
    assert len(loaded.loaded) == 3
    assert all(torch.equal(getattr(model, key), given[key]) for key in given)


# -- suffixes --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        *("a.SAFETENSORS", "a.bin", "a.ckpt", "a.gguf", "a.h5", "a.index.json", "a.npz", "a.pkl"),
        *("a.pt", "a.pth.tar", "a.safetensor", "a.safetensors.index.json", "a.t7", "b-3.1.pth"),
    ],
)
@pytest.mark.parametrize("asked", [None, "dcp"])
def test_a_suffix_of_another_format_is_refused(name: str, asked: Any, tmp_path: Path) -> None:
    stem, _, suffix = name.rpartition(".")
    told = rf"would be no \.{suffix} file.*name {stem}\.safetensors, or a folder"
    with pytest.raises(errors.CheckpointError, match=told):
        lateinit.save_checkpoint(nn.Linear(2, 2), tmp_path / name, format=asked)
    (tmp_path / name).write_text("")
    with pytest.raises(errors.CheckpointError, match=told):
        lateinit.save_checkpoint(nn.Linear(2, 2), tmp_path / name, force=True)


@pytest.mark.parametrize("name", ["llama-3.1", "llama-3.1-8B", "step_1000.0", ".hidden", "v0.2"])
def test_a_number_after_a_dot_is_no_suffix(name: str, tmp_path: Path) -> None:
    lateinit.save_checkpoint(nn.Linear(2, 2), tmp_path / name)
    assert names_in(tmp_path / name) == ["model.safetensors"]


def test_a_folder_may_have_a_suffix_if_it_is_there_or_ends_in_a_slash(tmp_path: Path) -> None:
    lateinit.save_checkpoint(nn.Linear(2, 2), f"{tmp_path}/run.final/")
    lateinit.save_checkpoint(nn.Linear(2, 2), tmp_path / "run.final", force=True)
    (tmp_path / "made.here").mkdir()
    lateinit.save_checkpoint(nn.Linear(2, 2), tmp_path / "made.here")
    assert names_in(tmp_path / "made.here") == ["model.safetensors"]
