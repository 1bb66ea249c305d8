"""Models of many small modules, and models whose constructors compute: what deferring costs.

Here eager construction is quick, so that what is ours shows. Seconds are those of the processor in
one thread, since other programs on the machine disturb these less.
"""

from __future__ import annotations

import functools
import json
import sys
import time
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm
from torch.overrides import TorchFunctionMode

import lateinit
from benchmarks.contenders import deferred, eager, materialized, meta
from benchmarks.harness import Goal, Row, Run, alternate, assert_equal, in_process

if TYPE_CHECKING:
    from collections.abc import Callable


class ConvolutionNorm(nn.Sequential):
    """A small convolution and its batch norm, of which mobile networks have hundreds."""

    def __init__(self, inputs: int, outputs: int, size: int, groups: int = 1) -> None:
        super().__init__(
            nn.Conv2d(inputs, outputs, size, padding=size // 2, groups=groups, bias=False),
            nn.BatchNorm2d(outputs),
        )


class Mobile(nn.Module):
    """A network of inverted residuals (Sandler et al., 2018), as vision libraries build it."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.features = nn.Sequential(
            *(
                nn.Sequential(
                    ConvolutionNorm(24, 40, 1), ConvolutionNorm(40, 40, 3, 40), nn.Conv2d(40, 24, 1)
                )
                for _ in range(blocks)
            )
        )
        self.head = nn.Linear(24, 10)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.BatchNorm2d):
                nn.init.ones_(module.weight)
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, 0, 0.01)
                nn.init.zeros_(module.bias)


class Scheduler(nn.Module):
    """Noise levels of a diffusion process, each a buffer without dims."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        for step in range(steps):
            beta = torch.tensor(1e-4 + 0.02 * step / steps)
            self.register_buffer(f"alpha_{step}", 1 - beta)


class Experts(nn.Module):
    """Unfused experts: thousands of matrices."""

    def __init__(self, experts: int, width: int = 20) -> None:
        super().__init__()
        self.experts = nn.ModuleList(
            nn.ModuleDict(
                {name: nn.Linear(width, width, bias=False) for name in ("gate", "up", "down")}
            )
            for _ in range(experts)
        )
        self.apply(self._initialise)

    def _initialise(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            module.weight.data.normal_(mean=0.0, std=0.02)


class Flow(nn.Module):
    """A residual flow: linear layers under weight norm, whose norms a constructor computes."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.blocks = nn.Sequential(
            *(
                nn.Sequential(
                    weight_norm(nn.Linear(6, 20)), nn.ELU(), weight_norm(nn.Linear(20, 6))
                )
                for _ in range(blocks)
            )
        )


class Kernel(nn.Module):
    """A radial basis function kernel, with its widths and its Gram matrix on a fixed grid."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.widths = 2.0 ** (torch.arange(count) - count // 2)
        grid = torch.linspace(-1, 1, 20)[:, None]
        distance = torch.cdist(grid, grid) ** 2
        gram = torch.exp(-distance[None] / (2 * self.widths[:, None, None] ** 2)).sum(0)
        self.register_buffer("gram", gram)
        self.register_buffer("inverse", torch.linalg.inv(gram + torch.eye(20)))


@functools.cache
def compiled() -> Callable[[torch.Tensor, float], torch.Tensor]:
    """An initialiser that TorchScript has compiled."""

    def scaled(weight: torch.Tensor, gain: float) -> torch.Tensor:
        weight = torch.randn_like(weight) * gain
        return weight / weight.norm(2, 1, True)

    script: Callable[[torch.Tensor, float], torch.Tensor] = torch.jit.script(scaled)
    return script


class Compiled(nn.Module):
    """A layer whose initial values a compiled function computes."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(compiled()(torch.empty(20, 12), 0.5))


MODELS: dict[str, Callable[[int], nn.Module]] = {
    "mobile": Mobile,
    "scheduler": Scheduler,
    "experts": Experts,
    "flow": Flow,
    "kernel": Kernel,
    "compiled": lambda _: Compiled(),
    "linear": lambda width: nn.Linear(width, width),
}
SIZES = {"mobile": 120, "scheduler": 1000, "experts": 2000, "flow": 10, "kernel": 5, "linear": 16}
REPEATS = {"kernel": 20, "compiled": 20, "linear": 100}  # one takes less than a clock's noise
COMPUTING = ("flow", "kernel", "compiled")  # the first call may import what computes on meta
ROUNDS = 5
AGAINST_META, AGAINST_EAGER, BUILD, BUILD_SMALLEST = Goal(1.4), Goal(1.8), Goal(2.4), Goal(4.0)


class Empty(TorchFunctionMode):
    """A function mode that does nothing: the least that hearing every call costs."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return func(*args, **kwargs) if kwargs else func(*args)


def heard(make: Callable[[], nn.Module]) -> nn.Module:
    with Empty():
        return eager(make)


def seeded_meta(make: Callable[[], nn.Module]) -> nn.Module:
    return eager(lambda: meta(make))  # seeded as the others, which takes as long as a small layer


def maker(name: str, run: Run, times: int = 1) -> Callable[[], nn.Module]:
    size = 3 if run.tiny else times * SIZES.get(name, 1)
    return lambda: MODELS[name](size)


def small_modules(name: str) -> Callable[[Run], list[Row]]:
    """A case: one model, described and built in all ways."""

    def case(run: Run) -> list[Row]:
        make = maker(name, run)
        expected = eager(make)
        after = torch.get_rng_state()
        found = materialized(make)
        assert torch.equal(after, torch.get_rng_state()), "the random state ends elsewhere"
        assert_equal(expected, found)
        ways = {"eager": eager, "heard": heard, "meta": seeded_meta, "describe": deferred}
        seconds = on_one_thread(name, run, {**ways, "build": materialized}, make)
        described, built = seconds["describe"], seconds["build"]
        goal = BUILD_SMALLEST if name == "linear" else BUILD
        against = "eager, an empty function mode"
        rows = [
            Row(name, "describe", described, "meta", seconds["meta"], goal=AGAINST_META),
            Row(name, "describe", described, "eager", seconds["eager"], goal=AGAINST_EAGER),
            Row(name, "describe", described, against, seconds["heard"]),
            Row(name, "build", built, "eager", seconds["eager"], goal=goal, equal=True),
        ]
        return [*rows, *first_call(name, run)] if name in COMPUTING else rows

    return case


def on_one_thread(
    name: str,
    run: Run,
    ways: dict[str, Callable[[Callable[[], nn.Module]], nn.Module]],
    make: Callable[[], nn.Module],
) -> dict[str, list[float]]:
    """The seconds of the processor that each way takes for one model."""
    repeats = 1 if run.tiny else REPEATS.get(name, 1)

    def repeated(way: Callable[[Callable[[], nn.Module]], nn.Module]) -> Callable[[], None]:
        def call() -> None:
            for _ in range(repeats):
                way(make)

        return call

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        calls = {key: repeated(way) for key, way in ways.items()}
        found = alternate(calls, run.times(ROUNDS), clock=time.process_time)
    finally:
        torch.set_num_threads(threads)
    return {key: [s / repeats for s in seconds] for key, seconds in found.items()}


def first_call(name: str, run: Run) -> list[Row]:
    """The first model of a process: what it imports counts."""
    size = ["tiny"] if run.tiny else []
    seconds = {
        way: [in_process("benchmarks.small_modules", name, way, *size)["seconds"]]
        for way in ("describe", "eager", "meta")
    }
    ours = seconds.pop("describe")
    return [Row(name, "describe, first call", ours, way, theirs) for way, theirs in seconds.items()]


def growth(run: Run) -> list[Row]:
    """What a tensor costs is the same in a model of four times as many."""
    ways: dict[str, Callable[[], nn.Module]] = {
        key: lambda times=times: deferred(maker("experts", run, times))  # type: ignore[misc]
        for key, times in (("a quarter", 1), ("all", 4))
    }
    found = alternate(ways, run.times(), clock=time.process_time)
    each = [s / 4 for s in found["all"]]
    what = "describe, a quarter of 4 x as many"
    return [Row("experts", what, each, "as many", found["a quarter"], goal=Goal(1.2))]


def main(name: str, way: str, *size: str) -> None:
    if name == "compiled":
        compiled()  # compiling is no part of building
    make = maker(name, Run(tiny=bool(size)))
    started = time.process_time()
    {"describe": lateinit.deferred_init, "eager": eager, "meta": meta}[way](make)
    json.dump({"seconds": time.process_time() - started}, sys.stdout)


if __name__ == "__main__":
    main(*sys.argv[1:])
