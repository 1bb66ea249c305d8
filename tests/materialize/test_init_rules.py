"""``init=`` in detail: what a rule may be, what it draws, and what is refused."""

from __future__ import annotations

import functools
import pickle
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import lateinit
from lateinit import init
from lateinit.errors import DeferredTensorError, InitError, PatternError
from tests.support.rules import apply_rules, start_of, state_after
from tests.support.snapshots import assert_same

SEED = 3


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.up = nn.Linear(6, 6)
        self.conv = nn.Conv1d(4, 4, 3)
        self.norm = nn.BatchNorm1d(6)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("scale", self.up.weight.detach() * 2)
        self.register_buffer("rope", torch.rand(3), persistent=False)


def net() -> Net:
    torch.manual_seed(SEED)
    return lateinit.deferred_init(Net)


def eager(**rules: Any) -> nn.Module:
    torch.manual_seed(SEED)
    model = Net()
    return apply_rules(
        model, {k.replace("__", "."): v for k, v in rules.items()}, state_after(SEED)
    )


def scaled(tensor: Tensor) -> Tensor:
    return tensor.mul_(torch.rand_like(tensor))


def by_hand(tensor: Tensor) -> None:
    with torch.no_grad():
        tensor.copy_(torch.arange(float(tensor.numel())).view_as(tensor))
        tensor[0] = torch.randn(tensor.shape[1])


ACCEPTED: dict[str, tuple[Any, Any]] = {
    "a name": ("zeros", nn.init.zeros_),
    "a name of torch's": ("xavier_uniform_", nn.init.xavier_uniform_),
    "a call": ("normal(std=0.5)", functools.partial(nn.init.normal_, std=0.5)),
    "data": (init.normal(1, 0.5), functools.partial(nn.init.normal_, mean=1, std=0.5)),
    "torch's function": (nn.init.kaiming_uniform_, nn.init.kaiming_uniform_),
    "a partial": (functools.partial(nn.init.constant_, val=3), lambda t: nn.init.constant_(t, 3)),
    "a redraw": (
        init.trunc_normal(std=2.0, a=-1, b=1),
        lambda t: nn.init.trunc_normal_(t, 0, 2.0, -1, 1),
    ),
    "orthogonal": (init.orthogonal(gain=2), functools.partial(nn.init.orthogonal_, gain=2)),
    "sparse": (init.sparse(0.3), functools.partial(nn.init.sparse_, sparsity=0.3)),
    "eye": (init.eye(), nn.init.eye_),
    "of the old value": (scaled, scaled),
    "by hand": (by_hand, by_hand),
    "no change": (lambda _: None, lambda _: None),
}


@pytest.mark.parametrize("case", sorted(ACCEPTED))
def test_a_rule_gives_what_the_initialiser_gives_after_construction(case: str) -> None:
    given, same = ACCEPTED[case]
    rules = {"up.weight": given}
    assert_same(eager(up__weight=same), lateinit.materialize(net(), init=rules))


def test_every_initialiser_of_torch_is_there_as_data() -> None:
    torchs = {n.removesuffix("_") for n in vars(nn.init) if n.endswith("_") and n[0] != "_"}
    assert torchs == set(init.__all__) - {"Initialiser"}
    for name in sorted(set(init.__all__) - {"Initialiser", "constant", "sparse"}):
        assert getattr(init, name)() == init.Initialiser(name)
    rule = init.trunc_normal(std=0.02, a=-1.0)
    assert repr(rule) == "trunc_normal(std=0.02, a=-1.0)"
    assert pickle.loads(pickle.dumps(rule)) == rule
    assert hash(rule) == hash(init.trunc_normal(0.0, 0.02, -1.0))


def test_dirac_and_ties_and_buffers() -> None:
    rules = {"conv.weight": "dirac", "head": "normal", "norm.running_var": "zeros"}
    expected = eager(
        conv__weight=nn.init.dirac_, embed__weight=nn.init.normal_, norm__running_var=nn.init.zeros_
    )
    model = lateinit.materialize(net(), init=rules)
    assert_same(expected, model)
    assert model.head.weight is model.embed.weight


def test_what_was_derived_from_the_old_value_keeps_it() -> None:
    torch.manual_seed(SEED)
    plain, model = Net(), lateinit.materialize(net(), init={"up.weight": "zeros"})
    assert not model.up.weight.any()
    assert torch.equal(model.scale, plain.scale)


def test_a_pattern_is_for_the_parameters_among_what_it_matches() -> None:
    torch.manual_seed(SEED)
    plain, model = Net(), lateinit.materialize(net(), init={"": "zeros"})
    assert not any(p.any() for p in model.parameters())
    for name, buffer in plain.named_buffers():
        assert torch.equal(buffer, model.get_buffer(name)), name
    assert not lateinit.materialize(net(), init={"rope": "zeros"}).rope.any()


def test_torchtitans_dictionaries_are_taken() -> None:
    linear = {"weight": functools.partial(nn.init.trunc_normal_, std=0.02), "bias": nn.init.zeros_}
    given = {
        "up": linear,
        "head": linear,
        "norm": {"weight": nn.init.ones_, "bias": lambda _: None},
    }
    expected = eager(
        up__weight=linear["weight"], up__bias=nn.init.zeros_, embed__weight=linear["weight"]
    )
    assert_same(expected, lateinit.materialize(net(), init=given))
    with pytest.raises(PatternError, match=r"'up\.gain' matches no tensor"):
        lateinit.materialize(net(), init={"up": {"gain": "ones"}})


def test_rules_are_independent_of_each_other_and_of_the_target() -> None:
    rules = {"up.*": "normal", "embed": "normal", "conv": "uniform"}
    whole = lateinit.materialize(net(), init=rules)
    alone = lateinit.materialize(net(), init={"up.weight": "normal"})
    assert torch.equal(whole.up.weight, alone.up.weight)
    part = net()
    lateinit.materialize(part.up, init={"*": "normal"})
    assert torch.equal(whole.up.weight, part.up.weight)
    assert torch.equal(whole.up.bias, part.up.bias)


def test_no_word_is_drawn_twice() -> None:
    model = lateinit.materialize(net(), init={"*": lambda t: t.data.random_(2**24)})
    words = torch.cat([p.detach().flatten() for p in model.parameters()])
    assert len(words.unique()) == len(words)


def test_two_models_of_one_block_draw_different_words() -> None:
    torch.manual_seed(SEED)
    with lateinit.deferred():
        twins = [nn.Linear(4, 4), nn.Linear(4, 4)]
    first, second = lateinit.materialize(twins, init={"*": "normal"})
    assert not torch.equal(first.weight, second.weight)


def test_the_states_that_rules_start_in_do_not_change_between_releases() -> None:
    generator = torch.Generator()
    generator.set_state(start_of(state_after(0), "weight"))
    torch.manual_seed(0)
    layer = lateinit.deferred_init(nn.Linear, 3, 2)
    lateinit.materialize(layer, init={"weight": "uniform"})
    assert torch.equal(layer.weight, torch.empty(2, 3).uniform_(generator=generator))


def test_windows_of_one_storage_have_rules_of_their_own() -> None:
    def build() -> nn.Module:
        module = nn.Module()
        whole = torch.randn(6, 4)
        module.q, module.k, module.v = (nn.Parameter(part) for part in whole.chunk(3))
        return module

    model = lateinit.deferred_init(build)
    lateinit.materialize(model, init={"q": "ones", "k": "normal", "v": "normal"})
    assert model.q.eq(1).all()
    assert not torch.equal(model.k, model.v)
    assert model.q.untyped_storage().data_ptr() == model.v.untyped_storage().data_ptr()


def test_a_cast_comes_after_the_rule() -> None:
    model = lateinit.materialize(net(), init={"up": "normal"}, dtype=torch.bfloat16)
    assert torch.equal(
        model.up.weight, lateinit.materialize(net(), init={"up": "normal"}).up.weight.bfloat16()
    )


def test_plans_and_summaries_show_rules_and_change_nothing() -> None:
    model, generator = net(), torch.get_rng_state()
    rules = {"up.weight": init.normal(std=0.02), "norm.bias": scaled}
    shown = str(
        lateinit.plan(model, init=rules, dtype={"*": torch.bfloat16, "norm": torch.float32})
    )
    assert "normal_(%" in shown
    assert "up.weight: float32 -> bfloat16, by normal(std=0.02)" in shown
    assert "norm.bias: float32 -> float32, by scaled" in shown
    assert "rope: float32, left alone: a buffer that is not saved: name it" in shown
    assert "embed.weight, head.weight: float32 -> bfloat16" in shown
    table = str(lateinit.summary(model, init=rules))
    assert "normal(std=0.02)" in table
    assert torch.equal(generator, torch.get_rng_state())
    torch.manual_seed(SEED)
    assert_same(Net(), lateinit.materialize(model))


def test_dead_initialisations_are_not_computed() -> None:
    plan = str(lateinit.plan(net(), only="conv.weight", init={"conv.weight": "zeros"}))
    assert plan.startswith("1 step, 1 of")


def test_a_rule_initialises_what_a_checkpoint_lacks_and_nothing_else(tmp_path: Any) -> None:
    torch.manual_seed(9)
    source = Net()
    state = {n: t.clone() for n, t in source.state_dict().items() if not n.startswith("up.")}
    state.pop("head.weight")
    save_file(state, tmp_path / "a.safetensors")
    model, before = net(), torch.get_rng_state()
    lateinit.load_checkpoint(
        model, tmp_path / "a.safetensors", strict=False, init={"*.weight": "normal"}
    )
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(model.embed.weight, source.embed.weight)
    assert torch.equal(
        model.up.weight, lateinit.materialize(net(), init={"up": "normal"}).up.weight
    )
    torch.manual_seed(SEED)
    assert torch.equal(model.up.bias, Net().up.bias)
    with pytest.raises(PatternError, match="'nothing' matches no tensor"):
        lateinit.load_checkpoint(net(), tmp_path / "a.safetensors", init={"nothing": "zeros"})


def test_rules_hold_for_what_a_load_hook_reads(tmp_path: Any) -> None:
    class Reading(nn.Linear):
        def _load_from_state_dict(self, *args: Any) -> None:
            super()._load_from_state_dict(*args)
            self.read = self.bias.detach().clone()  # as fully_shard's hook reads every shard

    torch.save({"weight": torch.ones(2, 3)}, tmp_path / "a.pt")
    model = lateinit.deferred_init(Reading, 3, 2)
    path = tmp_path / "a.pt"
    lateinit.load_checkpoint(model, path, strict=False, init={"": "zeros"})
    assert torch.equal(model.weight, torch.ones(2, 3))
    assert not model.bias.any()
    assert not model.read.any()


def test_rules_are_honoured_by_streamed_saves(tmp_path: Any) -> None:
    rules = {"up.*": "normal", "head": scaled}
    lateinit.save_checkpoint(net(), tmp_path / "a.safetensors", init=rules, seed=8)
    torch.manual_seed(8)
    expected = lateinit.materialize(lateinit.deferred_init(Net), init=rules).state_dict()
    for name, tensor in load_file(tmp_path / "a.safetensors").items():
        assert torch.equal(tensor, expected[name]), name


def test_another_rule_is_another_save(tmp_path: Any) -> None:
    from lateinit._checkpoint.save import collect, divide, fingerprint

    def digest(rules: Any) -> str:
        return fingerprint(divide(collect(net(), init=rules), None, "a"), {}, None)

    assert len({digest(None), digest({"up": "zeros"}), digest({"up": "ones"})}) == 3
    assert digest({"up": "normal"}) == digest({"up.*": nn.init.normal_})


GENERATOR = torch.Generator()
WRONG: dict[str, tuple[Any, Any, str]] = {
    "an unknown name": ({"up": "normol"}, InitError, r"'normol' is no initialiser.*normal"),
    "wrong arguments": (
        {"up": "normal(sdt=1)"},
        InitError,
        r"unexpected keyword argument 'sdt'; it takes",
    ),
    "too few": ({"up": "constant"}, InitError, r"missing a required argument: 'val'"),
    "no literal": ({"up": "normal(std=x)"}, InitError, r"'normal\(std=x\)' is no initialiser"),
    "no call": ({"up": "1 +"}, InitError, r"'1 \+' is no initialiser"),
    "a number": (
        {"up": 0.5},
        InitError,
        r"init=\{'up': \.\.\.\}: 0\.5 is no initialiser: give one",
    ),
    "nothing": ({"up": None}, InitError, "None is no initialiser"),
    "a class": ({"up": nn.Linear}, InitError, "is no initialiser"),
    "a generator": (
        {"up": functools.partial(nn.init.normal_, generator=GENERATOR)},
        InitError,
        "a generator of its own; leave generator= out",
    ),
    "a hidden generator": (
        {"up": lambda t: t.normal_(generator=GENERATOR)},
        InitError,
        r"<lambda> for 'up\.weight' \(6, 6\): it draws from another generator",
    ),
    "a seed": ({"up": lambda t: torch.manual_seed(0) and t.normal_()}, InitError, "or seeds it"),
    "too few dims": (
        {"up": nn.init.xavier_normal_},
        InitError,
        r"xavier_normal\(\) for 'up\.bias' \(6,\): Value",
    ),
    "an error": ({"up.bias": lambda t: t + "a"}, InitError, r"'up\.bias' \(6,\): TypeError"),
    "a result": ({"up.bias": torch.zeros_like}, InitError, "it returned another tensor"),
    "a list": (["up"], TypeError, "a mapping from names or globs to initialisers"),
    "a string": ("zeros", TypeError, "a mapping from names or globs to initialisers"),
    "a key": ({3: "zeros"}, TypeError, r"init=\{3: \.\.\.\}: a name of a tensor"),
    "empty": ({}, PatternError, r"init=\{\}: a map without a pattern"),
    "no match": ({"down": "zeros"}, PatternError, "'down' matches no tensor"),
    "two rules": ({"u*": "zeros", "*p.bias": "ones"}, PatternError, r"say zeros\(\) and ones\(\)"),
    "a tie": (
        {"head": "zeros", "embed": "ones"},
        PatternError,
        r"'embed\.weight' and 'head\.weight' are",
    ),
}


@pytest.mark.parametrize("case", sorted(WRONG))
def test_a_wrong_rule_is_refused_before_anything_changes(case: str) -> None:
    given, kind, message = WRONG[case]
    model, before, own = net(), torch.get_rng_state(), GENERATOR.get_state()
    with pytest.raises(kind, match=message):
        lateinit.materialize(model, init=given)
    assert all(p.is_meta for p in model.parameters())
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(own, GENERATOR.get_state())
    torch.manual_seed(SEED)
    assert_same(Net(), lateinit.materialize(model))


def test_a_rule_that_uses_another_deferred_tensor_is_refused() -> None:
    model = net()
    with pytest.raises(InitError, match=r"the deferred tensor 'up\.weight' .* is used"):
        lateinit.materialize(model, init={"up.bias": lambda t: t.copy_(model.up.weight[0])})
    torch.manual_seed(SEED)
    assert_same(Net(), lateinit.materialize(model))


def test_a_rule_that_puts_data_in_place_is_refused() -> None:
    def put(tensor: Tensor) -> None:
        tensor.data = torch.zeros(6)

    with pytest.raises(InitError, match=r"'up\.bias' \(6,\): it put another tensor"):
        lateinit.materialize(net(), init={"up.bias": put})


def test_memory_that_is_real_already_is_not_changed_by_a_rule() -> None:
    def build() -> nn.Module:
        module = nn.Module()
        whole = torch.randn(6)
        module.low, module.high = nn.Parameter(whole[:4]), nn.Parameter(whole[2:])
        return module

    model = lateinit.deferred_init(build)
    lateinit.materialize(model, only="low")
    with pytest.raises(DeferredTensorError, match=r"init=: 'high' shares its memory with a tensor"):
        lateinit.materialize(model, init={"high": "zeros"})


def test_what_is_real_already_is_left_alone_and_the_plan_says_so() -> None:
    model = lateinit.materialize(net(), only="up.weight")
    kept = model.up.weight.clone()
    assert "up.weight: real already, left alone by zeros()" in str(
        lateinit.plan(model, init={"up": "zeros"})
    )
    lateinit.materialize(model, init={"up": "zeros"})
    assert torch.equal(model.up.weight, kept)
    assert not model.up.bias.any()


def test_pickled_models_take_rules() -> None:
    model = pickle.loads(pickle.dumps(net()))
    expected = lateinit.materialize(net(), init={"up": "normal"})
    assert_same(expected, lateinit.materialize(model, init={"up": "normal"}))


class Transposed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.enc = nn.Parameter(torch.rand(4, 6))
        self.dec = nn.Parameter(self.enc.detach().t())
        self.other = nn.Parameter(torch.rand(3))


@pytest.mark.parametrize("only", ["dec", "enc", "other"])
@pytest.mark.parametrize(
    "init", [{"*": "normal"}, {"dec": "ones"}, {"enc": "normal", "dec": "uniform"}], ids=str
)
def test_rules_for_windows_on_one_storage_act_whichever_window_is_asked_for(
    init: dict[str, Any], only: str
) -> None:
    def made(**options: Any) -> torch.Tensor:
        torch.manual_seed(0)
        model = lateinit.deferred_init(Transposed)
        return getattr(lateinit.materialize(model, init=init, **options), only)

    assert torch.equal(made(only=only), made())
