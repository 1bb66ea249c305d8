"""The benchmarks in small: their values are right and their results well-formed."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

pytest.importorskip("accelerate")
pytest.importorskip("transformers")

from benchmarks import __main__ as command
from benchmarks import harness, materialize
from benchmarks.contenders import CONTENDERS
from benchmarks.harness import Goal, Row, Run, alternate, assert_equal
from benchmarks.models import MODELS
from benchmarks.report import page, write
from tests.support import processes

pytestmark = pytest.mark.filterwarnings("ignore")


def forked(*arguments):
    done = processes.run(list(arguments))
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("case", command.CASES)
def test_a_case_gives_well_formed_rows_with_equal_values(case, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(harness, "printed", forked)
    found = tmp_path / "found.json"
    assert command.main(["--quick", "--case", case, "--json", str(found)]) == 0
    results = json.loads(found.read_text())
    assert results["machine"]["torch"] == torch.__version__
    assert results["rows"]
    for row in results["rows"]:
        assert row["equal"] in (True, None)
        for side in (row["ours"], row["theirs"]):
            assert side["min"] == min(side["all"])
            assert min(side["all"]) <= side["median"] <= max(side["all"])
    assert results["rows"][0]["case"] in capsys.readouterr().out


def test_a_case_that_does_not_exist_is_refused(capsys):
    assert command.main(["--case", "nonesuch"]) == 2
    assert "nonesuch" in capsys.readouterr().err


def test_wrong_values_fail_a_benchmark(monkeypatch):
    def slightly_off(make):
        model = CONTENDERS["materialized"](make)
        with torch.no_grad():
            model[1].bias.add_(1e-3)
        return model

    monkeypatch.setattr(materialize, "materialized", slightly_off)
    with pytest.raises(AssertionError, match="differs from what eager construction gives"):
        command.CASES["linears"](Run(tiny=True))


def test_another_random_state_afterwards_fails_a_benchmark(monkeypatch):
    def drawing_more(make):
        model = CONTENDERS["materialized"](make)
        torch.rand(1)
        return model

    monkeypatch.setattr(materialize, "materialized", drawing_more)
    with pytest.raises(AssertionError, match="the random state ends elsewhere"):
        command.CASES["linears"](Run(tiny=True))


def test_models_differ_where_one_bit_does():
    first, second = nn.Linear(3, 3), nn.Linear(3, 3)
    second.load_state_dict(first.state_dict())
    assert_equal(first, second)
    with torch.no_grad():
        second.bias[1] = torch.nextafter(second.bias[1], torch.tensor(9.0))
    with pytest.raises(AssertionError, match="bias"):
        assert_equal(first, second)


@pytest.mark.parametrize("model", MODELS)
def test_a_model_has_a_small_form(model):
    assert sum(p.numel() for p in MODELS[model](tiny=True).parameters()) < 100_000


def test_ways_take_turns():
    called = []
    ways = {name: lambda name=name: called.append(name) for name in ("a", "b", "c")}
    seconds = alternate(ways, 3, {"b": 1})
    assert "".join(called) == "abcacac"
    assert {name: len(s) for name, s in seconds.items()} == {"a": 3, "b": 1, "c": 3}


def test_a_goal_is_a_ratio_that_points_one_way():
    fewer, faster = Goal(1.2), Goal(3.0, faster=True)
    assert (fewer.ratio(1.0, 2.0), faster.ratio(1.0, 2.0)) == (0.5, 2.0)
    assert fewer.met(1.2)
    assert not fewer.met(1.3)
    assert faster.met(3.0)
    assert not faster.met(2.9)


def test_results_are_left_as_a_page_and_as_json(tmp_path):
    rows = [
        Row("a case", "build", [0.5, 0.4], "eager", [2.0, 1.6], "s", Goal(3.0, faster=True), True),
        Row("a case", "peak memory", [1500.0], "meta", [2000.0], "MB"),
    ]
    write(rows, {"cores": 2}, tmp_path / "docs")
    line = "| a case | build | 400 ms | eager | 1.6 s | 4.00 | at least 3 x | yes | yes |"
    assert line in (tmp_path / "docs" / "benchmarks.md").read_text()
    assert "| 1500 MB | meta | 2000 MB | 0.75 |  |  |  |" in page(rows, {})
    stored = json.loads((tmp_path / "docs" / "benchmarks.json").read_text())
    assert stored["rows"][0]["ours"] == {"min": 0.4, "median": 0.45, "all": [0.5, 0.4]}
    drawn = (tmp_path / "docs" / "benchmarks.svg").read_text()
    assert "a case: build, against eager" in drawn
    assert "4 (at least 3 x)" in drawn
    assert "peak memory" not in drawn  # it has no goal
