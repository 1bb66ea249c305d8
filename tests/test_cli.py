"""The command line: what it prints for people and programs, and how it fails."""

from __future__ import annotations

import doctest
import gc
import importlib.metadata
import itertools
import json
import os
import random
import shlex
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from typer.testing import CliRunner

import lateinit
from lateinit import cli
from lateinit._checkpoint.save import atomic_output
from lateinit._report import parity
from tests.support.cases import Bag

if TYPE_CHECKING:
    from collections.abc import Callable

    from click.testing import Result

TINY = json.dumps({"n_layer": 2, "n_embd": 8, "n_head": 2, "vocab_size": 32, "n_positions": 16})
LINEAR = ("torch.nn:Linear", "--kwargs", '{"in_features": 4, "out_features": 2}')


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command sets this variable and the import path for its process."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(sys, "path", [*sys.path])


def lateinit_command(*arguments: object) -> Result:
    return CliRunner().invoke(cli.app, [str(a) for a in arguments])


def test_version_and_help() -> None:
    assert lateinit.__version__ in lateinit_command("--version").stdout
    shown = lateinit_command("--help").stdout
    for name in ("inspect", "check", "init", "info"):
        assert name in shown


def test_each_command_has_short_options_for_help_and_the_program_for_its_version() -> None:
    assert lateinit_command("-V").stdout == lateinit_command("--version").stdout
    for command in ((), ("inspect",), ("check",), ("init",), ("info",)):
        assert (
            lateinit_command(*command, "-h").stdout == lateinit_command(*command, "--help").stdout
        )


def test_a_shell_is_told_the_commands_and_their_options() -> None:
    shown = {}
    for words in ("lateinit in", "lateinit init --max"):
        environment = {
            "_LATEINIT_COMPLETE": "complete_bash",
            "COMP_WORDS": words,
            "COMP_CWORD": str(len(words.split()) - 1),
        }
        done = CliRunner().invoke(cli.app, [], prog_name="lateinit", env=environment)
        shown[words] = sorted(done.stdout.split())
    assert shown == {
        "lateinit in": ["info", "init", "inspect"],
        "lateinit init --max": ["--max-shard-size"],
    }
    assert "--install-completion" in lateinit_command("--help").stdout


@pytest.mark.parametrize("arguments", ["--help", "--version", "init --help", "init -o ''"])
def test_what_needs_no_model_imports_no_torch(arguments: str) -> None:
    script = (
        "import sys; from lateinit.cli import app\n"
        f"try: app({shlex.split(arguments)!r})\n"
        "except SystemExit: assert not {'torch', 'numpy'} & set(sys.modules)\n"
        "else: raise AssertionError"
    )
    done = subprocess.run([sys.executable, "-c", script], check=False, capture_output=True)
    assert done.returncode == 0, done.stderr


# -- inspect -------------------------------------------------------------------------------------


def test_inspect_prints_the_table() -> None:
    done = lateinit_command("inspect", "transformers:gpt2", "--kwargs", TINY)
    assert done.exit_code == 0, done.stderr
    assert "transformer.wte.weight  (= lm_head.weight)" in done.stdout
    assert "transformer.h.{0..1}.mlp.c_fc.weight  x2" in done.stdout
    assert "normal_(std=0.02)" in done.stdout
    assert "deferred" in done.stdout.splitlines()[-1]


def test_inspect_prints_json_and_a_part() -> None:
    done = lateinit_command("inspect", *LINEAR, "--json", "--only", "b*", "--only", "*eight")
    data = json.loads(done.stdout)
    assert data["spec"] == "torch.nn:Linear"
    assert [t["name"] for t in data["tensors"]] == ["weight", "bias"]


def test_inspect_shows_modules_down_to_a_depth() -> None:
    arguments = ("inspect", "transformers:gpt2", "--kwargs", TINY, "--depth", 2)
    shown = lateinit_command(*arguments).stdout
    assert "transformer.h  " in shown
    assert "transformer.h." not in shown
    data = json.loads(lateinit_command(*arguments, "--json").stdout)
    assert data["modules"][0]["parameters"] == data["totals"]["parameters"]


def test_inspect_of_a_terminal_is_a_rich_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "_is_terminal", lambda: True)
    shown = lateinit_command("inspect", *LINEAR).stdout
    assert "─" in shown
    assert "weight" in shown


# -- check ---------------------------------------------------------------------------------------


def test_check_says_that_a_model_is_equal() -> None:
    done = lateinit_command("check", "transformers:gpt2", "--kwargs", TINY, "--seed", 3)
    assert done.exit_code == 0, done.stderr
    assert "seed 3" in done.stdout
    assert "materialise" in done.stdout
    assert "equal, bit for bit" in done.stdout


def test_check_prints_json() -> None:
    data = json.loads(lateinit_command("check", *LINEAR, "--json").stdout)
    assert data["equal"] is True
    assert data["differences"] == []
    assert data["parameters"] == 10
    assert data["seconds"].keys() == {"eager", "record", "materialise"}


def test_check_exits_with_1_where_something_differs(tmp_path: Path) -> None:
    (tmp_path / "unsteady.py").write_text(
        "import itertools, torch\n"
        "from torch import nn\n"
        "calls = itertools.count()\n"
        "def make():\n"
        "    net = nn.Linear(2, 2)\n"
        "    nn.init.constant_(net.bias, next(calls))\n"
        "    return net\n"
    )
    done = lateinit_command("check", f"{tmp_path}/unsteady.py:make")
    assert done.exit_code == 1
    assert "bias: values differ" in done.stdout
    assert "DIFFERENT: 1 difference" in done.stdout
    as_json = lateinit_command("check", f"{tmp_path}/unsteady.py:make", "--json")
    assert as_json.exit_code == 1
    assert json.loads(as_json.stdout)["equal"] is False


def differing(*things: Callable[[], nn.Module]) -> dict[str, str]:
    """What `check` says of models that differ from one construction to the next."""
    made = itertools.cycle(things)

    def build() -> nn.Module:
        return next(made)()

    return dict(parity.check_parity(build).differences)


def test_every_kind_of_difference_is_found() -> None:
    def tied(tie: bool) -> nn.Module:
        model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
        if tie:
            model[1].weight = model[0].weight
        return model

    def views(apart: bool) -> nn.Module:
        whole = torch.arange(4.0)
        return Bag(low=whole[:2], high=whole[2:].clone() if apart else whole[2:])

    def buffered(persistent: bool) -> nn.Module:
        model = nn.Module()
        model.register_buffer("x", torch.ones(2), persistent=persistent)
        return model

    def drawing(more: bool) -> nn.Module:
        model = nn.Linear(2, 2)
        if more:
            torch.rand(1)
        return model

    def parameter(grad: bool = True, dtype: torch.dtype = torch.float32) -> nn.Module:
        return Bag(x=nn.Parameter(torch.ones(2, 3, dtype=dtype), requires_grad=grad))

    assert differing(lambda: tied(False), lambda: tied(True)).keys() == {"0.weight", "1.weight"}
    assert "memory" in differing(lambda: views(False), lambda: views(True))["high"]
    assert "persistent" in differing(lambda: buffered(True), lambda: buffered(False))["x"]
    assert differing(lambda: drawing(False), lambda: drawing(True)).keys() == {"(random state)"}
    assert "requires_grad" in differing(parameter, lambda: parameter(False))["x"]
    assert "dtype" in differing(parameter, lambda: parameter(dtype=torch.float16))["x"]
    assert "kind" in differing(parameter, lambda: Bag(x=torch.ones(2, 3)))["x"]
    assert "stride" in differing(parameter, lambda: Bag(x=torch.ones(3, 2).t()))["x"]
    assert differing(parameter, nn.Module) == {"x": "missing"}
    assert differing(nn.Module, parameter) == {"x": "one too many"}


def test_a_wrong_value_is_shown() -> None:
    def ones(last: float) -> nn.Module:
        tensor = torch.ones(3)
        tensor[2] = last
        return Bag(x=tensor)

    said = differing(lambda: ones(1.0), lambda: ones(2.0))["x"]
    assert said == "values differ: 1 of 3, the first at 2: eager 1.0, deferred 2.0"


def test_zeros_of_either_sign_differ() -> None:
    negative = lambda: Bag(x=torch.zeros(1).neg())  # noqa: E731
    assert "values differ" in differing(lambda: Bag(x=torch.zeros(1)), negative)["x"]


def test_what_only_deferred_construction_raises_is_a_difference() -> None:
    def failing() -> nn.Module:
        raise KeyError("only now")

    assert differing(nn.Module, failing) == {
        "(construction)": "eager succeeds, deferred raises KeyError: 'only now'"
    }


def test_check_leaves_every_generator_where_it_was() -> None:
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002

    def drawing() -> nn.Module:
        return Bag(x=torch.randn(3) * random.random() * np.random.rand())  # noqa: NPY002

    assert parity.check_parity(drawing).equal
    after = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
    assert torch.equal(before[0], after[0])
    assert before[1:] == after[1:]


@pytest.mark.parametrize("ruled", ["whole", "part", "turned", "inner.weight", "same", "*"])
def test_check_calls_rules_in_the_states_of_windows_and_aliases(ruled: str) -> None:
    def build() -> nn.Module:
        inner = nn.Linear(4, 4)
        whole = nn.Parameter(torch.rand(4, 6))
        return Bag(
            whole=whole,
            part=nn.Parameter(whole.detach()[1]),
            turned=nn.Parameter(whole.detach().t()),
            inner=inner,
            same=nn.Parameter(inner.weight.detach()),
        )

    assert parity.check_parity(build, init={ruled: "normal"}).differences == ()


# -- init ----------------------------------------------------------------------------------------


def test_init_writes_what_eager_construction_gives(tmp_path: Path) -> None:
    done = lateinit_command("init", *LINEAR, "--seed", 5, "-o", tmp_path / "a.safetensors")
    assert done.exit_code == 0, done.stderr
    assert "2 tensors, 40 B, in 1 file" in done.stdout
    torch.manual_seed(5)
    eager = nn.Linear(4, 2)
    found = load_file(tmp_path / "a.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in eager.state_dict().items())


def test_maps_and_rules_are_given_as_json(tmp_path: Path) -> None:
    out, rules = (
        tmp_path / "out.safetensors",
        '{"*.mlp.*.weight": "normal(std=0.5)", "*.bias": "ones"}',
    )
    given = ("--init", rules, "--dtype", '{"*ln*": "float32", "*": "bfloat16"}')
    spec = ("transformers:gpt2", "--kwargs", TINY)
    done = lateinit_command("init", *spec, "-o", out, *given)
    assert done.exit_code == 0, done.output
    found = load_file(out)
    assert {t.dtype for n, t in found.items() if ".ln" in n} == {torch.float32}
    assert {t.dtype for n, t in found.items() if ".mlp." in n} == {torch.bfloat16}
    assert all(t.eq(1).all() for n, t in found.items() if n.endswith(".bias"))
    assert lateinit_command("check", *spec, "--checkpoint", out, *given).exit_code == 0
    assert lateinit_command("check", *spec, "--checkpoint", out, *given[2:]).exit_code == 1
    assert lateinit_command("check", *spec, "--init", rules).exit_code == 0
    for wrong, message in (
        (("--init", "{"), "--init is no JSON"),
        (("--init", '{"a": 3}'), "3 is no initialiser"),
        (("--init", '{"nothing": "zeros"}'), "'nothing' matches no tensor"),
    ):
        refused = lateinit_command("check", *spec, *wrong)
        assert refused.exit_code == 2, refused.output
        assert message in refused.output.replace("\n", " ")


def test_init_takes_dtype_and_shard_size_and_prints_json(tmp_path: Path) -> None:
    out = tmp_path / "out"
    options = ("--dtype", "bfloat16", "--max-shard-size", "1kB", "--json")
    done = lateinit_command("init", "transformers:gpt2", "--kwargs", TINY, "-o", out, *options)
    data = json.loads(done.stdout)
    assert data["path"] == str(out)
    assert data["seed"] == 0
    assert "config.json" in data["files"]
    assert len(data["files"]) > 3
    found = load_file(out / data["files"][1])
    assert all(tensor.dtype is torch.bfloat16 for tensor in found.values())


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("BF16", torch.bfloat16),
        ("bf16", torch.bfloat16),
        ("float", torch.float32),
        ("fp16", torch.float16),
        ("half", torch.float16),
        ("torch.float64", torch.float64),
    ],
)
def test_a_dtype_may_be_written_as_people_do(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    out = tmp_path / "a.safetensors"
    done = lateinit_command("init", *LINEAR, "--dtype", name, "-o", out)
    assert done.exit_code == 0, done.stderr
    assert load_file(out)["weight"].dtype is dtype


@pytest.mark.parametrize("seed", [-(2**63), 2**64 - 1])
def test_a_seed_is_what_torch_takes(seed: int, tmp_path: Path) -> None:
    out = tmp_path / "a.safetensors"
    done = lateinit_command("init", *LINEAR, "--seed", seed, "-o", out)
    assert done.exit_code == 0, done.stderr
    torch.manual_seed(seed)
    assert torch.equal(load_file(out)["weight"], nn.Linear(4, 2).weight)


def test_init_refuses_overwrites_and_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ("init", *LINEAR, "-o", tmp_path / "out", "--max-shard-size", "32B")
    assert lateinit_command(*command).exit_code == 0
    refused = lateinit_command(*command)
    assert refused.exit_code == 2
    assert "--force" in refused.stderr
    assert lateinit_command(*command, "--force").exit_code == 0
    finish = atomic_output.Stage.finish

    def stop(stage: atomic_output.Stage, name: str, digest: str) -> None:
        finish(stage, name, digest)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(atomic_output.Stage, "finish", stop)
        stopped = lateinit_command(*command, "--force")
    assert stopped.exit_code == 130
    assert "--resume" in stopped.stderr
    assert "exists" in lateinit_command(*command).stderr
    assert lateinit_command(*command, "--resume", "--force").exit_code == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


# -- info ----------------------------------------------------------------------------------------


def test_info_says_what_a_bug_report_needs() -> None:
    done = lateinit_command("info")
    assert done.exit_code == 0, done.stderr
    shown = dict(line.split(maxsplit=1) for line in done.stdout.splitlines())
    assert shown["torch"] == torch.__version__
    assert shown["lateinit"] == lateinit.__version__
    assert len(shown["processor"]) > 3
    assert shown["memory"].endswith("B")
    assert (shown["accelerators"] == "none") is not torch.cuda.is_available()
    assert f"{torch.get_num_threads()} of " in shown["threads"]
    assert torch.backends.cpu.get_cpu_capability() in done.stdout


def test_info_says_which_native_kernels_are_used_and_why() -> None:
    native = json.loads(lateinit_command("info", "--json").stdout)["native"]
    assert native.keys() >= {"jump", "uniform_ float32", "normal_ bfloat16"}
    for name, verdict in native.items():
        assert verdict["why"], name
        shown = f"native {name} ", f"{'used' if verdict['used'] else 'not used'}: {verdict['why']}"
        assert [
            line
            for line in lateinit_command("info").stdout.splitlines()
            if line.startswith(shown[0]) and line.endswith(shown[1])
        ]


def test_info_names_what_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    found = json.loads(lateinit_command("info", "--json").stdout)
    assert found["optional"]["transformers"] is None
    assert "not installed" in lateinit_command("info").stdout


# -- failures ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("inspect", "gpt2"), "names no model"),
        (("inspect", "transformers:gpt3"), "near:"),
        (("inspect", "torch.nn:Linear", "--kwargs", "{"), "is no JSON"),
        (("inspect", *LINEAR, "--only", "nothing"), "matches no tensor"),
        (("check", "torch.nn:Linear"), "in_features"),
        (("check", "collections:OrderedDict"), "not an nn.Module"),
        (("init", *LINEAR, "-o", "x", "--dtype", "int8"), "--dtype 'int8' is none of"),
        (("init", *LINEAR, "-o", "x", "--dtype", "brain"), "float16, bfloat16"),
        (("init", *LINEAR, "-o", "x", "--dtype", ""), "--dtype '' is none of"),
        (("init", *LINEAR, "-o", "x", "--seed", str(2**64)), "torch takes -2**63 to 2**64 - 1"),
        (("check", *LINEAR, "--seed", str(-(2**63) - 1)), "torch takes -2**63 to 2**64 - 1"),
        (("check", *LINEAR, "--seed", "x"), "--seed"),
        (("check", *LINEAR, "--checkpoint", ""), "the path is empty"),
        (("init", *LINEAR, "-o", ""), "the path is empty"),
        (("inspect", ""), "names no model"),
        (("init", *LINEAR, "-o", "x", "--max-shard-size", "big"), "is no size"),
        (("init", *LINEAR), "output"),
    ],
)
def test_an_expected_error_is_one_message_and_exit_code_2(
    arguments: tuple[str, ...], message: str
) -> None:
    done = lateinit_command(*arguments)
    assert done.exit_code == 2
    assert message in done.stderr.replace("\n", " ")
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_an_error_of_the_models_own_is_shown_with_its_traceback(tmp_path: Path) -> None:
    path = tmp_path / "broken_model.py"
    path.write_text("def make():\n    return {}['missing']\n")
    done = lateinit_command("inspect", f"{path}:make")
    assert done.exit_code == 2
    assert "KeyError: 'missing'" in done.stderr
    assert "the model's constructor raised this" in done.stderr


# -- processes of its own ------------------------------------------------------------------------


def run(*arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "lateinit", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(Path(lateinit.__file__).parents[1])},
    )


def test_a_model_in_the_current_folder_is_found_and_stdout_holds_the_answer_only(
    tmp_path: Path,
) -> None:
    (tmp_path / "mine.py").write_text(
        "import warnings\n"
        "from torch import nn\n"
        "def make(width=2):\n"
        "    warnings.warn('a word')\n"
        "    return nn.Linear(width, width)\n"
    )
    done = run("inspect", "mine:make", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["totals"]["parameters"] == 6
    assert "a word" in done.stderr
    failed = run("init", "mine:made", "-o", "out", cwd=tmp_path)
    assert failed.returncode == 2
    assert failed.stderr.splitlines() == ["lateinit: 'mine:made': mine has no 'made'; it has: make"]


def test_full_garbage_collections_wait_while_a_command_imports_a_library(tmp_path: Path) -> None:
    usual = gc.get_threshold()[2]
    (tmp_path / "model.py").write_text(
        "import gc\n"
        "import torch\n"
        f"assert gc.get_threshold()[2] > {usual}\n"
        "build = lambda: torch.nn.Linear(2, 3)\n"
    )
    done = lateinit_command("inspect", f"{tmp_path}/model.py:build")
    assert done.exit_code == 0, done.output
    assert gc.get_threshold()[2] == usual


def test_the_example_of_parity_runs() -> None:
    found = doctest.testmod(parity, extraglobs={"torch": torch})
    assert found.attempted > 0
    assert found.failed == 0


# -- check --checkpoint ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["out", "out.safetensors"])
def test_check_says_that_a_checkpoint_is_what_the_seed_gives(name: str, tmp_path: Path) -> None:
    model = ("transformers:gpt2", "--kwargs", TINY, "--seed", 3)
    lateinit_command("init", *model, "--dtype", "bfloat16", "-o", tmp_path / name)
    arguments = ("check", *model, "--checkpoint", tmp_path / name)
    done = lateinit_command(*arguments, "--dtype", "bfloat16")
    assert done.exit_code == 0, done.output
    assert "equal, bit for bit, to what seed 3 gives" in done.stdout
    done = lateinit_command(*arguments)
    assert done.exit_code == 1
    assert "has the dtype torch.bfloat16, the model torch.float32: give the --dtype" in done.stdout


def test_check_names_every_difference_of_a_checkpoint(tmp_path: Path) -> None:
    torch.manual_seed(0)
    state = nn.Linear(4, 3).state_dict()
    state["weight"][1, 2] = 7.0
    state["bias"] = torch.ones(2)
    state["extra"] = torch.ones(1)
    torch.save(state, tmp_path / "a.pt")
    linear = ("torch.nn:Linear", "--kwargs", '{"in_features": 4, "out_features": 3}')
    arguments = ("check", *linear, "--checkpoint", tmp_path / "a.pt")
    done = lateinit_command(*arguments)
    assert done.exit_code == 1
    assert "extra: not in the model" in done.stdout
    assert "bias: the checkpoint has the shape (2,), the model (3,)" in done.stdout
    assert "weight: values differ: 1 of 12, the first at 6: seed " in done.stdout
    assert "checkpoint 7.0" in done.stdout
    found = json.loads(lateinit_command(*arguments, "--json").stdout)
    assert {d["name"] for d in found["differences"]} == {"extra", "bias", "weight"}
    torch.save({"weight": state["weight"]}, tmp_path / "a.pt")
    assert "bias: not in the checkpoint" in lateinit_command(*arguments).stdout


def test_check_of_what_is_no_checkpoint_is_one_message(tmp_path: Path) -> None:
    done = lateinit_command("check", *LINEAR, "--checkpoint", tmp_path / "nothing")
    assert done.exit_code == 2
    assert "nothing does not exist" in done.stderr
    done = lateinit_command("check", *LINEAR, "--dtype", "bfloat16")
    assert done.exit_code == 2
    assert "--dtype is for --checkpoint" in done.stderr
