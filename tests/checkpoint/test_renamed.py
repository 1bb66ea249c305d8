"""Checkpoints under the names that transformers saves, which its models have not."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import lateinit
from lateinit.errors import MismatchError
from tests.support.call_sequences import cast_saved
from tests.support.formats import FORMATS
from tests.support.snapshots import assert_same
from tests.support.twins import assert_untouched, run_alone

transformers = pytest.importorskip("transformers")

from lateinit._checkpoint.formats.open import open_checkpoint  # noqa: E402
from lateinit._checkpoint.load.renamed import Translated, translated  # noqa: E402
from lateinit._integrations import transformers_names  # noqa: E402 - of use with transformers alone
from lateinit._report.verify import verify  # noqa: E402

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif(
        find_spec("transformers.conversion_mapping") is None, reason="names are as they are"
    ),
]

SIZES = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
MIXTRAL = SIZES | {"num_local_experts": 3}
GATE_UP = "model.layers.1.mlp.experts.gate_up_proj"
EXPERT = "model.layers.1.block_sparse_moe.experts"
State = dict[str, torch.Tensor]


def mixtral(**sizes: Any) -> nn.Module:
    config = transformers.MixtralConfig(**MIXTRAL | sizes)
    return transformers.MixtralForCausalLM(config)


def bert(cls: str = "BertForMaskedLM") -> nn.Module:
    return getattr(transformers, cls)(transformers.BertConfig(**SIZES))


def twins(build: Any) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    eager = build()
    torch.manual_seed(0)
    return eager, lateinit.deferred_init(build)


def saved(model: nn.Module, folder: Path) -> State:
    """What save_pretrained writes of a model, under the names that it gives."""
    model.save_pretrained(folder)
    return load_file(folder / "model.safetensors")


def assert_same_tensors(expected: nn.Module, model: nn.Module) -> None:
    """For models with other attributes, such as from_pretrained leaves on them."""
    for every in (nn.Module.named_parameters, nn.Module.named_buffers):
        ours, theirs = dict(every(model)), dict(every(expected))
        assert ours.keys() == theirs.keys()
        for name, tensor in theirs.items():
            assert ours[name].dtype == tensor.dtype, name
            assert torch.equal(ours[name], tensor), name


@pytest.fixture
def theirs(tmp_path: Path) -> State:
    torch.manual_seed(9)
    state = saved(mixtral(), tmp_path / "saved")
    assert f"{EXPERT}.0.w1.weight" in state
    return state


def write(state: State, folder: Path) -> Path:
    path = folder / "weights.safetensors"
    save_file(state, path)
    return path


# -- what is loaded --------------------------------------------------------------------------------


@pytest.mark.parametrize("format_", FORMATS)
def test_joined_experts_are_loaded_from_every_format(
    format_: str, theirs: State, tmp_path: Path
) -> None:
    expected = transformers.MixtralForCausalLM.from_pretrained(tmp_path / "saved")
    _, model = twins(mixtral)
    held = dict(model.named_parameters())
    before = torch.get_rng_state()
    report = lateinit.load_checkpoint(model, FORMATS[format_](theirs, tmp_path))
    assert torch.equal(before, torch.get_rng_state())
    assert GATE_UP in [entry.name for entry in report.loaded]
    assert not report.initialised
    assert not report.unexpected
    assert all(parameter is held[name] for name, parameter in model.named_parameters())
    assert_same_tensors(expected, model)


def test_a_real_model_and_another_dtype_are_loaded_too(theirs: State, tmp_path: Path) -> None:
    expected, model = twins(mixtral)
    path = write(theirs, tmp_path)
    lateinit.load_checkpoint(expected, path)
    lateinit.load_checkpoint(model, path, dtype=torch.bfloat16)
    cast_saved(expected, torch.bfloat16)
    assert_same_tensors(expected, model)


def test_more_experts_than_ten_are_stacked_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    def build() -> nn.Module:
        return mixtral(num_local_experts=12)

    torch.manual_seed(5)
    expected = build()
    expected.save_pretrained(tmp_path, max_shard_size="4kB")
    _, model = twins(build)
    lateinit.load_checkpoint(model, tmp_path)
    assert_same_tensors(expected, model)


def test_names_of_before_are_loaded(tmp_path: Path) -> None:
    expected, model = twins(bert)
    state = saved(expected, tmp_path)
    old = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
            "LayerNorm.bias", "LayerNorm.beta"
        ): tensor + 1
        for name, tensor in state.items()
    }
    assert not old.keys() <= state.keys()
    report = lateinit.load_checkpoint(model, write(old, tmp_path))
    assert not report.initialised
    expected.load_state_dict({name: tensor + 1 for name, tensor in state.items()}, strict=False)
    assert_same(expected, model)


def test_a_bare_model_is_loaded_into_one_with_a_head(tmp_path: Path) -> None:
    torch.manual_seed(4)
    bare = bert("BertModel")
    bare.save_pretrained(tmp_path)
    expected, model = twins(lambda: bert("BertForSequenceClassification"))
    with pytest.raises(MismatchError, match=r"classifier\.weight, \(2, 16\), is not in the check"):
        lateinit.load_checkpoint(model, tmp_path)
    report = lateinit.load_checkpoint(model, tmp_path, strict=False)
    assert [entry.name for entry in report.initialised] == ["classifier.weight", "classifier.bias"]
    expected.bert.load_state_dict(bare.state_dict())
    assert_same(expected, model)


def test_a_model_with_a_head_is_loaded_into_a_bare_one(tmp_path: Path) -> None:
    torch.manual_seed(4)
    whole = bert("BertForSequenceClassification")
    whole.save_pretrained(tmp_path)
    expected, model = twins(lambda: bert("BertModel"))
    with pytest.raises(MismatchError, match=r"classifier\.weight is not in the model"):
        lateinit.load_checkpoint(model, tmp_path)
    report = lateinit.load_checkpoint(model, tmp_path, strict=False)
    assert [entry.name for entry in report.unexpected] == ["classifier.bias", "classifier.weight"]
    expected.load_state_dict(whole.bert.state_dict())
    assert_same(expected, model)


def test_what_a_class_says_may_be_there_is_no_error(tmp_path: Path) -> None:
    expected, model = twins(lambda: bert("BertModel"))
    state = saved(expected, tmp_path / "saved")
    state["embeddings.position_ids"] = torch.arange(512)[None]
    report = lateinit.load_checkpoint(model, write(state, tmp_path))
    assert [entry.name for entry in report.unexpected] == ["embeddings.position_ids"]
    assert_same(expected, model)
    _, model = twins(lambda: bert("BertModel"))
    state["embeddings.position"] = torch.ones(2)
    with pytest.raises(MismatchError, match=r"1 problem:\n  embeddings\.position is not in the"):
        lateinit.load_checkpoint(model, write(state, tmp_path))


def test_a_checkpoint_under_the_names_of_the_model_is_read_as_it_is(tmp_path: Path) -> None:
    torch.manual_seed(7)
    expected = mixtral()
    torch.save(expected.state_dict(), tmp_path / "a.pt")
    _, model = twins(mixtral)
    reader = open_checkpoint(tmp_path / "a.pt")
    assert translated(model, reader) is reader
    lateinit.load_checkpoint(model, tmp_path / "a.pt")
    assert_same(expected, model)


def test_a_seed_is_found_in_a_checkpoint_with_their_names(tmp_path: Path) -> None:
    eager, model = twins(mixtral)
    eager.save_pretrained(tmp_path)
    assert verify(model, tmp_path, seed=0).equal
    state = load_file(tmp_path / "model.safetensors")
    state[f"{EXPERT}.2.w3.weight"] += 1
    found = verify(model, write(state, tmp_path), seed=0).differences
    assert [name for name, _ in found] == [GATE_UP]


# -- what is refused, with nothing changed ---------------------------------------------------------


def refused(state: State, folder: Path, message: str) -> None:
    eager, model = twins(mixtral)
    with pytest.raises(MismatchError, match=message):
        lateinit.load_checkpoint(model, write(state, folder))
    assert_untouched(eager, model)


def test_an_expert_that_is_missing_is_told(theirs: State, tmp_path: Path) -> None:
    del theirs[f"{EXPERT}.1.w2.weight"]
    refused(
        theirs,
        tmp_path,
        r"1 problem:\n  model\.layers\.1\.mlp\.experts\.down_proj: the checkpoint has the shape "
        r"\(2, 16, 24\) \(from model\.layers\.1\.block_sparse_moe\.experts\.0\.w2\.weight, "
        r"model\.\S+\.2\.w2\.weight\), the model \(3, 16, 24\)",
    )


def test_experts_that_cannot_be_stacked_are_told(theirs: State, tmp_path: Path) -> None:
    theirs[f"{EXPERT}.1.w1.weight"] = torch.ones(24, 15)
    theirs[f"{EXPERT}.1.w2.weight"] = torch.ones(15, 24)
    refused(
        theirs,
        tmp_path,
        r"(?s)left as it was:\n  model\.layers\.1\.mlp\.experts\.gate_up_proj: transformers \S+ "
        r"cannot make it of .*experts\.0\.w1\.weight \(24, 16\), .* and 3 more: RuntimeError.*"
        r"experts\.down_proj",
    )


def test_all_experts_missing_is_told(theirs: State, tmp_path: Path) -> None:
    state = {name: t for name, t in theirs.items() if ".w1." not in name or EXPERT not in name}
    refused(state, tmp_path, r"1\.mlp\.experts\.gate_up_proj: transformers \S+ cannot make it of")
    state = {name: t for name, t in theirs.items() if EXPERT not in name}
    refused(state, tmp_path, r"experts\.gate_up_proj, \(3, 48, 16\), is not in the checkpoint")


def test_two_names_for_one_tensor_are_told_where_they_differ(theirs: State, tmp_path: Path) -> None:
    theirs["norm.weight"] = theirs["model.norm.weight"].clone()
    _, model = twins(mixtral)
    lateinit.load_checkpoint(model, write(theirs, tmp_path))
    theirs["norm.weight"] += 1
    refused(
        theirs, tmp_path, r"model\.norm\.weight: .*two tensors for it, model\.norm.* and norm\.wei"
    )


def test_both_forms_of_one_tensor_are_told(theirs: State, tmp_path: Path) -> None:
    theirs[GATE_UP] = torch.ones(3, 48, 16)
    refused(theirs, tmp_path, r"gate_up_proj: the checkpoint has several tensors for it, model\.l")


def test_an_integer_for_a_float_is_told(theirs: State, tmp_path: Path) -> None:
    for expert in range(3):
        name = f"{EXPERT}.{expert}.w2.weight"
        theirs[name] = theirs[name].to(torch.complex64)
    refused(theirs, tmp_path, r"experts\.down_proj: the checkpoint has the dtype torch\.complex64")


@pytest.mark.parametrize("gone", ["get_model_conversion_mapping", "module", "operations"])
def test_a_version_that_is_not_known_is_told(
    gone: str, theirs: State, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    eager, model = twins(mixtral)
    if gone == "module":
        monkeypatch.delitem(sys.modules, "transformers.conversion_mapping")
    elif gone == "operations":
        monkeypatch.delattr("transformers.core_model_loading.rename_source_key")
    else:
        monkeypatch.delattr(sys.modules["transformers.conversion_mapping"], gone)
    with pytest.raises(MismatchError, match=r"lateinit cannot follow.*MixtralForCausalLM\.from_pr"):
        lateinit.load_checkpoint(model, write(theirs, tmp_path))
    lateinit.save_checkpoint(eager, tmp_path / "ours")
    lateinit.load_checkpoint(model, tmp_path / "ours")
    assert_same(eager, model)


# -- how it is read --------------------------------------------------------------------------------


def test_renamed_tensors_are_windows_on_the_file(theirs: State, tmp_path: Path) -> None:
    _, model = twins(mixtral)
    reader = translated(model, open_checkpoint(write(theirs, tmp_path)))
    assert isinstance(reader, Translated)
    gate = "model.layers.0.mlp.gate.weight"
    assert reader.origins[gate] == ["model.layers.0.block_sparse_moe.gate.weight"]
    first, second = reader.read(gate), reader.read(gate)
    assert first.data_ptr() == second.data_ptr()
    whole = reader.read(GATE_UP)
    part = reader.read(GATE_UP, (1, 2, 3), (2, 40, 5))
    assert torch.equal(part, whole[1:3, 2:42, 3:8])


class Halves:
    """A converter that splits, as theirs do; it counts how often."""

    def __init__(self) -> None:
        self.runs = [0]
        self.tensors: list[torch.Tensor] = []

    def __deepcopy__(self, memo: Any) -> Halves:
        other = Halves()
        other.runs = self.runs
        return other

    def add_tensor(self, first: str, name: str, pattern: str, tensor: torch.Tensor) -> None:
        self.tensors.append(tensor)

    def convert(self, first: str, **_: Any) -> dict[str, Any]:
        self.runs[0] += 1
        left, right = self.tensors[0].clone().chunk(2)
        return {first: [left.clone()], "b": right.clone()}


def test_what_is_split_is_computed_once_and_given_away(tmp_path: Path) -> None:
    halves, model = Halves(), bert("BertModel")
    path = write({"ab": torch.arange(4.0), "c": torch.ones(1)}, tmp_path)
    names = transformers_names.Translation(
        conversions=[transformers_names.Conversion("a", halves, model, [("ab", "ab")])]
    )
    names.strangers = ["c"]
    reader = Translated(model, open_checkpoint(path), names)
    assert {name: entry.shape for name, entry in reader.entries.items()} == {
        "a": (2,),
        "b": (2,),
        "c": (1,),
    }
    halves.runs[0] = 0
    reader.read("a").fill_(9)
    reader.read("b").fill_(9)
    assert halves.runs == [1]
    assert torch.equal(reader.read("a"), torch.arange(2.0))
    assert torch.equal(reader.read("b"), torch.arange(2.0) + 2)
    assert halves.runs == [2]


LARGE = """
import sys, torch, lateinit, transformers
from lateinit._integrations import transformers_names

def own_memory():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if "RssAnon" in line) / 1024

def build():
    return transformers.MixtralModel(transformers.MixtralConfig(
        vocab_size=16, hidden_size=512, intermediate_size=512, num_hidden_layers=8,
        num_attention_heads=2, num_key_value_heads=1, num_local_experts=4))

lateinit.materialize(lateinit.deferred_init(build)).save_pretrained(sys.argv[1])
model = lateinit.deferred_init(build)
seen, run = [], transformers_names.Conversion.run

def watched(self, read):
    seen.append(own_memory())
    return run(self, read)

transformers_names.Conversion.run = watched
before = own_memory()
lateinit.load_checkpoint(model, sys.argv[1])
print(f"{max(seen) - before:.0f}", f"{own_memory() - before:.0f}", len(seen))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")
def test_joining_keeps_one_tensor_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "65536")  # what is freed is given back
    highest, after, runs = map(int, run_alone(LARGE, str(tmp_path)).split())
    assert runs == 2 * 16  # once on meta, once for real
    assert highest < 96 + 12  # MiB; the experts have 8 times 8 and 4, one tensor 8
    assert after < 96 + 12
