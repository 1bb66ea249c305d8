"""What a checkpoint holds, told without a model: `lateinit inspect PATH`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import lateinit
from lateinit import cli
from lateinit._report.contents import contents
from lateinit.errors import CorruptCheckpointError, PatternError
from tests.support.formats import FORMATS

if TYPE_CHECKING:
    from click.testing import Result


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command sets this variable and the import path for its process."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(sys, "path", [*sys.path])


def inspect(*arguments: object) -> Result:
    return CliRunner().invoke(cli.app, ["inspect", *map(str, arguments)])


def tower() -> nn.Module:
    model = nn.Sequential(*[nn.Linear(6, 6) for _ in range(3)], nn.Linear(6, 3))
    model[2].weight = model[0].weight
    model[3].half()
    return model


@pytest.mark.parametrize("name", sorted(FORMATS))
def test_every_format_tells_its_tensors(name: str, tmp_path: Path) -> None:
    state = tower().state_dict()
    found = contents(FORMATS[name](state, tmp_path))
    assert {row.name: (row.shape, row.dtype, row.nbytes) for row in found.rows} == {
        key: (tuple(t.shape), str(t.dtype).removeprefix("torch."), t.nbytes)
        for key, t in state.items()
    }
    assert all(row.files and set(row.files) <= found.files.keys() for row in found.rows)
    folder = found.path if found.path.is_dir() else found.path.parent
    assert {f: (folder / f).stat().st_size for f in found.files} == {
        f: about.nbytes for f, about in found.files.items()
    }
    assert json.loads(json.dumps(found.to_dict()))["totals"]["tensors"] == 8


def bytes_read() -> int:
    """What this process has read from files so far; mapped pages are not among it."""
    told = Path("/proc/self/io").read_text().split()
    return int(told[told.index("rchar:") + 1])


@pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")
@pytest.mark.parametrize("name", sorted(FORMATS))
def test_no_data_are_read(name: str, tmp_path: Path) -> None:
    path = FORMATS[name]({"w": torch.zeros(3_000_000), "n": torch.zeros(2)}, tmp_path)
    contents(path)  # imports what it needs
    before = bytes_read()
    assert contents(path).totals.elements == 3_000_002
    # What torch wrote before its version 1.6 cannot be mapped.
    assert (bytes_read() - before < 100_000) == (name != "old pt")


def test_repeated_names_share_a_line_and_totals_are_by_dtype(tmp_path: Path) -> None:
    lateinit.save_checkpoint(tower(), tmp_path / "a.safetensors")
    told = str(contents(tmp_path / "a.safetensors"))
    assert "0.weight  (= 2.weight)" in told
    assert "{0..2}.bias  x3" in told
    assert "111 elements in 7 tensors, 402 B (float32 360 B, float16 42 B)" in told
    assert "safetensors, 1 file" in told
    assert f"metadata of a.safetensors: format=pt, lateinit={lateinit.__version__}" in told


def test_the_file_of_each_tensor_is_told_where_there_are_several(tmp_path: Path) -> None:
    lateinit.save_checkpoint(tower(), tmp_path / "out", max_shard_size="200B")
    found = contents(tmp_path / "out")
    (last,) = [row for row in found.rows if row.name == "3.bias"]
    assert last.files[0] in str(found)
    assert found.rows[0].name == "0.weight"
    assert found.files["model.safetensors.index.json"].metadata == {"total_size": 402}
    index = contents(tmp_path / "out" / "model.safetensors.index.json")
    assert (index.rows, index.totals) == (found.rows, found.totals)


def test_blocks_in_the_files_of_several_ranks_name_them_all(tmp_path: Path) -> None:
    path = FORMATS["dcp"](tower().state_dict(), tmp_path)
    found = contents(path)
    assert found.format == "torch.distributed.checkpoint"
    assert found.rows[0].files == ("__0_0.distcp",)
    assert ".metadata" in found.files


def test_shared_memory_is_told_and_counted_once(tmp_path: Path) -> None:
    whole = torch.zeros(10)
    torch.save({"low": whole[:5], "high": whole[5:], "all": whole}, tmp_path / "a.pt")
    found = contents(tmp_path / "a.pt")
    assert found.totals.bytes == 40
    assert "high  (shares memory with low)" in str(found)


def test_what_is_no_tensor_is_told_by_name(tmp_path: Path) -> None:
    torch.save({"model": tower().state_dict(), "epoch": 3}, tmp_path / "a.ckpt")
    found = contents(tmp_path / "a.ckpt")
    assert found.objects == ("epoch",)
    assert "no tensors, 1: epoch" in str(found)
    assert "model.{0..2}.bias" in str(found)


def test_only_some_tensors_are_told(tmp_path: Path) -> None:
    lateinit.save_checkpoint(tower(), tmp_path / "a.safetensors")
    found = contents(tmp_path / "a.safetensors", only=["2.w*", "*.bias"])
    assert [row.name for row in found.rows] == ["0.weight", "0.bias", "1.bias", "2.bias", "3.bias"]
    with pytest.raises(PatternError, match=r"only='\*.gain' matches no tensor; there are: "):
        contents(tmp_path / "a.safetensors", only=["*.gain"])


def test_what_a_file_says_cannot_steer_a_terminal(tmp_path: Path) -> None:
    torch.save({"a\x1b[31m\nb": torch.zeros(1), "\x07": 1}, tmp_path / "a.pt")
    told = str(contents(tmp_path / "a.pt"))
    assert "a\\x1b[31m\\nb" in told
    assert "\x1b" not in told
    assert "\x07" not in told


def test_what_exists_is_a_checkpoint_and_all_else_a_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    lateinit.save_checkpoint(nn.Linear(2, 2), tmp_path / "torch.nn:Linear")
    assert "safetensors, 1 file" in inspect("torch.nn:Linear").stdout
    given = ("--kwargs", '{"in_features": 2, "out_features": 2}')
    refused = inspect("torch.nn:Linear", *given, "--mesh", "fsdp=2")
    assert refused.exit_code == 2
    assert "is a checkpoint: --kwargs, --mesh is for models" in " ".join(refused.stderr.split())
    monkeypatch.chdir(tmp_path.parent)
    assert "deferred" in inspect("torch.nn:Linear", *given).stdout
    nothing = inspect("out.safetensors")
    assert nothing.exit_code == 2
    assert "no file or folder 'out.safetensors', and it names no model" in nothing.stderr


def test_the_command_prints_json(tmp_path: Path) -> None:
    lateinit.save_checkpoint(tower(), tmp_path / "a.safetensors")
    done = inspect(tmp_path / "a.safetensors", "--json", "--only", "1.*")
    told = json.loads(done.stdout)
    assert [t["name"] for t in told["tensors"]] == ["1.weight", "1.bias"]
    assert told["files"][0]["metadata"]["format"] == "pt"


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.txt", b"text", "is no checkpoint"),
        ("a.gguf", b"GGUF", "is no checkpoint"),
        ("a.safetensors", b"", "it has 0 bytes"),
        ("a.safetensors", b"x" * 30, "its header would take"),
        ("a.pt", b"x" * 30, "is no whole file of torch.save|could run any code"),
        ("a.safetensors.index.json", b"[]", "is no index of shards"),
        ("empty/x.txt", b"", "is no checkpoint: it has no index"),
    ],
)
def test_what_is_no_checkpoint_is_refused(
    name: str, data: bytes, message: str, tmp_path: Path
) -> None:
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(data)
    asked = path.parent if "/" in name else path
    with pytest.raises(CorruptCheckpointError, match=message):
        contents(asked)
    refused = inspect(asked)
    assert (refused.exit_code, refused.stdout) == (2, "")
    assert refused.stderr.startswith("lateinit: ")


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors_are_no_tensors_with_a_shape(tmp_path: Path) -> None:
    nested = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])
    torch.save({"w": torch.ones(2), "n": nested}, tmp_path / "a.pt")
    assert "no tensors, 1: n" in inspect(tmp_path / "a.pt").stdout
