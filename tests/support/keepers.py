"""Where models and libraries keep tensors that are no parameters, and small models that do so.

A model here has `look`, which uses what it keeps with real data, and draws. Caches that outlive a
model are emptied by `forget`.
"""

from __future__ import annotations

import collections
import contextvars
import enum
import functools
import itertools
import math
import queue
import threading
import types
import weakref
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np
import torch
import torch.distributions as dist
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

X = torch.linspace(-1, 1, 15).view(3, 5)


# -- places: what keeps a tensor, and how it is found there ----------------------------------------


@dataclass
class Data:
    table: Tensor
    more: list[Tensor] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Frozen:
    table: Tensor


class Named(NamedTuple):
    name: str
    table: Tensor


class Slotted:
    __slots__ = ("table",)

    def __init__(self, table: Tensor) -> None:
        self.table = table


class Helper:
    """Computes more of what it keeps when it is first asked."""

    def __init__(self, table: Tensor) -> None:
        self.rows = [table[0], table[1:]]

    @functools.cached_property
    def table(self) -> Tensor:
        return torch.cat([self.rows[0][None], self.rows[1]])


class OfClass:
    table: ClassVar[Any] = None

    @classmethod
    def keep(cls, table: Tensor) -> type[OfClass]:
        cls.table = table
        return cls


class Local(threading.local):
    table: Any = None


class Mode(enum.Enum):
    TABLE = "table"


def closure(table: Tensor) -> Callable[[], Tensor]:
    return lambda: table


def default(table: Tensor) -> Callable[[], Tensor]:
    def get(table: Tensor = table) -> Tensor:
        return table

    return get


def generated(table: Tensor) -> Iterator[Tensor]:
    while True:
        yield table


def function_attribute(table: Tensor) -> Any:
    def function() -> None: ...

    function.table = table
    return function


def set_in(place: Any, table: Tensor) -> Any:
    place.table = table
    return place


def in_context(table: Tensor) -> contextvars.ContextVar[Tensor]:
    variable: contextvars.ContextVar[Tensor] = contextvars.ContextVar("table")
    variable.set(table)
    return variable


def queued(table: Tensor) -> queue.Queue[Tensor]:
    waiting: queue.Queue[Tensor] = queue.Queue()
    waiting.put(table)
    return waiting


def in_array(table: Tensor) -> np.ndarray[Any, Any]:
    array = np.empty(2, dtype=object)
    array[1] = table
    return array


class Weakly:
    """A strong reference where nothing looks, and weak ones to it."""

    def __init__(self, table: Tensor) -> None:
        self.held = iter([table])
        self.reference = weakref.ref(table)
        self.known: Any = weakref.WeakValueDictionary({"table": table})
        self.by_key: Any = weakref.WeakKeyDictionary({self: table})


def dot(name: str) -> Callable[[Any], Tensor]:
    return lambda kept: getattr(kept, name)


PLACES: dict[str, tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]]] = {
    "dataclass": (Data, dot("table")),
    "list of a dataclass": (lambda t: Data(t[:1], [t]), lambda kept: kept.more[0]),
    "frozen dataclass": (Frozen, dot("table")),
    "named tuple": (lambda t: Named("a", t), dot("table")),
    "slots": (Slotted, dot("table")),
    "helper": (Helper, dot("table")),
    "helper of helpers": (lambda t: Data(Slotted(t)), lambda kept: kept.table.table),
    "class": (OfClass.keep, dot("table")),
    "thread local": (lambda t: set_in(Local(), t), dot("table")),
    "closure": (closure, lambda kept: kept()),
    "default": (default, lambda kept: kept()),
    "partial": (lambda t: functools.partial(torch.mul, t), lambda kept: kept(torch.ones(()))),
    "method": (lambda t: t.mul, lambda kept: kept(torch.ones(()))),
    "generator": (generated, next),
    "iterator": (lambda t: itertools.cycle([t]), next),
    "function": (function_attribute, dot("table")),
    "context variable": (in_context, lambda kept: kept.get()),
    "queue": (queued, lambda kept: kept.queue[0]),
    "deque": (lambda t: collections.deque([t], maxlen=3), lambda kept: kept[0]),
    "default dictionary": (
        lambda t: collections.defaultdict(list, a=[t]),
        lambda kept: kept["a"][0],
    ),
    "dictionary by enum": (lambda t: {Mode.TABLE: (t,)}, lambda kept: kept[Mode.TABLE][0]),
    "user dictionary": (lambda t: collections.UserDict(a=t), lambda kept: kept["a"]),
    "chain of dictionaries": (lambda t: collections.ChainMap({}, {"a": t}), lambda kept: kept["a"]),
    "namespace": (lambda t: types.SimpleNamespace(table=t), dot("table")),
    "mapping proxy": (lambda t: types.MappingProxyType({"a": t}), lambda kept: kept["a"]),
    "array of objects": (in_array, lambda kept: kept[1]),
    "weak reference": (Weakly, lambda kept: kept.reference()),
    "weak values": (Weakly, lambda kept: kept.known["table"]),
    "weak keys": (Weakly, lambda kept: kept.by_key[kept]),
    "normal": (lambda t: dist.Normal(t, t.abs() + 1), lambda kept: kept.loc),
    "uniform": (lambda t: dist.Uniform(t, t + 2), lambda kept: kept.low),
    "independent": (lambda t: dist.Independent(dist.Normal(t, 1.0), 1), lambda kept: kept.mean),
    "categorical": (lambda t: dist.Categorical(logits=t), lambda kept: kept.probs),
    "multivariate": (
        lambda t: dist.MultivariateNormal(t, torch.eye(5)),
        lambda kept: kept.loc,
    ),
    "transform": (lambda t: dist.AffineTransform(t, 2.0), lambda kept: kept.loc),
    "module in a list": (lambda t: [nn.Module(), Data(t)], lambda kept: kept[1].table),
    "optimizer": (
        lambda t: torch.optim.SGD([nn.Parameter(torch.zeros(2))], lr=t[0, 0].abs()),
        lambda kept: kept.param_groups[0]["lr"] * torch.ones(3, 5),
    ),
}


def _holds(keep: Callable[[Tensor], Any], get: Callable[[Any], Tensor]) -> bool:
    given = torch.tensor(1.0)
    try:
        kept = keep(given)
    except (IndexError, ValueError, RuntimeError):  # it takes rows of the tensor
        return False
    # Distributions and transforms take numbers of one kind alone.
    return not type(kept).__module__.startswith("torch") and get(kept) is given


HOLDING = sorted(name for name, place in PLACES.items() if _holds(*place))
"""The places that give back the tensor that they were given, of whatever shape and dtype."""


class Keeping(nn.Module):
    """Two layers, between which a table is drawn and kept in some place."""

    def __init__(self, place: str, *, drawn: bool) -> None:
        super().__init__()
        keep, self.get = PLACES[place]
        self.first = nn.Linear(5, 4)
        self.kept = keep(torch.randn(3, 5) if drawn else torch.linspace(-2, 1, 15).view(3, 5))
        self.second = nn.Linear(4, 3)

    def look(self) -> list[Tensor]:
        table = self.get(self.kept)
        return [table * X, torch.rand(2), table + 1]

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x * self.get(self.kept)))


# -- caches, which models share --------------------------------------------------------------------


@functools.cache
def gaussian(size: int, sigma: float) -> Tensor:
    """A kernel as libraries of augmentation have it."""
    steps = torch.arange(size) - size // 2
    kernel = torch.exp(-(steps**2) / (2 * sigma**2))
    return kernel / kernel.sum()


@functools.cache
def wigner(order: int) -> Tensor:
    """Coefficients in double precision, as libraries of equivariant networks have them."""
    steps = torch.arange(2 * order + 1, dtype=torch.float64)
    return torch.linalg.qr(torch.outer(steps, steps) + torch.eye(2 * order + 1).double())[0]


@functools.cache
def directions(count: int) -> Tensor:
    """Drawn once for all that ask."""
    return F.normalize(torch.randn(count, 5), dim=-1)


GRIDS: dict[tuple[int, int], Tensor] = {}


def grid(height: int, width: int) -> Tensor:
    if (height, width) not in GRIDS:
        lines = torch.linspace(-1, 1, height), torch.linspace(-1, 1, width)
        GRIDS[height, width] = torch.stack(torch.meshgrid(*lines, indexing="ij"), -1)
    return GRIDS[height, width]


def forget() -> None:
    for cached in (gaussian, wigner, directions):
        cached.cache_clear()
    GRIDS.clear()
    Wiener.shared = None
    OfClass.table = None


class Styled(nn.Module):
    def look(self) -> Any:
        raise NotImplementedError


class Blur(Styled):
    """Augmentation: a cached kernel, bounds in a distribution, a parameter made of the cache."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("kernel", gaussian(5, 1.3), persistent=False)
        self.sharpen = nn.Parameter(gaussian(5, 0.7).clone())
        self.shift = dist.Uniform(torch.tensor(-0.3), torch.tensor(0.4), validate_args=False)
        self.flip = dist.Bernoulli(torch.tensor(0.5))
        self.mean = torch.tensor([0.1, 0.2, 0.3])

    def look(self) -> Any:
        amount = self.shift.sample((3,))
        picked = X[self.flip.sample((3,)).bool()]
        return amount, picked, self.flip.probs * X, gaussian(5, 1.3) + X, self.mean[:, None] - X

    def forward(self, x: Tensor) -> Tensor:
        weight = (self.kernel + self.sharpen)[None, None]
        return F.conv1d(x[:, None], weight, padding=2)[:, 0] + self.shift.sample()


class Camera(Styled):
    """Geometry: a cached grid, a rotation as a plain attribute, constants in a helper object."""

    def __init__(self) -> None:
        super().__init__()
        angle = torch.tensor(math.pi / 7)
        self.rotation = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()]).view(
            2, 2
        )
        self.helper = Data(torch.eye(2) * 2, [grid(3, 5)])
        self.head = nn.Linear(2, 3)

    def look(self) -> Any:
        rays = grid(3, 5) @ self.rotation
        inside = X[(rays.abs() < 0.5).all(-1)]
        return rays, inside, torch.linalg.inv(self.helper.table), self.helper.more[0].shape

    def forward(self, x: Tensor) -> Tensor:
        return self.head(grid(3, 5) @ self.rotation @ self.helper.table) * x[..., None]


class Process(Styled):
    """Gaussian process: bounds of constraints, a prior, a cached Cholesky factor."""

    def __init__(self) -> None:
        super().__init__()
        self.raw_scale = nn.Parameter(torch.zeros(5))
        self.bounds = types.SimpleNamespace(low=torch.tensor(1e-4), high=torch.tensor(2.0))
        self.prior = dist.Gamma(torch.tensor(3.0), torch.tensor(6.0))
        self.inducing = torch.randn(4, 5)
        self.cache: dict[str, Tensor] = {}

    def factor(self) -> Tensor:
        if "factor" not in self.cache:
            distance = torch.cdist(self.inducing, self.inducing)
            self.cache["factor"] = torch.linalg.cholesky((-distance).exp() + torch.eye(4) * 1e-3)
        return self.cache["factor"]

    def look(self) -> Any:
        if not self.bounds.low < self.bounds.high:
            raise ValueError("bounds")
        solved = torch.cholesky_solve(X.new_ones(4, 1), self.factor())
        return solved, self.prior.log_prob(torch.tensor(0.4)), self.prior.rsample()

    def forward(self, x: Tensor) -> Tensor:
        scale = self.raw_scale.sigmoid() * (self.bounds.high - self.bounds.low) + self.bounds.low
        return torch.cdist(x / scale, self.inducing) @ self.factor()


class Wiener(Styled):
    """Equivariant: coefficients in a cache and in a class attribute, cast where they are used."""

    shared: ClassVar[Any] = None

    def __init__(self) -> None:
        super().__init__()
        if Wiener.shared is None:
            Wiener.shared = wigner(1).float()
        self.register_buffer("mix", wigner(2).to(torch.float32))
        self.weight = nn.Parameter(torch.randn(5, 5))
        self.paths = [(1, wigner(1)), (2, wigner(2))]

    def look(self) -> Any:
        return [c.to(X.dtype) @ X[:, : 2 * n + 1].T for n, c in self.paths], self.shared @ X

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.mix @ self.weight @ wigner(2).to(x)


class Agent(Styled):
    """Reinforcement learning: exploration, replay memory, running statistics, bounds of actions."""

    def __init__(self) -> None:
        super().__init__()
        self.policy = nn.Linear(5, 2)
        self.noise = dist.Normal(torch.zeros(5, 2), torch.ones(5, 2) * 0.3)
        self.exploration = self.noise.rsample()
        self.memory = Data(torch.zeros(4, 5), [torch.zeros(4, dtype=torch.int64)])
        self.statistics = Slotted(torch.zeros(5))
        self.low, self.high = torch.full((2,), -1.0), torch.full((2,), 1.0)
        self.count = torch.tensor(0)

    def look(self) -> Any:
        at = int(self.count) % 4
        self.memory.table[at] = X[0]
        self.memory.more[0][at] = 7
        self.count += 1
        self.statistics.table.lerp_(X.mean(0), 0.3)
        batch = self.memory.table[torch.randint(0, int(self.count), (3,))]
        return batch, (X @ self.exploration).clamp(self.low, self.high), self.noise.sample()

    def forward(self, x: Tensor) -> Tensor:
        action = self.policy(x - self.statistics.table) + x @ self.exploration
        return torch.max(torch.min(action, self.high), self.low)


class Scheduler:
    """A noise scheduler: plain attributes of a plain object."""

    def __init__(self, steps: int) -> None:
        self.betas = torch.linspace(1e-4, 0.02, steps)
        self.alphas = torch.cumprod(1 - self.betas, 0)
        self.timesteps = torch.arange(steps).flip(0)

    def add_noise(self, x: Tensor, noise: Tensor, at: Tensor) -> Tensor:
        alphas = self.alphas.to(device=x.device, dtype=x.dtype)[at][:, None]
        return alphas**0.5 * x + (1 - alphas) ** 0.5 * noise


class Diffusion(Styled):
    """A scheduler that eager code also has, and a sampler with weights."""

    def __init__(self) -> None:
        super().__init__()
        self.scheduler = Scheduler(9)
        self.net = nn.Linear(5, 5)
        self.sampler = torch.utils.data.WeightedRandomSampler(torch.linspace(0, 1, 6).tolist(), 4)
        self.sampler.weights = torch.linspace(0, 1, 6)
        self.projections = directions(4)

    def look(self) -> Any:
        steps = [int(t) for t in self.scheduler.timesteps[:3]]
        noisy = self.scheduler.add_noise(X, torch.randn(3, 5), torch.tensor(steps))
        return noisy, list(self.sampler), steps, X @ self.projections.T, directions(4) @ X.T

    def forward(self, x: Tensor) -> Tensor:
        return self.net(self.scheduler.add_noise(x, x, torch.tensor([1, 2, 3]))) @ directions(4).T


STYLES = (Blur, Camera, Process, Wiener, Agent, Diffusion)
