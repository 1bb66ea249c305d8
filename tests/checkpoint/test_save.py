"""Law 6 and law 9 for checkpoints that are written: the right bits, little memory, whole or not."""

from __future__ import annotations

import doctest
import errno
import json
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, load_model
from torch import nn

import lateinit
from lateinit import errors
from lateinit._checkpoint.formats.base import StoredTensor
from lateinit._checkpoint.formats.safetensors import DTYPES
from lateinit._checkpoint.save import atomic_output, pipeline
from lateinit._checkpoint.save.manifest import collect
from lateinit._checkpoint.save.safetensors_writer import SafetensorsWriter, header
from lateinit._tensors.walk import find_tensors
from tests.support import building, processes
from tests.support.cases import Bag
from tests.support.models import MODELS
from tests.support.snapshots import bits

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.support.cases import Case

needs_linux = pytest.mark.skipif(sys.platform != "linux", reason="limits and /proc are Linux's")
UNSAVABLE = {"complex_draws"}  # safetensors has no complex128


def tower(depth: int = 4, width: int = 8) -> nn.Module:
    return nn.Sequential(*[nn.Linear(width, width) for _ in range(depth)])


def late(make: Callable[..., nn.Module], *args: Any, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return lateinit.deferred_init(make, *args)


def eager(make: Callable[..., nn.Module], *args: Any, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return make(*args)


def assert_holds(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert found[name].shape == tensor.shape, name
        assert bits(name, found[name]) == bits(name, tensor), name


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def metadata(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        found: dict[str, str] = file.metadata()
    return found


# -- what is written -----------------------------------------------------------------------------


@pytest.mark.parametrize("case", [c for c in MODELS if c.name not in UNSAVABLE], ids=str)
def test_a_deferred_model_is_written_as_its_eager_twin_is(case: Case, tmp_path: Path) -> None:
    expected = building.eager(case).state_dict()
    model = building.deferred(case)
    before = torch.get_rng_state()
    deferred = [f.name for f in find_tensors(model) if f.deferred]
    path = tmp_path / "model.safetensors"
    lateinit.save_checkpoint(model, path)
    assert torch.equal(torch.get_rng_state(), before)
    assert [f.name for f in find_tensors(model) if f.deferred] == deferred
    tied = {k: v for k, v in metadata(path).items() if k in expected}
    found = load_file(path)
    assert not tied.keys() & found.keys()
    assert_holds(found | {name: found[kept] for name, kept in tied.items()}, expected)


def test_a_real_model_is_written_as_it_is(tmp_path: Path) -> None:
    model = tower()
    lateinit.save_checkpoint(model, tmp_path / "a.safetensors")
    assert_holds(load_file(tmp_path / "a.safetensors"), model.state_dict())


def test_a_model_that_is_materialised_in_part_is_written_whole(tmp_path: Path) -> None:
    model = late(tower)
    lateinit.materialize(model, only="1.*")
    with torch.no_grad():
        model[1].bias.fill_(7)
    expected = eager(tower).state_dict()
    expected["1.bias"] = torch.full((8,), 7.0)
    lateinit.save_checkpoint(model, tmp_path / "a.safetensors")
    assert_holds(load_file(tmp_path / "a.safetensors"), expected)


def test_what_shares_memory_with_a_real_tensor_is_written_from_there(tmp_path: Path) -> None:
    def halves() -> nn.Module:
        whole = torch.randn(8)
        return Bag(low=whole[:4], high=whole[4:], all=whole)

    model = late(halves)
    lateinit.materialize(model, only="all")
    model.all[5] = 3.0
    lateinit.save_checkpoint(model, tmp_path / "a.safetensors")
    assert load_file(tmp_path / "a.safetensors")["high"][1] == 3.0


def test_a_half_cast_storage_is_refused(tmp_path: Path) -> None:
    def halves() -> nn.Module:
        whole = torch.randn(8)
        return Bag(low=whole[:4], high=whole[4:])

    model = late(halves)
    lateinit.materialize(model, only="low", dtype=torch.bfloat16)
    with pytest.raises(errors.CheckpointError, match=r"high shares its memory .* cast"):
        lateinit.save_checkpoint(model, tmp_path / "a.safetensors")


def test_only_what_the_state_dict_names_is_written(tmp_path: Path) -> None:
    with lateinit.deferred():
        model = nn.BatchNorm1d(3)
        model.register_buffer("scratch", torch.zeros(2), persistent=False)
        model.plain = torch.ones(2)
    lateinit.save_checkpoint(model, tmp_path / "a.safetensors")
    assert load_file(tmp_path / "a.safetensors").keys() == nn.BatchNorm1d(3).state_dict().keys()


def test_tied_tensors_are_written_once_and_load_model_reads_them(tmp_path: Path) -> None:
    def tied() -> nn.Module:
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        model[1].weight = model[0].weight
        return model

    path = tmp_path / "a.safetensors"
    assert lateinit.save_checkpoint(late(tied), path).tensors == 3
    assert load_file(path).keys() == {"0.weight", "0.bias", "1.bias"}
    assert metadata(path)["1.weight"] == "0.weight"
    other = tied()
    assert load_model(other, path) == (set(), [])
    assert_holds(other.state_dict(), eager(tied).state_dict())


def test_tensors_that_overlap_in_part_are_written_each(tmp_path: Path) -> None:
    def overlapping() -> nn.Module:
        whole = torch.randn(3, 4)
        return Bag(whole=whole, rows=whole[1:], columns=whole[:, 1:], turned=whole.t())

    lateinit.save_checkpoint(late(overlapping), tmp_path / "a.safetensors")
    assert_holds(load_file(tmp_path / "a.safetensors"), eager(overlapping).state_dict())


def test_dtype_casts_floating_point_and_nothing_else(tmp_path: Path) -> None:
    def mixed() -> nn.Module:
        return Bag(
            weight=nn.Parameter(torch.randn(4, 5)),
            fine=torch.randn(3, dtype=torch.float64),
            count=torch.arange(3),
            mask=torch.tensor([True, False]),
            wave=torch.randn(2, dtype=torch.complex64),
        )

    lateinit.save_checkpoint(late(mixed), tmp_path / "a.safetensors", dtype=torch.bfloat16)
    expected = eager(mixed).state_dict()
    for name in ("weight", "fine"):
        expected[name] = expected[name].bfloat16()
    assert_holds(load_file(tmp_path / "a.safetensors"), expected)


def test_large_tensors_are_cast_piece_by_piece(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lateinit._checkpoint.save.safetensors_writer._PIECE", 64)
    lateinit.save_checkpoint(late(tower), tmp_path / "a.safetensors", dtype=torch.float16)
    expected = {name: t.half() for name, t in eager(tower).state_dict().items()}
    assert_holds(load_file(tmp_path / "a.safetensors"), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_of_the_format_is_read_back(dtype: torch.dtype, tmp_path: Path) -> None:
    values = torch.tensor([0, 1, 1, 0, 1]).to(dtype)
    empty, scalar = torch.empty(0, 2, dtype=dtype), values[1].clone()
    model = Bag(values=values, empty=empty, scalar=scalar)
    lateinit.save_checkpoint(model, tmp_path / "a.safetensors")
    found = load_file(tmp_path / "a.safetensors")
    assert_holds(found, {"values": values, "empty": empty, "scalar": scalar})


def test_every_tensor_starts_at_a_multiple_of_its_element_size(tmp_path: Path) -> None:
    model = Bag(
        odd=torch.zeros(3, dtype=torch.bool),
        narrow=torch.zeros(3, dtype=torch.float16),
        wide=torch.zeros(3, dtype=torch.float64),
    )
    lateinit.save_checkpoint(model, tmp_path / "a.safetensors")
    data = (tmp_path / "a.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    described = json.loads(data[8 : 8 + length])
    assert (8 + length) % 8 == 0
    for name, size in (("odd", 1), ("narrow", 2), ("wide", 8)):
        assert described[name]["data_offsets"][0] % size == 0


def test_a_header_holds_names_of_any_script() -> None:
    made = header([StoredTensor('größe"\n', torch.float32, (2,))], {})
    assert list(json.loads(made[8:])) == ['größe"\n']


# -- seeds ---------------------------------------------------------------------------------------


def test_the_recorded_seed_is_written_down(tmp_path: Path) -> None:
    saved = lateinit.save_checkpoint(late(tower, seed=11), tmp_path / "a.safetensors")
    assert saved.seed == 11
    assert metadata(tmp_path / "a.safetensors") == {
        "format": "pt",
        "lateinit": lateinit.__version__,
        "torch": torch.__version__,
        "seed": "11",
    }


def test_a_state_that_no_seed_led_to_is_not_called_one(tmp_path: Path) -> None:
    torch.manual_seed(3)
    torch.rand(1)
    model = lateinit.deferred_init(tower)
    assert lateinit.save_checkpoint(model, tmp_path / "a.safetensors").seed is None
    assert "seed" not in metadata(tmp_path / "a.safetensors")


def test_another_seed_writes_what_it_would_have_built(tmp_path: Path) -> None:
    model = late(tower, seed=0)
    assert lateinit.save_checkpoint(model, tmp_path / "a.safetensors", seed=5).seed == 5
    assert_holds(load_file(tmp_path / "a.safetensors"), eager(tower, seed=5).state_dict())


def test_a_seed_that_builds_another_model_is_refused(tmp_path: Path) -> None:
    def branching() -> nn.Module:
        wide = torch.rand(1).item() > 0.5
        return nn.Linear(8 if wide else 4, 2)

    model = late(branching)
    lateinit.save_checkpoint(model, tmp_path / "same.safetensors", seed=0)
    with pytest.raises(errors.SeedError, match="read a random value"):
        lateinit.save_checkpoint(model, tmp_path / "a.safetensors", seed=1)
    assert names_in(tmp_path) == ["same.safetensors"]


# -- folders and transformers --------------------------------------------------------------------


def test_shards_and_their_index(tmp_path: Path) -> None:
    saved = lateinit.save_checkpoint(late(tower), tmp_path / "out", max_shard_size=300)
    names = [f"model-{i:05}-of-00004.safetensors" for i in (1, 2, 3, 4)]
    assert saved.files == (*names, "model.safetensors.index.json")
    assert names_in(tmp_path / "out") == list(saved.files)
    index = json.loads((tmp_path / "out" / saved.files[-1]).read_text())
    assert index["metadata"]["total_size"] == saved.nbytes == 4 * (64 + 8) * 4
    expected = eager(tower).state_dict()
    assert index["weight_map"].keys() == expected.keys()
    found: dict[str, torch.Tensor] = {}
    for name in names:
        part = load_file(tmp_path / "out" / name)
        assert all(index["weight_map"][key] == name for key in part)
        assert sum(t.nbytes for t in part.values()) <= 300
        found |= part
    assert_holds(found, expected)


def test_a_tensor_larger_than_a_shard_has_its_own(tmp_path: Path) -> None:
    saved = lateinit.save_checkpoint(late(tower, 2), tmp_path / "out", max_shard_size=100)
    assert [len(load_file(tmp_path / "out" / name)) for name in saved.files[:-1]] == [1, 1, 1, 1]


def test_one_shard_has_no_index(tmp_path: Path) -> None:
    saved = lateinit.save_checkpoint(late(tower), tmp_path / "out")
    assert saved.files == ("model.safetensors",)
    assert "288 B" not in str(saved)
    assert "8 tensors, 1.2 kB, in 1 file" in str(saved)


def test_a_module_without_tensors_can_be_written(tmp_path: Path) -> None:
    assert lateinit.save_checkpoint(nn.Identity(), tmp_path / "out").nbytes == 0
    assert load_file(tmp_path / "out" / "model.safetensors") == {}


TINY = {"vocab_size": 48, "num_hidden_layers": 2, "hidden_size": 16, "intermediate_size": 24}
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1}
HUB = {
    "gpt2": {"n_layer": 2, "n_embd": 16, "n_head": 2, "vocab_size": 48, "n_positions": 16},
    "llama": TINY | HEADS,
    "llama-tied": TINY | HEADS | {"tie_word_embeddings": True},
    "mixtral": TINY | HEADS | {"num_local_experts": 2},
    "bert": TINY | {"num_attention_heads": 2},
    "t5": {"vocab_size": 48, "d_model": 16, "d_ff": 24, "d_kv": 8, "num_layers": 2, "num_heads": 2},
}


@pytest.mark.parametrize("name", HUB)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_transformers_reads_what_was_written(name: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.AutoConfig.for_model(name.partition("-")[0], **HUB[name])
    mapping = transformers.AutoModelForCausalLM._model_mapping
    cls = transformers.T5Model if name == "t5" else mapping[type(config)]
    model = late(cls, config)
    lateinit.save_checkpoint(model, tmp_path / "out", max_shard_size="4kB")
    loaded, info = cls.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()), info
    assert lateinit.is_deferred(model)
    assert_holds(loaded.state_dict(), eager(cls, config).state_dict())


def test_the_configuration_says_class_and_dtype_and_the_models_own_stays(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(**HUB["llama"])
    model = late(transformers.LlamaModel, config)
    before = model.config.to_dict()
    lateinit.save_checkpoint(model, tmp_path / "out", dtype=torch.bfloat16)
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["architectures"] == ["LlamaModel"]
    assert written["dtype"] == "bfloat16"
    assert model.config.to_dict() == before
    loaded = transformers.AutoModel.from_pretrained(tmp_path / "out")
    assert loaded.dtype is torch.bfloat16


# -- refusals ------------------------------------------------------------------------------------


class WithState(nn.Linear):
    def get_extra_state(self) -> dict[str, int]:
        return {"steps": 3}

    def set_extra_state(self, state: dict[str, int]) -> None:
        pass


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: WithState(1, 1), "_extra_state has the type dict"),
        (lambda: Bag(wide=torch.zeros(1, dtype=torch.complex128)), r"wide is torch\.complex128"),
        (lambda: lateinit.nn.LazyLinear(3), r"weight is lazy: lateinit\.infer_shapes\(\) first"),
        (lambda: Bag(few=torch.eye(3).to_sparse()), r"few has the layout torch\.sparse_coo"),
    ],
)
def test_what_the_format_cannot_hold_is_named(make: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(errors.CheckpointError, match=message):
        lateinit.save_checkpoint(make(), tmp_path / "a.safetensors")
    assert names_in(tmp_path) == []


def test_a_plain_meta_model_is_refused(tmp_path: Path) -> None:
    with torch.device("meta"):
        model = nn.Linear(2, 2)
    with pytest.raises(errors.NotRecordedError, match="weight, bias"):
        lateinit.save_checkpoint(model, tmp_path / "a.safetensors")


def test_options_that_make_no_sense_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is no size"):
        lateinit.save_checkpoint(late(tower), tmp_path / "out", max_shard_size="much")
    with pytest.raises(errors.CheckpointError, match="no floating-point dtype"):
        lateinit.save_checkpoint(late(tower), tmp_path / "out", dtype=torch.int8)


@pytest.mark.parametrize("name", ["out", "out.safetensors"])
def test_an_output_that_exists_is_kept_without_force(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    lateinit.save_checkpoint(late(tower), path)
    first = contents(path)
    with pytest.raises(errors.OutputExistsError, match=r"exists: overwrite it with force=True"):
        lateinit.save_checkpoint(late(tower, seed=1), path)
    assert contents(path) == first
    lateinit.save_checkpoint(late(tower, seed=1), path, force=True)
    assert contents(path) != first
    assert names_in(tmp_path) == [name]


def test_force_replaces_all_shards_of_another_division(tmp_path: Path) -> None:
    lateinit.save_checkpoint(late(tower), tmp_path / "out", max_shard_size=300)
    lateinit.save_checkpoint(late(tower), tmp_path / "out", force=True)
    assert names_in(tmp_path / "out") == ["model.safetensors"]


def test_a_folder_with_other_things_in_it_is_never_replaced(tmp_path: Path) -> None:
    lateinit.save_checkpoint(late(tower), tmp_path / "out")
    (tmp_path / "out" / "thesis.tex").write_text("years of work")
    with pytest.raises(errors.OutputExistsError, match=r"would be lost: thesis\.tex"):
        lateinit.save_checkpoint(late(tower), tmp_path / "out", force=True)


def test_a_file_is_no_folder_and_a_folder_no_file(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file")
    (tmp_path / "a.safetensors").mkdir()
    with pytest.raises(errors.OutputExistsError, match="out is a file"):
        lateinit.save_checkpoint(late(tower), tmp_path / "out", force=True)
    with pytest.raises(errors.OutputExistsError, match="is a folder"):
        lateinit.save_checkpoint(late(tower), tmp_path / "a.safetensors", force=True)


def test_an_empty_folder_and_absent_parents_will_do(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    lateinit.save_checkpoint(late(tower), tmp_path / "out")
    lateinit.save_checkpoint(late(tower), tmp_path / "a" / "b" / "c")
    assert contents(tmp_path / "a" / "b" / "c") == contents(tmp_path / "out")


def test_a_link_to_a_folder_stays_one(tmp_path: Path) -> None:
    lateinit.save_checkpoint(late(tower), tmp_path / "real")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    lateinit.save_checkpoint(late(tower, seed=1), tmp_path / "link", force=True)
    assert (tmp_path / "link").is_symlink()
    found = load_file(tmp_path / "real" / "model.safetensors")
    assert_holds(found, eager(tower, seed=1).state_dict())


def test_a_place_that_cannot_be_written_is_our_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(errors.OutputError, match=r"cannot write .*choose a place"):
        lateinit.save_checkpoint(late(tower), tmp_path / "file" / "out")


# -- whole or not at all -------------------------------------------------------------------------


def contents(path: Path) -> dict[str, bytes]:
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    return {file.name: file.read_bytes() for file in files}


@needs_linux
@pytest.mark.parametrize("scenario", ["folder", "file", "replace", "two-renames"])
def test_a_save_killed_at_any_step_tears_nothing_and_can_be_continued(
    scenario: str, tmp_path: Path
) -> None:
    done = processes.run(["-m", "tests.support.killed_saves", str(tmp_path), scenario])
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[0]) > 10


def interrupted(path: Path, monkeypatch: pytest.MonkeyPatch, after: int, **options: Any) -> None:
    """A save that is interrupted once some of its files are finished."""
    finish, done = atomic_output.Stage.finish, []

    def stop(stage: atomic_output.Stage, name: str, digest: str) -> None:
        finish(stage, name, digest)
        done.append(name)
        if len(done) == after:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(atomic_output.Stage, "finish", stop)
        with pytest.raises(KeyboardInterrupt):
            save(path, **options)


def save(path: Path, seed: int = 0, **options: Any) -> lateinit.checkpoint.Saved:
    return lateinit.save_checkpoint(late(tower, seed=seed), path, max_shard_size=300, **options)


@pytest.fixture
def whole(tmp_path: Path) -> dict[str, bytes]:
    save(tmp_path / "whole")
    found = contents(tmp_path / "whole")
    shutil.rmtree(tmp_path / "whole")
    return found


def test_resume_does_not_compute_again_what_is_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: dict[str, bytes]
) -> None:
    interrupted(tmp_path / "out", monkeypatch, after=2)
    assert not (tmp_path / "out").exists()
    computed: list[str] = []
    of = pipeline.TensorComputer.of

    def noting(values: pipeline.TensorComputer, items: Any) -> Any:
        computed.extend(item.entry.name for item in items)
        return of(values, items)

    monkeypatch.setattr(pipeline.TensorComputer, "of", noting)
    save(tmp_path / "out", resume=True)
    assert computed == ["2.weight", "2.bias", "3.weight", "3.bias"]
    assert contents(tmp_path / "out") == whole
    assert names_in(tmp_path) == ["out"]


def test_an_unfinished_save_is_not_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: dict[str, bytes]
) -> None:
    interrupted(tmp_path / "out", monkeypatch, after=2, seed=1)
    with pytest.raises(errors.OutputExistsError, match=r"unfinished save .*--resume.*--force"):
        save(tmp_path / "out")
    with pytest.raises(errors.CheckpointError, match="is of another model, seed, dtype"):
        save(tmp_path / "out", resume=True)
    with pytest.raises(errors.CheckpointError, match="is of another model, seed, dtype"):
        save(tmp_path / "out", seed=1, resume=True, dtype=torch.float16)
    save(tmp_path / "out", force=True)
    assert contents(tmp_path / "out") == whole


def test_a_finished_file_that_has_changed_is_written_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: dict[str, bytes]
) -> None:
    interrupted(tmp_path / "out", monkeypatch, after=3)
    first = tmp_path / ".out.partial" / "files" / "model-00001-of-00004.safetensors"
    first.write_bytes(first.read_bytes()[:-1] + b"?")
    with (tmp_path / ".out.partial" / "journal").open("a") as journal:
        journal.write('{"file": "model-000')  # a torn line
    save(tmp_path / "out", resume=True)
    assert contents(tmp_path / "out") == whole


def test_resume_with_nothing_to_continue_starts(tmp_path: Path, whole: dict[str, bytes]) -> None:
    save(tmp_path / "out", resume=True)
    assert contents(tmp_path / "out") == whole


def test_files_with_real_tensors_are_written_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def half_real(value: float) -> nn.Module:
        model = late(tower)
        lateinit.materialize(model[0])
        nn.init.constant_(model[0].bias, value)
        return model

    finish = atomic_output.Stage.finish

    def stop(stage: atomic_output.Stage, name: str, digest: str) -> None:
        finish(stage, name, digest)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(atomic_output.Stage, "finish", stop)
        with pytest.raises(KeyboardInterrupt):
            lateinit.save_checkpoint(half_real(1.0), tmp_path / "out", max_shard_size=300)
    lateinit.save_checkpoint(half_real(2.0), tmp_path / "out", max_shard_size=300, resume=True)
    first = load_file(tmp_path / "out" / "model-00001-of-00004.safetensors")
    assert first["0.bias"].tolist() == [2.0] * 8


@pytest.mark.parametrize("what", ["constant", "random state"])
def test_all_that_the_bytes_follow_from_must_be_the_same(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def model(value: int) -> nn.Module:
        torch.manual_seed(0)
        if what == "constant":
            return lateinit.deferred_init(lambda: Bag(data=torch.tensor([value])))
        torch.rand(value)
        return lateinit.deferred_init(tower)

    def stop(stage: atomic_output.Stage) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(atomic_output.Stage, "publish", stop)
        with pytest.raises(KeyboardInterrupt):
            lateinit.save_checkpoint(model(1), tmp_path / "out")
    with pytest.raises(errors.CheckpointError, match="is of another model"):
        lateinit.save_checkpoint(model(2), tmp_path / "out", resume=True)
    lateinit.save_checkpoint(model(1), tmp_path / "out", resume=True)


def test_two_processes_do_not_write_one_output(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with atomic_output.staged(target, "something", resume=False, force=False):
        with pytest.raises(errors.OutputExistsError, match="another process is writing"):
            save(target, force=True)
        assert (tmp_path / ".out.partial" / "files").is_dir()


def test_an_error_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = torch.zeros(1 << 16)
    model = lateinit.deferred_init(lambda: Bag(copy=torch.zeros(1 << 16) + data))
    data.add_(1)
    with pytest.raises(errors.ConstantChangedError, match="changed in place"):
        lateinit.save_checkpoint(model, tmp_path / "out")
    assert names_in(tmp_path) == []


def test_a_disk_that_fills_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put, calls = SafetensorsWriter._put, []

    def full(writer: SafetensorsWriter, data: bytes) -> None:
        calls.append(len(data))
        if len(calls) > 5:
            raise OSError(errno.ENOSPC, "No space left on device")
        put(writer, data)

    monkeypatch.setattr(SafetensorsWriter, "_put", full)
    with pytest.raises(errors.OutputError, match=r"No space left.*nothing was left") as caught:
        save(tmp_path / "out")
    assert caught.value.errno == errno.ENOSPC
    assert names_in(tmp_path) == []


def test_a_disk_too_small_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil._ntuple_diskusage(10**9, 10**9 - 1000, 1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    monkeypatch.setattr(atomic_output.Stage, "open", lambda *_, **__: pytest.fail("it began"))
    with pytest.raises(errors.OutputError, match=r"needs 1\.2 kB and its disk has 1\.0 kB free"):
        save(tmp_path / "out")


# -- limits, in processes of their own -----------------------------------------------------------


# Freed memory goes back at once, so that a limit on memory is one on what is held.
ALLOCATOR = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "1000000"}


def run(script: str, *args: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), *map(str, args)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **ALLOCATOR, "OMP_NUM_THREADS": "1"},
    )


@needs_linux
def test_a_file_size_limit_is_our_error_and_leaves_nothing(tmp_path: Path) -> None:
    script = """
        import resource, sys, torch, lateinit
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
        try:
            model = lateinit.deferred_init(torch.nn.Linear, 1024, 1024)
            lateinit.save_checkpoint(model, sys.argv[1])
        except lateinit.errors.OutputError as error:
            print(error)
    """
    done = run(script, tmp_path / "out")
    assert "cannot write" in done.stdout, done.stderr
    assert names_in(tmp_path) == []


@needs_linux
@pytest.mark.parametrize("name", ["out", "out.safetensors"])
def test_a_model_twice_the_memory_limit_is_written(name: str, tmp_path: Path) -> None:
    script = """
        import resource, sys, torch, lateinit
        from torch import nn
        def stack(depth):
            return nn.Sequential(*[nn.Linear(2048, 2048) for _ in range(depth)])
        lateinit.save_checkpoint(lateinit.deferred_init(stack, 1), sys.argv[2])  # first uses
        with open("/proc/self/status") as status:
            size = next(int(line.split()[1]) << 10 for line in status if "VmSize" in line)
        limit = size + (192 << 20)
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        torch.manual_seed(0)
        model = lateinit.deferred_init(stack, 24)
        assert sum(p.nbytes for p in model.parameters()) > 384 << 20
        lateinit.save_checkpoint(model, sys.argv[1], max_shard_size="64MB")
        try:
            stack(24)
        except RuntimeError:
            print("too large to build")
    """
    done = run(script, tmp_path / name, tmp_path / "first.safetensors")
    assert done.returncode == 0, done.stderr
    assert "too large" in done.stdout
    torch.manual_seed(0)
    model = lateinit.deferred_init(tower, 24, 2048)
    for layer in (0, 13, 23):
        lateinit.materialize(model[layer])
        for key in ("weight", "bias"):
            file = place(tmp_path / name, f"{layer}.{key}")
            with safe_open(file, "pt") as opened:
                found = opened.get_tensor(f"{layer}.{key}")
            assert torch.equal(found, getattr(model[layer], key))


def place(output: Path, tensor: str) -> Path:
    if output.is_file():
        return output
    index = json.loads((output / "model.safetensors.index.json").read_text())
    return output / index["weight_map"][tensor]


def test_copies_of_one_layer_are_not_all_held_at_once() -> None:
    def encoder() -> nn.Module:
        return nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 4)

    items = collect(late(encoder), None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "_BATCH", 1)
        runs = list(pipeline.batches(items))
    assert [len(run) for run in runs] == [1] * len(items)


def test_views_of_one_storage_are_computed_together() -> None:
    def split() -> nn.Module:
        whole = torch.randn(64, 64)
        return Bag(other=torch.randn(64, 64), **{f"row{i}": whole[i] for i in range(64)})

    items = collect(late(split), None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "_BATCH", 1)
        runs = list(pipeline.batches(items))
    assert [len(run) for run in runs] == [1, 64]


def test_the_example_runs(tmp_path: Path) -> None:
    module = sys.modules["lateinit._checkpoint.api"]
    names = {"lateinit": lateinit, "torch": torch, "tmp_path": tmp_path}
    found = doctest.testmod(module, extraglobs=names)
    assert found.attempted > 0
    assert found.failed == 0


@pytest.mark.parametrize("size", [(1,), (1, 1), (0, 3)])
def test_one_element_with_any_stride_is_written(size: tuple[int, ...], tmp_path: Path) -> None:
    part = torch.arange(9.0).as_strided(size, (3,) * len(size), 3)
    saved = nn.ParameterDict({"part": nn.Parameter(part)})
    lateinit.save_checkpoint(saved, tmp_path / "a.safetensors")
    found = nn.ParameterDict({"part": nn.Parameter(torch.zeros(size))})
    lateinit.load_checkpoint(found, tmp_path / "a.safetensors")
    assert torch.equal(found["part"], part)
