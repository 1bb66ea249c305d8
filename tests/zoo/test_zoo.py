"""A spread of the zoo, and that the zoo can tell what is wrong."""

from __future__ import annotations

import dataclasses
import os
import time

import pytest
import torch
from torch import nn

import lateinit
from lateinit._materialize import scheduler
from lateinit._recording import writer

transformers = pytest.importorskip("transformers")

from tests.zoo import __main__ as command  # noqa: E402 - needs transformers
from tests.zoo import catalog, check, pool, table  # noqa: E402
from tests.zoo.check import DIFFERENT, EQUAL, REFUSED, UNBUILT, Outcome  # noqa: E402
from tests.zoo.shrink import Recipe, shrunk  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")

TEXT = ["bert", "bloom", "deberta-v2", "electra", "gpt2", "gpt_neox", "llama", "t5", "xlnet"]
ROTARY = ["gemma3_text", "gpt_oss", "phi3", "qwen2_vl"]
TRUNCATED_NORMAL = ["beit", "dinov2", "modernbert", "vit"]
EXPERTS = ["deepseek_v3", "mixtral", "qwen3_moe"]
STATE_SPACE = ["falcon_mamba", "jamba", "mamba2", "qwen3_next", "rwkv", "zamba2"]
VISION = ["convnext", "detr", "hiera", "resnet", "sam", "segformer", "swin", "swinv2"]
AUDIO = ["clap", "encodec", "speecht5", "wav2vec2", "whisper"]
SEVERAL_KINDS = ["blip-2", "clip", "flava", "kimi_k25", "llava", "udop"]
SPREAD = (
    *TEXT,
    *ROTARY,
    *TRUNCATED_NORMAL,
    *EXPERTS,
    *STATE_SPACE,
    *VISION,
    *AUDIO,
    *SEVERAL_KINDS,
)


@pytest.fixture(scope="module", autouse=True)
def one_thread_and_quiet():
    threads = torch.get_num_threads()
    pool.prepare()
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("model_type", SPREAD)
def test_an_architecture_equals_its_eager_twin(model_type):
    found = list(check.outcomes(model_type))
    assert found
    for outcome in found:
        assert outcome.status == EQUAL, outcome
        assert outcome.draws > 0, outcome
        assert outcome.undefined == 0, outcome


def test_the_spread_is_as_wide_as_promised():
    assert len(set(SPREAD)) >= 40
    assert set(SPREAD) <= set(catalog.model_types())


def compared(build):
    return check.compare(Outcome("a type", "a class", EQUAL), build)


def test_other_values_are_told(monkeypatch):
    materialize = lateinit.materialize
    monkeypatch.setattr(lateinit, "materialize", lambda m, **o: materialize(m, **o, seed=1))
    outcome = compared(lambda: nn.Linear(4, 4))
    assert outcome.status == DIFFERENT
    assert "weight: bits: 16 of 16 elements differ" in outcome.detail


def test_another_end_of_the_random_stream_is_told(monkeypatch):
    deferred = lateinit.deferred
    monkeypatch.setattr(lateinit, "deferred", lambda: deferred(advance_rng=False))
    outcome = compared(lambda: nn.Linear(4, 4))
    assert (outcome.status, outcome.detail) == (DIFFERENT, "the random generators end elsewhere")


def test_parts_that_differ_are_told(monkeypatch):
    materialize = lateinit.materialize

    def wrong_in_parts(model, only=None):
        return materialize(model, only=only, seed=1 if only else None)

    monkeypatch.setattr(lateinit, "materialize", wrong_in_parts)
    outcome = compared(lambda: nn.Sequential(*(nn.Linear(4, 4) for _ in range(4))))
    assert outcome.status == DIFFERENT
    assert outcome.detail.startswith("in parts: ")


def test_threads_that_differ_are_told(monkeypatch):
    work = scheduler._work

    def wrong(jobs, state):
        work([*jobs[:-1], dataclasses.replace(jobs[-1], after=jobs[-1].after + 1)], state)

    monkeypatch.setattr(scheduler, "_work", wrong)
    outcome = compared(lambda: nn.Linear(40, 40))
    assert outcome.status == DIFFERENT
    assert outcome.detail.startswith("by threads: 1: bias")


def test_memory_that_eager_leaves_unwritten_is_not_compared():
    class Unwritten(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.empty(100))
            self.bias = nn.Parameter(torch.zeros(100))

    outcome = compared(Unwritten)
    assert (outcome.status, outcome.undefined, outcome.tensors) == (EQUAL, 1, 2)


class Config(transformers.PreTrainedConfig):
    model_type = "made up"
    hidden_size: int = 64
    num_attention_heads: int = 4
    num_hidden_layers: int = 12
    vocab_size: int = 50_000


def test_what_only_fails_deferred_is_refused(monkeypatch):
    class Failing(nn.Module):
        def __init__(self, config):
            super().__init__()
            if writer.current() is not None:
                raise ValueError("not while recording")
            self.weight = nn.Parameter(torch.zeros(config.hidden_size))

    monkeypatch.setattr(catalog, "model_class", lambda *_: Failing)
    outcome = check.check("a type", "Failing", Config())
    assert (outcome.status, outcome.detail) == (REFUSED, "ValueError: not while recording")


def test_what_fails_eagerly_is_not_built(monkeypatch):
    class Failing(nn.Module):
        def __init__(self, config):
            raise ValueError("only for\nothers")

    monkeypatch.setattr(catalog, "model_class", lambda *_: Failing)
    outcome = check.check("a type", "Failing", Config())
    assert (outcome.status, outcome.detail) == (UNBUILT, "ValueError: only for others")


def test_a_configuration_is_made_small_and_keeps_its_ratios():
    small = shrunk(Config(), Recipe(8, 2))
    assert (small.hidden_size, small.num_attention_heads, small.num_hidden_layers) == (8, 4, 2)
    assert small.vocab_size < 1000


def some_fail(model_type):
    if model_type == "slow":
        time.sleep(60)
    if model_type == "crash":
        os._exit(1)
    yield Outcome(model_type, "Model", EQUAL)


def test_what_takes_too_long_or_crashes_does_not_stop_the_rest():
    types = ["a", "slow", "b", "crash", "c"]
    groups = pool.check_all(types, jobs=2, seconds=3.0, outcomes=some_fail)
    found = {outcome.model_type: outcome for group in groups for outcome in group}
    assert {name: outcome.status for name, outcome in found.items()} == {
        "a": EQUAL,
        "b": EQUAL,
        "c": EQUAL,
        "slow": pool.TIMEOUT,
        "crash": pool.CRASH,
    }


def test_a_run_goes_on_where_an_earlier_one_ended(monkeypatch, tmp_path, capsys):
    asked = []

    def check_all(types, jobs, seconds, threads):
        asked.append(list(types))
        yield from ([Outcome(t, "Model", EQUAL)] for t in types)

    monkeypatch.setattr(command, "check_all", check_all)
    paths = ["--state", str(tmp_path / "state.json"), "--table", str(tmp_path / "zoo.md")]
    assert command.main(["--only", "bert", *paths]) == 0
    assert command.main(["--only", "ber*", "--json", *paths]) == 0
    assert asked[0] == ["bert"]
    assert asked[1]
    assert "bert" not in asked[1]
    assert '"model_type": "bert"' in capsys.readouterr().out
    assert not (tmp_path / "zoo.md").exists()
    assert command.main(paths) == 0
    assert "`bert`" in (tmp_path / "zoo.md").read_text()


def test_the_page_lists_what_went_wrong_and_why():
    results = [
        Outcome("good", "Good", EQUAL, draws=3),
        Outcome("bad", "Bad", DIFFERENT, "weight: bits"),
        Outcome("absent", "", UNBUILT, "needs the package timm"),
    ]
    text = table.page(results)
    assert "3 architectures: 1 are equal to their eager twin, 1 are not, 1 cannot" in text
    assert "| `bad` | Bad | weight: bits |" in text
    assert "| `absent` |  | needs the package timm |" in text
