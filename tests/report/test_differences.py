"""`lateinit diff`: two checkpoints of any format, or a checkpoint and a model."""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from typer.testing import CliRunner

import lateinit
from lateinit import cli
from lateinit._checkpoint.formats import Reader, open_checkpoint
from lateinit._report import differences as module
from lateinit._report.differences import differences
from lateinit._report.values import CHUNK
from tests.support.formats import FORMATS

if TYPE_CHECKING:
    from click.testing import Result

TINY = {"n_layer": 2, "n_embd": 8, "n_head": 2, "vocab_size": 32, "n_positions": 16}
MODEL = ("transformers:gpt2", "--kwargs", json.dumps(TINY | {"bos_token_id": 0, "eos_token_id": 0}))


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command sets this variable and the import path for its process."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(sys, "path", [*sys.path])


def command(*arguments: object) -> Result:
    return CliRunner().invoke(cli.app, [str(a) for a in arguments])


def diff(*arguments: object) -> tuple[int, Any]:
    done = command("diff", *arguments, "--json")
    return done.exit_code, json.loads(done.stdout)


def state() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    found = nn.Sequential(*[nn.Linear(6, 6) for _ in range(3)]).state_dict()
    return dict(found) | {"half": torch.arange(5.0).half(), "whole": torch.arange(3)}


def saved(found: dict[str, Any], path: Path) -> Path:
    torch.save(found, path)
    return path


@pytest.mark.parametrize(("a", "b"), [*itertools.combinations(sorted(FORMATS), 2)])
def test_one_state_in_two_formats_is_equal_and_one_bit_is_not(
    a: str, b: str, tmp_path: Path
) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    changed = state()
    changed["1.weight"][2, 3] = 7.0
    first = FORMATS[a](state(), tmp_path / "a")
    same, other = FORMATS[b](state(), tmp_path), FORMATS[b](changed, tmp_path / "b")
    assert differences(open_checkpoint(first), open_checkpoint(same)).equal
    found = differences(open_checkpoint(first), open_checkpoint(other))
    (row,) = found.rows
    assert (row.name, row.what) == ("1.weight", ("values",))
    assert row.values is not None
    assert (row.values.different, row.values.at, row.values.right) == (1, (2, 3), 7.0)


def test_every_kind_of_difference_is_told_in_words_and_json(tmp_path: Path) -> None:
    ours, theirs = state(), state()
    del theirs["0.bias"]
    theirs["new.bias"] = torch.zeros(2)
    theirs["1.weight"] = torch.zeros(6, 7)
    theirs["2.weight"] = theirs["2.weight"].double()
    theirs["half"] = torch.arange(5.0).bfloat16() + 1
    theirs["2.bias"] = theirs["2.bias"] * 2
    code, told = diff(saved(ours, tmp_path / "a.pt"), saved(theirs, tmp_path / "b.pt"))
    assert code == 1
    assert {row["name"]: row["what"] for row in told["differences"]} == {
        "0.bias": ["only in A"],
        "new.bias": ["only in B"],
        "1.weight": ["shape"],
        "2.weight": ["dtype"],
        "half": ["dtype", "values"],
        "2.bias": ["values"],
    }
    half = next(row for row in told["differences"] if row["name"] == "half")
    assert half["a"] == {"shape": [5], "dtype": "float16"}
    assert half["values"]["different"] == 5
    assert half["values"]["largest_absolute"] == 1.0
    done = command("diff", tmp_path / "a.pt", tmp_path / "b.pt")
    assert done.exit_code == 1
    assert "  0.bias: only in A, (6,) float32" in done.stdout
    assert "  1.weight: shapes (6, 6), (6, 7)" in done.stdout
    assert "  2.weight: dtypes float32, float64\n" in done.stdout
    assert "  half: dtypes float16, bfloat16; 5 of 5 elements differ, by 1 at most" in done.stdout
    assert done.stdout.endswith("DIFFERENT: 6 of 9 names\n")


def test_repeated_names_share_a_line(tmp_path: Path) -> None:
    changed = {name: t + (t.dim() == 1) for name, t in state().items()}
    a, b = saved(state(), tmp_path / "a.pt"), saved(changed, tmp_path / "b.pt")
    told = str(differences(open_checkpoint(a), open_checkpoint(b)))
    assert "{0..2}.bias  x3: 18 of 18 elements differ, by 1 at most" in told


def test_without_values_headers_alone_are_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changed = {name: t + 1 for name, t in state().items()}
    a, b = saved(state(), tmp_path / "a.pt"), saved(changed, tmp_path / "b.pt")
    monkeypatch.setattr(Reader, "read", None)
    done = command("diff", a, b, "--no-values")
    assert done.exit_code == 0, done.output
    assert "values not compared" in done.stdout


def test_values_are_read_in_small_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    read = Reader.read

    def noting(self: Reader, name: str, *where: Any) -> torch.Tensor:
        found = read(self, name, *where)
        sizes.append(found.numel())
        return found

    monkeypatch.setattr(Reader, "read", noting)
    big = {"big": torch.zeros(3, CHUNK + 5)}
    a, b = saved(big, tmp_path / "a.pt"), saved(big, tmp_path / "b.pt")
    assert differences(open_checkpoint(a), open_checkpoint(b)).equal
    assert max(sizes) <= CHUNK
    assert sum(sizes) == 2 * 3 * (CHUNK + 5)


def test_only_some_names_are_compared(tmp_path: Path) -> None:
    changed = state() | {"half": torch.zeros(5).half()}
    a, b = saved(state(), tmp_path / "a.pt"), saved(changed, tmp_path / "b.pt")
    assert diff(a, b, "--only", "*.bias", "--only", "whole") == (
        0,
        {
            "equal": True,
            "a": str(a),
            "b": str(b),
            "names": 4,
            "values_compared": True,
            "differences": [],
        },
    )
    refused = command("diff", a, b, "--only", "*.gain")
    assert refused.exit_code == 2
    assert "matches no tensor" in refused.stderr


def test_a_tie_is_written_once_or_twice_and_is_the_same(tmp_path: Path) -> None:
    tied = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    tied[1].weight = tied[0].weight
    lateinit.save_checkpoint(tied, tmp_path / "tied.safetensors")
    both = saved(dict(tied.state_dict()), tmp_path / "both.pt")
    one = {n: t for n, t in tied.state_dict().items() if n != "0.weight"}
    save_file(one, tmp_path / "one.safetensors")
    for other in (both, tmp_path / "one.safetensors"):
        for pair in (
            (tmp_path / "tied.safetensors", other),
            (other, tmp_path / "tied.safetensors"),
        ):
            assert diff(*pair)[0] == 0
    changed = saved({**tied.state_dict(), "1.weight": torch.zeros(4, 4)}, tmp_path / "c.pt")
    code, told = diff(tmp_path / "tied.safetensors", changed)
    assert (code, [row["name"] for row in told["differences"]]) == (1, ["1.weight"])
    code, told = diff(both, tmp_path / "one.safetensors")
    assert (code, [row["what"] for row in told["differences"]]) == (1, [["only in A"]])


def test_what_is_no_tensor_counts_too(tmp_path: Path) -> None:
    inner = {"a": [1, 2.0, float("nan")], "b": torch.ones(2).to_sparse()}
    base = {"w": torch.ones(2), "step": 3, "x_extra_state": inner, "kind": torch.ones(1)}
    other = {"w": torch.ones(2), "step": 4, "x_extra_state": inner, "kind": 1, "more": None}
    a, b = saved(base, tmp_path / "a.pt"), saved(other, tmp_path / "b.pt")
    assert diff(a, a)[0] == 0
    code, told = diff(a, b)
    assert code == 1
    assert {row["name"]: row["what"] for row in told["differences"]} == {
        "kind": ["kind"],
        "more": ["only in B"],
        "step": ["object"],
    }
    assert diff(a, b, "--only", "w")[0] == 0
    told = command("diff", a, b).stdout
    assert "kind: a tensor in A, and none in the other" in told
    assert "more: only in B, no tensor" in told


def test_names_of_a_training_run_are_found_when_it_is_said_where(tmp_path: Path) -> None:
    run = {"model": {f"module.{n}": t for n, t in state().items()}, "epoch": 2}
    a, b = saved(state(), tmp_path / "a.pt"), saved(run, tmp_path / "b.pt")
    done = command("diff", a, b)
    assert done.exit_code == 1
    assert "No name is in both" in done.stdout
    assert "if 'model.module.' is left out" in done.stdout
    assert "exchange A and B" in command("diff", b, a).stdout
    assert diff(a, b, "--key", "model", "--prefix", "module.")[0] == 0
    renamed = {("first" if n == "half" else n): t for n, t in state().items()}
    c = saved(renamed, tmp_path / "c.pt")
    assert diff(a, c)[0] == 1
    assert diff(a, c, "--rename", "first=half")[0] == 0


def test_a_checkpoint_is_compared_with_what_a_seed_gives(tmp_path: Path) -> None:
    command("init", *MODEL, "--seed", 3, "--dtype", "bfloat16", "-o", tmp_path / "out")
    spec, *kwargs = MODEL
    given = (*kwargs, "--dtype", "bfloat16")
    for pair in ((spec, tmp_path / "out"), (tmp_path / "out", spec)):
        done = command("diff", *pair, *given, "--seed", 3)
        assert done.exit_code == 0, done.output
    assert "transformers:gpt2 from seed 3" in done.stdout
    code, told = diff(tmp_path / "out", spec, *given, "--seed", 4)
    assert code == 1
    assert {tuple(row["what"]) for row in told["differences"]} == {("values",)}
    code, told = diff(spec, tmp_path / "out", *kwargs, "--seed", 3)
    assert {tuple(row["what"]) for row in told["differences"]} >= {("dtype",)}


def test_names_that_transformers_translates_are_the_models(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 31}
    sizes |= {"num_local_experts": 3}
    torch.manual_seed(5)
    model = transformers.MixtralForCausalLM(transformers.MixtralConfig(**sizes))
    model.save_pretrained(tmp_path / "theirs")
    given = ("--kwargs", json.dumps(sizes), "--seed", 5)
    done = command("diff", "transformers:mixtral", tmp_path / "theirs", *given)
    assert done.exit_code == 0, done.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nothing", "a.pt"), "there is no file or folder 'nothing'"),
        (("a.pt", "torch.nn:Nothing"), "has no 'Nothing'"),
        (("a.pt", "a.txt"), "is no checkpoint"),
        (("a.pt", "a.pt", "--rename", "x"), "--rename is OLD=NEW"),
        (("a.pt", "a.pt", "--rename", "x=y"), "has no 'x'"),
        (("a.pt", "a.pt", "--prefix", "no."), "has no name of"),
        (("a.pt", "a.pt", "--dtype", "bfloat16"), "are for models, and these are none"),
        (("a.pt",), "B"),
    ],
)
def test_trouble_is_told_and_is_no_difference(
    arguments: tuple[str, ...], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    saved({"model": state()}, tmp_path / "a.pt")
    (tmp_path / "a.txt").write_text("text")
    done = command("diff", *arguments)
    assert done.exit_code == 2, done.output
    assert message in " ".join(done.stderr.split())
    assert done.stdout == ""


def test_dtypes_that_cannot_be_compared_are_trouble(tmp_path: Path) -> None:
    four = torch.tensor([1, 2], dtype=torch.uint8).view(torch.float4_e2m1fn_x2)
    a, b = saved({"x": four}, tmp_path / "a.pt"), saved({"x": torch.ones(2)}, tmp_path / "b.pt")
    done = command("diff", a, b)
    assert done.exit_code == 2
    assert "x: torch cannot compare torch.float4_e2m1fn_x2 with torch.float32" in done.stderr
    assert diff(a, b, "--no-values")[1]["differences"][0]["what"] == ["dtype"]
    assert diff(a, a)[0] == 0


def test_help_names_the_exit_codes() -> None:
    assert "2 if they cannot be compared" in " ".join(command("diff", "--help").stdout.split())
    assert module.ONLY_A == "only in A"
