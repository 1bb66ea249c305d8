"""Law 5 for modules that load in a way of their own: hooks, overrides, extra state."""

from __future__ import annotations

import copy
import random
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

import lateinit
from lateinit.errors import CheckpointError, ConstantChangedError, LateinitError
from tests.support.call_sequences import cast_saved
from tests.support.cases import Bag
from tests.support.formats import FORMATS
from tests.support.hook_programs import SAVED, Programmed, random_program
from tests.support.snapshots import assert_same, snapshot
from tests.support.twins import assert_untouched, still_deferred, twins

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

State = dict[str, torch.Tensor]


# -- modules with hooks and overrides --------------------------------------------------------------


class Fused(nn.Module):
    """Splits what older versions kept together, and renames."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(4, 4), nn.Linear(4, 4)
        self.scale = nn.Parameter(torch.ones(1))
        self._register_load_state_dict_pre_hook(self._split)

    def _split(self, state: dict[str, Any], prefix: str, *_: Any) -> None:
        for kind in ("weight", "bias"):
            fused = state.pop(f"{prefix}qk.{kind}", None)
            if fused is not None:
                state[f"{prefix}q.{kind}"], state[f"{prefix}k.{kind}"] = fused.chunk(2)
        if f"{prefix}gain" in state:
            state[f"{prefix}scale"] = state.pop(f"{prefix}gain")


class Squared(nn.Module):
    """Branches on a value while it loads, and keeps a note of it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3))
        self.loads = 0

    def _load_from_state_dict(self, state: Any, prefix: str, *rest: Any) -> None:
        self.loads += 1
        if state[f"{prefix}weight"].sum() > 0:
            state[f"{prefix}weight"] = state[f"{prefix}weight"] ** 2
        super()._load_from_state_dict(state, prefix, *rest)


class Replacing(nn.Module):
    """Puts the loaded tensor in the place of its own, as quantised layers do."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3))

    def _load_from_state_dict(self, state: Any, prefix: str, *_: Any) -> None:
        self.weight = nn.Parameter(state[f"{prefix}weight"].detach().clone())


class Counting(nn.Module):
    """Has an extra state, and a hook that runs after."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3))
        self.epoch, self.after = 0, 0
        self.register_load_state_dict_post_hook(self._note)

    @staticmethod
    def _note(module: Any, keys: Any) -> None:
        module.after += 1
        if "head" in keys.unexpected_keys:
            keys.unexpected_keys.remove("head")

    def get_extra_state(self) -> Any:
        return {"epoch": self.epoch, "seen": torch.tensor([self.epoch, 2])}

    def set_extra_state(self, state: Any) -> None:
        self.epoch = state["epoch"] + int(state["seen"][1])


class Tripling(nn.Module):
    """Has a hook that writes to what the checkpoint has, where it is."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(3)), nn.Parameter(torch.randn(3))
        self._register_load_state_dict_pre_hook(lambda state, *_: state["a"].mul_(3))


class Doubling(nn.Module):
    """Changes what it has loaded, as soon as it has, and loads it into a second part, too."""

    def __init__(self, twice: bool) -> None:
        super().__init__()
        self.a, self.b = (nn.Linear(3, 3, bias=False) for _ in range(2))
        self.a.register_load_state_dict_post_hook(self._double)
        if twice:
            self._register_load_state_dict_pre_hook(self._again)

    @staticmethod
    def _double(module: Any, _: Any) -> None:
        module.weight.data.mul_(2)

    @staticmethod
    def _again(state: dict[str, Any], prefix: str, *_: Any) -> None:
        state[f"{prefix}b.weight"] = state[f"{prefix}a.weight"]


SHARED = torch.randn(3, 3)
OWN_WAYS: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "split and renamed": (
        Fused,
        {"qk.weight": torch.randn(8, 4), "qk.bias": torch.randn(8), "gain": torch.ones(1) * 3},
    ),
    "branching": (Squared, {"weight": torch.arange(3.0)}),
    "replacing": (Replacing, {"weight": torch.arange(3.0)}),
    "writing": (Tripling, {"a": torch.arange(3.0), "b": torch.ones(3)}),
    "changing one of two": (lambda: Doubling(twice=True), {"a.weight": torch.randn(3, 3)}),
    "changing what is shared": (
        lambda: Doubling(twice=False),
        {"a.weight": SHARED, "b.weight": SHARED},
    ),
    "a scalar from a list": (
        lambda: Bag(weight=nn.Parameter(torch.randn(()))),
        {"weight": torch.ones(1)},
    ),
    "batch norm before version 2": (
        lambda: nn.BatchNorm1d(2),
        {n: torch.full((2,), 2.0) for n in ("weight", "bias", "running_mean", "running_var")},
    ),
    "a parametrisation": (
        lambda: nn.utils.parametrizations.weight_norm(nn.Linear(3, 3)),
        {"bias": torch.ones(3), "weight_g": torch.ones(3, 1), "weight_v": torch.randn(3, 3)},
    ),
}


@pytest.mark.parametrize("format_", ["safetensors", "pt", "dcp"])
@pytest.mark.parametrize("name", OWN_WAYS)
def test_a_module_that_loads_in_its_own_way_does(name: str, format_: str, tmp_path: Path) -> None:
    build, state = OWN_WAYS[name]
    path = FORMATS[format_](state, tmp_path)
    eager, model = twins(build)
    real, _ = twins(build)
    eager.load_state_dict(copy.deepcopy(state))
    report = lateinit.load_checkpoint(model, path)
    assert_same(eager, model)
    lateinit.load_checkpoint(real, path)
    assert_same(eager, real)
    assert not report.unexpected


@pytest.mark.parametrize("format_", ["pt", "dcp"])
def test_extra_state_and_hooks_are_honoured(format_: str, tmp_path: Path) -> None:
    source = Counting()
    source.epoch = 5
    state = {**source.state_dict(), "head": torch.ones(1)}
    eager, model = twins(Counting)
    eager.load_state_dict(copy.deepcopy(state))
    lateinit.load_checkpoint(model, FORMATS[format_](state, tmp_path))
    assert eager.epoch == model.epoch == 7
    assert_same(eager, model)


def test_a_hook_that_fails_is_told_before_anything_changes(tmp_path: Path) -> None:
    class Failing(Squared):
        def _load_from_state_dict(self, *_: Any) -> None:
            raise KeyError("no such thing")

    eager, model = twins(Failing)
    with pytest.raises(LateinitError, match=r"Failing cannot load .*no such thing"):
        lateinit.load_checkpoint(model, FORMATS["safetensors"]({"weight": torch.ones(3)}, tmp_path))
    assert_untouched(eager, model)


# -- hooks that compute with values ----------------------------------------------------------------


class Hooked(nn.Module):
    """Two layers and a table that is not saved, with hooks before and after loading."""

    def __init__(self, before: Any = None, after: Any = None) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)
        self.register_buffer("table", torch.randn(3), persistent=False)
        self.register_buffer("count", torch.tensor(4))
        self.note = torch.ones(3)
        self.notes = [torch.zeros(2)]
        if before is not None:
            self.register_load_state_dict_pre_hook(before)
        if after is not None:
            self.register_load_state_dict_post_hook(after)


def scaled_by_a_value(module: Any, _: Any) -> None:
    scale = module.a.weight.abs().max().item()
    module.b.weight.data /= scale
    module.scale = scale


def cached(module: Any, _: Any) -> None:
    module.norm = module.a.weight.detach().norm()
    module.total = module.a.bias.detach() + module.table


def branching_on_what_is_not_saved(module: Any, state: State, prefix: str, *_: Any) -> None:
    if module.table.sum() > 100 or module.a.weight[0, 0].item() == 100:
        state.pop(f"{prefix}a.weight")
    state[f"{prefix}a.bias"] = state[f"{prefix}a.bias"] + module.table


def counting(module: Any, *_: Any) -> None:
    module.note.add_(1)
    module.notes[0] += 2
    module.table *= 2


def drawing(module: Any, state: State, prefix: str, *_: Any) -> None:
    state[f"{prefix}a.bias"] = torch.randn(3)
    module.draw = torch.rand(2)


def asking_where(module: Any, state: State, prefix: str, *_: Any) -> None:
    made = torch.full((3,), 7.0, device=state[f"{prefix}a.weight"].device)
    state[f"{prefix}a.bias"] = made.to(module.b.bias.device)
    assert not state[f"{prefix}a.weight"].is_meta
    assert module.b.weight.is_cpu
    assert module.b.weight.get_device() == -1


def keeping(module: Any, state: State, prefix: str, *_: Any) -> None:
    module.kept = state[f"{prefix}a.weight"]
    module.b.bias = nn.Parameter(state.pop(f"{prefix}b.bias"))
    state[f"{prefix}b.bias"] = module.b.bias


def copying_by_hand(module: Any, state: State, prefix: str, *_: Any) -> None:
    module.a.weight.data.copy_(state[f"{prefix}a.weight"])
    module.a.weight.data.mul_(2)
    with torch.no_grad():
        module.a.bias.copy_(module.b.bias)
    state[f"{prefix}a.weight"] = module.a.weight.detach() + 1
    buffer = torch.empty(3)
    buffer.copy_(state[f"{prefix}b.bias"])
    state[f"{prefix}b.bias"] = buffer * 2


def telling_ties_by_address(module: Any, state: State, prefix: str, *_: Any) -> None:
    one, other = (state[f"{prefix}{name}.bias"].untyped_storage() for name in "ab")
    if one.data_ptr() != other.data_ptr():
        state[f"{prefix}a.bias"] = state[f"{prefix}a.bias"] * 2


def keeping_its_own(module: Any, state: State, prefix: str, *_: Any) -> None:
    state[f"{prefix}count"] = module.count
    state[f"{prefix}a.weight"] = module.a.weight


def setting_data(module: Any, _: Any) -> None:
    module.a.weight.data = F.normalize(module.a.weight.data, dim=0)
    module.b.weight = nn.Parameter(module.b.weight.detach().t().contiguous())


BEFORE = [
    branching_on_what_is_not_saved,
    counting,
    drawing,
    asking_where,
    keeping,
    copying_by_hand,
    telling_ties_by_address,
    keeping_its_own,
]
AFTER = [scaled_by_a_value, cached, counting, setting_data]
HOOKS = {
    **{f"before: {hook.__name__}": {"before": hook} for hook in BEFORE},
    **{f"after: {hook.__name__}": {"after": hook} for hook in AFTER},
    "both": {"before": copying_by_hand, "after": scaled_by_a_value},
}


@pytest.mark.parametrize("part", ["root", "inner"])
@pytest.mark.parametrize("strict", [True, False], ids=["whole", "in part"])
@pytest.mark.parametrize("name", HOOKS)
def test_hooks_see_the_values_that_they_always_see(
    name: str, strict: bool, part: str, tmp_path: Path
) -> None:
    def build() -> nn.Module:
        hooked = Hooked(**HOOKS[name])
        return hooked if part == "root" else nn.Sequential(nn.Linear(2, 2), hooked)

    torch.manual_seed(5)
    state = {k: v + 1 for k, v in build().state_dict().items()}
    if not strict:
        del state["b.weight" if part == "root" else "1.b.weight"]
    path = tmp_path / "weights.safetensors"
    save_file(state, path)
    eager, model = twins(build)
    real, _ = twins(build)
    for twin, loaded in ((eager, None), (eager, model), (eager, real)):
        torch.manual_seed(9)
        if loaded is None:
            twin.load_state_dict(load_file(path), strict=strict)
            after = torch.get_rng_state()
        else:
            lateinit.load_checkpoint(loaded, path, strict=strict)
            assert torch.equal(torch.get_rng_state(), after)
            assert_same(twin, loaded)


def test_names_that_share_memory_in_a_file_share_it_for_hooks(tmp_path: Path) -> None:
    class Writing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = (nn.Parameter(torch.randn(3)) for _ in range(3))
            self._register_load_state_dict_pre_hook(lambda state, *_: state["a"].mul_(3))

    whole = torch.arange(6.0)
    path = tmp_path / "weights.pt"
    torch.save({"a": whole[:3], "b": whole[1:4], "c": whole[:3]}, path)
    eager, model = twins(Writing)
    real, _ = twins(Writing)
    eager.load_state_dict(torch.load(path))
    assert eager.b.tolist() == [3, 6, 3]
    for loaded in (model, real):
        lateinit.load_checkpoint(loaded, path)
        assert_same(eager, loaded)
    again = torch.load(path)
    assert again["a"].tolist() == [0, 1, 2]


def test_a_name_that_was_left_out_of_a_file_shares_memory_for_hooks(tmp_path: Path) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Parameter(torch.randn(3))
            self.b = self.a
            self._register_load_state_dict_pre_hook(lambda state, *_: state["b"].mul_(3))

    source, model = twins(Tied)
    lateinit.save_checkpoint(source, tmp_path / "saved.safetensors")
    lateinit.load_checkpoint(model, tmp_path / "saved.safetensors")
    assert torch.equal(model.a, source.a * 3)
    assert model.a is model.b


def test_a_cast_is_what_hooks_see(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    save_file({k: v + 1 for k, v in Hooked().state_dict().items()}, path)
    eager, model = twins(lambda: Hooked(branching_on_what_is_not_saved, scaled_by_a_value))
    cast_saved(eager, torch.bfloat16)
    eager.load_state_dict(load_file(path))
    lateinit.load_checkpoint(model, path, dtype=torch.bfloat16)
    assert_same(eager, model)


def test_the_hook_of_a_model_that_was_materialised_in_part_sees_it(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    save_file({k: v + 1 for k, v in Hooked().state_dict().items()}, path)
    eager, model = twins(lambda: Hooked(copying_by_hand, cached))
    lateinit.materialize(model, only=["a.*", "table"])
    eager.load_state_dict(load_file(path))
    lateinit.load_checkpoint(model, path)
    assert_same(eager, model)


def test_views_share_memory_for_hooks(tmp_path: Path) -> None:
    class Views(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            whole = torch.randn(6)
            self.low, self.high = nn.Parameter(whole[:4]), nn.Parameter(whole[3:])
            self.register_load_state_dict_post_hook(self._spread)

        @staticmethod
        def _spread(module: Any, _: Any) -> None:
            module.low.data[3] *= 5
            module.sum = module.high.sum().item()

    path = tmp_path / "weights.safetensors"
    save_file({"high": torch.arange(3.0)}, path)
    eager, model = twins(Views)
    eager.load_state_dict(load_file(path), strict=False)
    lateinit.load_checkpoint(model, path, strict=False)
    assert_same(eager, model)


def test_a_hook_that_wants_the_values_of_what_has_no_shape_is_told_so(tmp_path: Path) -> None:
    class Lazy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = lateinit.nn.LazyLinear(2)
            self.register_load_state_dict_pre_hook(
                lambda module, state, *_: state.update(mean=module.layer.weight.mean())
            )

    model = lateinit.deferred_init(Lazy)
    path = FORMATS["safetensors"](nn.Sequential(nn.Linear(3, 2)).state_dict(), tmp_path)
    with pytest.raises(CheckpointError, match=r"layer\.weight .*shape is not known yet"):
        lateinit.load_checkpoint(model, path, strict=False)
    assert lateinit.nn.LazyLinear is type(model.layer)


def test_a_value_that_is_written_to_after_it_was_loaded_is_what_it_was(tmp_path: Path) -> None:
    class Changing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Parameter(torch.randn(3))

        def _load_from_state_dict(self, state: Any, *_: Any) -> None:
            value = state["a"] * 2
            with torch.no_grad():
                self.a.copy_(value)
                value.zero_()
            self.sum = self.a.sum().item()

    eager, model = twins(Changing)
    state = {"a": torch.ones(3)}
    lateinit.load_checkpoint(model, FORMATS["safetensors"](state, tmp_path))
    eager.load_state_dict(state)
    assert_same(eager, model)


@pytest.mark.parametrize("wanted", ["not saved", "missing"])
def test_outside_data_that_changed_are_told_before_anything_is_loaded(
    wanted: str, tmp_path: Path
) -> None:
    table = torch.randn(200, 200)

    class Lookup(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(2, 2)
            self.register_buffer(
                "table", torch.zeros(200, 200) + table, persistent=wanted == "missing"
            )

    model = lateinit.deferred_init(Lookup)
    path = FORMATS["safetensors"](nn.ModuleDict({"first": nn.Linear(2, 2)}).state_dict(), tmp_path)
    table.add_(1)
    with pytest.raises(ConstantChangedError, match=r"'table'.*changed in place"):
        lateinit.load_checkpoint(model, path, strict=False)
    assert set(still_deferred(model)) == {"first.weight", "first.bias", "table"}
    whole = FORMATS["pt"](
        {"table": table, **{f"first.{k}": v for k, v in nn.Linear(2, 2).state_dict().items()}},
        tmp_path,
    )
    if wanted == "missing":
        lateinit.load_checkpoint(model, whole)
        assert torch.equal(model.table, table)


# -- random hooks ----------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(300))
def test_random_hooks_see_and_do_what_they_always_do(seed: int, tmp_path: Path) -> None:
    rng = random.Random(seed)
    program = random_program(rng)
    torch.manual_seed(seed)
    whole, state = torch.randn(6), {name: torch.randn(4) for name in SAVED}
    if rng.random() < 0.5:  # names of a file that share memory
        state["bias"], state["buffer"] = whole[:4], whole[1:5]
    if program.tied:
        state["b.weight"] = state["a.weight"]
    state = {name: value for name, value in state.items() if rng.random() < 0.9}
    state["bias"] = state.get("bias", whole[:4])
    path = tmp_path / "weights.pt"
    torch.save(state, path)
    eager, model = twins(lambda: Programmed(program))
    real, _ = twins(lambda: Programmed(program))
    if rng.random() < 0.3:
        lateinit.materialize(model, only=rng.choice(["*weight", "bias", "table", "buffer"]))
    torch.manual_seed(1)
    before = snapshot(eager)
    try:
        eager.load_state_dict(torch.load(path), strict=False)
    except RuntimeError:  # a copy between tensors that overlap
        for loaded in (model, real):
            with pytest.raises(LateinitError):
                lateinit.load_checkpoint(loaded, path, strict=False)
        assert_same(before, real)
        return
    after = torch.get_rng_state()
    for loaded in (model, real):
        torch.manual_seed(1)
        lateinit.load_checkpoint(loaded, path, strict=False)
        assert_same(eager, loaded)
        assert torch.equal(torch.get_rng_state(), after)
