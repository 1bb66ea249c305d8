"""Public calls to interrupt (see ``interrupts``): one small model for each that lateinit has."""

from __future__ import annotations

import copy
import io
import itertools
import shutil
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

import lateinit
from lateinit.nn import LazyBatchNorm1d, LazyLinear
from tests.support.interrupts import Scenario
from tests.support.snapshots import assert_same, tensors_of

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

SEED = 3


class Net(nn.Module):
    """Layers, a random table that is read, memory that numpy sees, ties and views."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 7)
        self.norm = nn.BatchNorm1d(7)
        self.second = nn.Linear(7, 5, bias=False)
        nn.init.trunc_normal_(self.second.weight, std=0.7, a=-1.0, b=0.5)
        self.tied = self.first.weight
        self.low = nn.Parameter(torch.randn(3, 3, dtype=torch.bfloat16))
        table = torch.linspace(0, 1, 6)
        self.register_buffer("table", table, persistent=False)
        self.view = table[2:]
        self.steps = [value.item() for value in table]
        array = table.numpy()
        array[0] = 3.0
        with torch.no_grad():
            self.first.bias.mul_(2)


class Shared(nn.Module):
    """Several tensors on one storage, in two parameters, a buffer and an attribute."""

    def __init__(self) -> None:
        super().__init__()
        whole = torch.randn(4, 3)
        self.a, self.b = nn.Parameter(whole[:2]), nn.Parameter(whole[2:])
        self.register_buffer("whole", whole)
        self.t = whole.t()
        self.other = nn.Linear(3, 2)


def eager(build: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(SEED)
    return build()


def deferred(build: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(SEED)
    with lateinit.deferred():
        return build()


def block(build: Callable[[], nn.Module]) -> nn.Module:
    with lateinit.deferred():
        return build()


def nested(build: Callable[[], nn.Module]) -> nn.Module:
    with lateinit.deferred():
        inner = lateinit.deferred_init(build)
        with lateinit.deferred():
            return inner


def is_eager(build: Callable[[], nn.Module]) -> Callable[[Any, Any], None]:
    """The model, and the random state after it, are what eager construction gives."""

    def check(_: Any, made: nn.Module) -> None:
        after = torch.get_rng_state()
        twin = eager(build)
        assert torch.equal(after, torch.get_rng_state())
        assert_same(twin, lateinit.materialize(made))

    return check


def recording(
    name: str, make: Callable[[Any], nn.Module], build: Any, check: Any = None
) -> Scenario:
    def prepare() -> Any:
        torch.manual_seed(SEED)
        return build

    return Scenario(name, prepare, make, check or is_eager(build))


class Held:
    """A deferred model, and whoever else holds its tensors: an optimizer, hooks, a list."""

    def __init__(self, build: Callable[[], nn.Module]) -> None:
        self.build = build
        self.model = deferred(build)
        self.tensors = tensors_of(self.model)
        self.fired: list[str] = []
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.SGD(self.parameters, lr=0.1)
        for number, parameter in enumerate(self.parameters):
            parameter.register_hook(lambda _, n=number: self.fired.append(f"grad {n}"))
            parameter.register_post_accumulate_grad_hook(
                lambda _, n=number: self.fired.append(f"accumulated {n}")
            )

    def check(self, _: Any = None, made: Any = None, *, whole: bool = True) -> None:
        if whole:
            lateinit.materialize(self.model)
        twin = eager(self.build)
        assert_same(twin, self.model)
        assert all(
            a is b for (_, a), (_, b) in zip(self.tensors, tensors_of(self.model), strict=True)
        )
        loss = sum(p.float().square().sum() for p in self.parameters)
        loss.backward()
        expected = [
            f"{kind} {n}" for n in range(len(self.parameters)) for kind in ("grad", "accumulated")
        ]
        assert sorted(self.fired) == sorted(expected), self.fired
        self.optimizer.step()
        optimizer = torch.optim.SGD([p for p in twin.parameters() if p.requires_grad], lr=0.1)
        sum(p.float().square().sum() for p in twin.parameters()).backward()
        optimizer.step()
        assert_same(twin, self.model)


def materialising(name: str, build: Any, call: Any, check: Any = None) -> Scenario:
    return Scenario(name, lambda: Held(build), call, check or (lambda held, made: held.check()))


def cast_check(held: Held, _: Any) -> None:
    lateinit.materialize(held.model)
    twin = eager(held.build)
    cast = {id(tensor) for tensor in twin.state_dict(keep_vars=True).values()}
    for (path, expected), (_, found) in zip(tensors_of(twin), tensors_of(held.model), strict=True):
        floats = expected.is_floating_point() and id(expected) in cast
        assert torch.equal(expected.bfloat16() if floats else expected, found), path


def follow_ups(held: Held) -> list[Any]:
    model = held.model
    with torch.no_grad():
        copied = copy.deepcopy(model)
    return [copied, model.first.weight.t(), model.first.weight + model.first.weight]


def pickled(held: Held) -> Any:
    file = io.BytesIO()
    torch.save(held.model.first, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def without_hooks(build: Any) -> Held:
    held = Held(build)
    for parameter in held.parameters:
        parameter._backward_hooks = parameter._post_accumulate_grad_hooks = None
    return held


def check_pickled(held: Held, made: Any) -> None:
    assert_same(eager(held.build).first, lateinit.materialize(made))


def other_state(build: Any) -> dict[str, torch.Tensor]:
    torch.manual_seed(77)
    return copy.deepcopy(build().state_dict())


def loading_state_dict(held: Held) -> None:
    held.model.load_state_dict(other_state_of(held.build))


def other_state_of(build: Any) -> dict[str, torch.Tensor]:
    state = torch.get_rng_state()
    try:
        return other_state(build)
    finally:
        torch.set_rng_state(state)


def check_loaded(build: Any, names: Any = None) -> Callable[[Any, Any], None]:
    def check(held: Held, _: Any) -> None:
        lateinit.materialize(held.model)
        twin = eager(build)
        state = other_state(build)
        kept = {name: t for name, t in state.items() if names is None or name in names}
        twin.load_state_dict(kept, strict=False)
        assert_same(twin, held.model)
        assert all(
            a is b for (_, a), (_, b) in zip(held.tensors, tensors_of(held.model), strict=True)
        )

    return check


class Hooked(nn.Module):
    """Loads under other names, and counts it."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 7)
        self.second = nn.Linear(7, 5)
        self.register_load_state_dict_pre_hook(self.rename)

    @staticmethod
    def rename(module: nn.Module, state: Any, prefix: str, *_: Any) -> None:
        for name in [n for n in state if n.endswith("kernel")]:
            state[name.replace("kernel", "weight")] = state.pop(name) * 2


class Files:
    """Checkpoints and models on disk, for one scenario each time."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._numbers = itertools.count()

    def new(self, suffix: str = "") -> Path:
        return self.folder / f"{next(self._numbers)}{suffix}"


def scenarios(folder: Path) -> list[Scenario]:
    files = Files(folder)
    found = [
        recording("block", block, Net),
        recording("deferred_init", lateinit.deferred_init, Net),
        recording("nested", nested, Shared),
        recording("without_advance", without_advance, Net, check_standing),
        recording("skip_init", skipping, nn.BatchNorm1d, check_skipped),
        materialising("materialize", Net, lambda held: lateinit.materialize(held.model)),
        materialising("only", Net, lambda held: lateinit.materialize(held.model, only="first.*")),
        materialising("shared", Shared, lambda held: lateinit.materialize(held.model)),
        materialising("part_of_shared", Shared, lambda held: lateinit.materialize(held.model.a)),
        materialising(
            "cast",
            Net,
            lambda held: lateinit.materialize(held.model, dtype=torch.bfloat16, device="cpu"),
            cast_check,
        ),
        Scenario("threads", lambda: Held(large), threaded, lambda held, _: held.check()),
        Scenario("follow", lambda: without_hooks(Net), follow_ups, check_follow),
        Scenario("pickle", lambda: without_hooks(Net), pickled, check_pickled),
        Scenario("load_state_dict", lambda: Held(Net), loading_state_dict, check_loaded(Net)),
        Scenario("copy_", lambda: Held(Shared), copying, check_copied),
    ]
    found += loads(files)
    found += saves(files)
    found += shapes()
    return found


def check_follow(held: Held, made: Any) -> None:
    twin = eager(held.build)
    weight = twin.first.weight
    lateinit.materialize(made)
    assert_same(copy.deepcopy(twin), made[0])
    assert torch.equal(weight.t(), made[1])
    assert torch.equal(weight + weight, made[2])
    assert_same(twin, lateinit.materialize(held.model))


def without_advance(build: Any) -> nn.Module:
    with lateinit.deferred(advance_rng=False):
        return build()


def check_standing(build: Any, made: nn.Module) -> None:
    assert torch.initial_seed() == SEED
    assert torch.equal(torch.get_rng_state(), torch.Generator().manual_seed(SEED).get_state())
    assert_same(eager(build), lateinit.materialize(made))


def skipping(build: Any) -> nn.Module:
    return lateinit.skip_init(build, 3)


def check_skipped(_: Any, made: nn.Module) -> None:
    assert torch.equal(made.running_var, torch.ones(3))
    assert not made.weight.is_meta


def large() -> nn.Module:
    return nn.Sequential(nn.Linear(512, 520), nn.Linear(300, 512))


def threaded(held: Held) -> Any:
    return lateinit.materialize(held.model, threads=2)


def copying(held: Held) -> None:
    with torch.no_grad():
        held.model.a.copy_(torch.full((2, 3), 2.0))
        held.model.other.weight.copy_(torch.full((2, 3), 3.0))


def check_copied(held: Held, _: Any) -> None:
    twin = eager(held.build)
    with torch.no_grad():
        twin.a.copy_(torch.full((2, 3), 2.0))
        twin.other.weight.copy_(torch.full((2, 3), 3.0))
    assert_same(twin, lateinit.materialize(held.model))


# -- checkpoints -----------------------------------------------------------------------------------


def loads(files: Files) -> list[Scenario]:
    torch.manual_seed(77)
    other = Net()
    whole, part = files.new(".safetensors"), files.new(".safetensors")
    lateinit.save_checkpoint(other, whole)
    some = {
        n: t.clone() for n, t in other.state_dict().items() if n.startswith("first") or n == "low"
    }
    save_file(some, part)
    pt = files.new(".pt")
    torch.save(other.state_dict(), pt)
    dcp = files.new()
    save_dcp(other.state_dict(), dcp)
    torch.manual_seed(77)
    hooked = {
        n.replace("weight", "kernel"): t / 2 if n.endswith("weight") else t
        for n, t in Hooked().state_dict().items()
    }
    renamed = files.new(".safetensors")
    save_file({n: t.clone() for n, t in hooked.items()}, renamed)
    torch.manual_seed(77)
    lazy = files.new(".safetensors")
    save_file(lazy_net(False).state_dict(), lazy)
    torch.manual_seed(77)
    shared = files.new(".safetensors")
    save_file({"a": Shared().a.detach().clone()}, shared)

    def load(path: Path, **options: Any) -> Callable[[Held], Any]:
        return lambda held: lateinit.load_checkpoint(held.model, path, **options)

    return [
        Scenario("load", lambda: Held(Net), load(whole), check_loaded(Net)),
        Scenario(
            "load_part", lambda: Held(Net), load(part, strict=False), check_loaded(Net, set(some))
        ),
        Scenario("load_pt", lambda: Held(Net), load(pt), check_loaded(Net)),
        Scenario("load_dcp", lambda: Held(Net), load(dcp), check_loaded(Net)),
        Scenario("load_hooked", lambda: Held(Hooked), load(renamed), check_loaded(Hooked)),
        Scenario(
            "load_shared",
            lambda: Held(Shared),
            load(shared, strict=False),
            check_loaded(Shared, {"a"}),
        ),
        Scenario(
            "load_lazy",
            lambda: Lazily(deferred),
            lambda lazily: lateinit.load_checkpoint(lazily.model, lazy),
            check_lazy_loaded,
        ),
        Scenario(
            "load_cast",
            lambda: Held(Hooked),
            load(renamed, dtype=torch.bfloat16),
            check_cast_load,
        ),
    ]


def check_cast_load(held: Held, _: Any) -> None:
    lateinit.materialize(held.model)
    for name, value in other_state(Hooked).items():
        assert torch.equal(held.model.state_dict()[name], value.bfloat16()), name


def save_dcp(state: Any, path: Path) -> None:
    import warnings

    from torch.distributed import checkpoint

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        checkpoint.save(state, checkpoint_id=path)


def saves(files: Files) -> list[Scenario]:
    def prepare(suffix: str) -> Callable[[], Any]:
        return lambda: (deferred(tower), files.new(suffix))

    def save(given: Any) -> Any:
        model, path = given
        return lateinit.save_checkpoint(model, path, max_shard_size=300)

    def resume(given: Any) -> Any:
        model, path = given
        return lateinit.save_checkpoint(model, path, max_shard_size=300, resume=True)

    def check(given: Any, _: Any) -> None:
        model, path = given
        state = eager(tower).state_dict()
        parts = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
        saved = {name: t for part in parts for name, t in load_file(part).items()}
        assert saved.keys() == state.keys()
        assert all(torch.equal(saved[name], state[name]) for name in state)
        assert [p.name for p in path.parent.iterdir() if path.name in p.name] == [path.name]
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        assert_same(eager(tower), lateinit.materialize(model))

    return [
        Scenario("save", prepare(""), save, check),
        Scenario("save_file", prepare(".safetensors"), save, check),
        Scenario("save_resumed", prepare(""), resume, check),
    ]


def tower() -> nn.Module:
    return nn.Sequential(*(nn.Linear(8, 8) for _ in range(3)))


# -- shapes ----------------------------------------------------------------------------------------


class LazyNet(nn.Module):
    def __init__(self, lazy: bool) -> None:
        super().__init__()
        self.first = LazyLinear(7) if lazy else nn.Linear(5, 7)
        self.norm = LazyBatchNorm1d() if lazy else nn.BatchNorm1d(7)
        self.last = nn.Linear(7, 3)
        self.calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return self.last(self.norm(self.first(x)))


def lazy_net(lazy: bool) -> nn.Module:
    return LazyNet(lazy)


class Lazily:
    def __init__(self, build: Callable[..., nn.Module]) -> None:
        self.model = build(lambda: lazy_net(True))
        self.modules = list(self.model.modules())
        self.tensors = list(self.model.parameters())
        self.optimizer = torch.optim.SGD([self.model.first.weight], lr=0.1)


def check_lazy_loaded(lazily: Lazily, _: Any) -> None:
    twin = eager(lambda: lazy_net(False))
    torch.manual_seed(77)
    twin.load_state_dict(lazy_net(False).state_dict())
    assert_same(twin, lateinit.materialize(lazily.model))
    assert all(a is b for a, b in zip(lazily.tensors, lazily.model.parameters(), strict=True))


def shapes() -> list[Scenario]:
    def infer(real: bool) -> Callable[[Lazily], Any]:
        example = torch.ones(2, 5) if real else torch.ones(2, 5, device="meta")
        return lambda lazily: lateinit.infer_shapes(lazily.model, example, real=real)

    def check(lazily: Lazily, left: list[str]) -> None:
        assert left == []
        assert_same(eager(lambda: lazy_net(False)), lateinit.materialize(lazily.model))
        assert all(a is b for a, b in zip(lazily.tensors, lazily.model.parameters(), strict=True))
        assert lazily.modules == list(lazily.model.modules())

    def check_eager(lazily: Lazily, left: list[str]) -> None:
        # Drawn now, after the layers that are not lazy, as a first forward pass would do it.
        torch.manual_seed(SEED)
        twin = lazy_net(True)
        twin(torch.ones(2, 5))
        for name, value in lazily.model.state_dict().items():
            if not name.startswith("norm.running") and not name.endswith("tracked"):
                assert torch.equal(value, twin.state_dict()[name]), name

    return [
        Scenario("infer_shapes", lambda: Lazily(deferred), infer(False), check),
        Scenario("infer_shapes_real", lambda: Lazily(deferred), infer(True), check),
        Scenario("infer_shapes_now", lambda: Lazily(eager), infer(False), check_eager, draws=True),
        recording("declare_lazy", block_of_lazy, lambda: None, check_declared),
    ]


def block_of_lazy(_: Any) -> nn.Module:
    with lateinit.deferred():
        return lazy_net(True)


def check_declared(_: Any, model: nn.Module) -> None:
    lateinit.infer_shapes(model, torch.ones(2, 5, device="meta"))
    assert_same(eager(lambda: lazy_net(False)), lateinit.materialize(model))
