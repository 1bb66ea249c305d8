"""Models and twins for sequences of public calls: `tests.test_call_sequences` is the machine."""

from __future__ import annotations

import re
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.distributions import Uniform

import lateinit
from lateinit._tensors.walk import is_placeholder
from lateinit.errors import LateinitError
from tests.support.building import EAGER_POISON, LATE_POISON, poison
from tests.support.lazy_models import Layers
from tests.support.snapshots import assert_same, bits, significant, tensors_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

# -- the models: no size is a power of two, and each takes an example of its own -------------------


class Helper:
    """A plain object with tensors, which `materialize(model)` neither casts nor moves."""

    def __init__(self) -> None:
        self.table = torch.linspace(-1, 3, 5) / 7
        self.noise = torch.randn(3)
        # It would read what is drawn after a lazy layer.
        self.bounds = Uniform(torch.randn(2) - 9, torch.full((2,), 9.0), validate_args=False)
        self.recent = deque([torch.rand(4)])

    def tensors(self) -> list[torch.Tensor]:
        return [self.table, self.noise, self.bounds.low, self.bounds.high, *self.recent]


class Tied(nn.Module):
    """A tie, a counter, and a buffer that no checkpoint has."""

    def __init__(self, *, lazy: bool) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 6)
        self.mix = nn.Linear(6, 6)
        self.norm = nn.BatchNorm1d(6)
        self.head = nn.Linear(6, 7, bias=False)
        self.head.weight = self.embed.weight
        nn.init.trunc_normal_(self.mix.weight, std=0.02)
        self.register_buffer("angles", torch.arange(6) / 7, persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.mix(x)) * self.angles.to(x.dtype))

    @staticmethod
    def example() -> torch.Tensor:
        return torch.linspace(-1, 1, 18).view(3, 6)


class Aliased(nn.Module):
    """Views of parameters, kept as buffers, as attributes and in a list."""

    def __init__(self, *, lazy: bool) -> None:
        super().__init__()
        self.packed = nn.Parameter(torch.empty(9, 5))
        query, key, value = self.packed.detach().chunk(3)
        nn.init.xavier_uniform_(query)
        nn.init.normal_(key)
        value.fill_(0.3)
        self.register_buffer("across", self.packed.data.view(5, 9))
        self.tail = self.packed.data[4:]
        self.a = nn.Parameter(torch.ones(10))
        self.register_buffer("b", self.a.data.view(2, 5), persistent=False)
        self.parts = [torch.randn(3), self.a.data[2:7]]
        self.norm = nn.BatchNorm1d(9)
        self.norm(torch.arange(18.0).view(2, 9))  # which it counts
        self.helper = Helper()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(x @ self.packed.T) * self.a[:9]

    @staticmethod
    def example() -> torch.Tensor:
        return torch.linspace(-1, 1, 15).view(3, 5)


class Dtypes(nn.Module):
    """Several dtypes, one of them a view of another one's bytes."""

    def __init__(self, *, lazy: bool) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 6)
        self.narrow = nn.Parameter(torch.randn(11).bfloat16())
        self.precise = nn.Parameter(torch.randn(3, 3, dtype=torch.float64))
        self.register_buffer("order", torch.randperm(6))
        self.register_buffer("mask", torch.rand(6) < 0.4)
        self.bits = self.layer.weight.data.view(torch.int32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)[:, self.order % 6] * self.mask

    @staticmethod
    def example() -> torch.Tensor:
        return torch.linspace(-1, 1, 15).view(3, 5)


class LazyMiddle(nn.Module):
    """A size that follows from the input, and draws after it."""

    def __init__(self, *, lazy: bool) -> None:
        super().__init__()
        of = Layers(lazy=lazy)
        self.first = nn.Linear(5, 6)
        self.middle = of.Linear(6, 7)
        self.norm = nn.BatchNorm1d(7)
        self.drop = nn.Dropout(0.3)
        self.last = nn.Linear(7, 3)
        self.register_buffer("noise", torch.randn(7), persistent=False)
        self.scale = nn.Parameter(torch.randn(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.middle(self.first(x).relu())) + self.noise.to(x.dtype)
        return self.last(self.drop(x)) * self.scale

    @staticmethod
    def example() -> torch.Tensor:
        return torch.linspace(-1, 1, 15).view(3, 5)


class LazyAliased(nn.Module):
    """Lazy layers among views, a list, a plain object, and a counter that steers a batch norm."""

    def __init__(self, *, lazy: bool) -> None:
        super().__init__()
        of = Layers(lazy=lazy)
        self.a = nn.Parameter(torch.ones(10))
        self.register_buffer("b", self.a.data.view(2, 5))
        self.first = nn.Conv1d(3, 5, 1)
        self.conv = of.Conv1d(5, 6, 3)
        self.norm = of.BatchNorm1d(6, momentum=None)
        self.parts = [torch.randn(3), self.first.weight.data[1:3]]
        self.tail = of.Linear(18, 3)
        self.helper = Helper()
        self.out = nn.Linear(3, 5)
        self.tied = nn.Linear(3, 5, bias=False)
        self.tied.weight = self.out.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.conv(self.first(x))).flatten(1)
        return self.out(self.tail(x)) * self.b[1]

    @staticmethod
    def example() -> torch.Tensor:
        return torch.linspace(-1, 1, 30).view(2, 3, 5)


MODELS: tuple[Any, ...] = (Tied, Aliased, Dtypes, LazyMiddle, LazyAliased)


# -- a deferred model and its eager twin -----------------------------------------------------------


@dataclass(slots=True)
class Side:
    """One of the two: a model, and what was made of it and kept by the sequence."""

    model: nn.Module
    held: list[torch.Tensor] = field(default_factory=list)
    optimizer: torch.optim.Optimizer | None = None

    def all(self) -> nn.Module:
        """Everything that there is to compare, as one module."""
        whole = nn.Module()
        whole.model = self.model
        whole.held = self.held
        helpers = [h for m in self.model.modules() if (h := vars(m).get("helper"))]
        whole.helpers = [helper.tensors() for helper in helpers]
        return whole

    def tensors(self) -> dict[str, torch.Tensor]:
        return dict(tensors_of(self.all()))


@dataclass(slots=True)
class Pair:
    twin: Side
    late: Side

    @property
    def lazy(self) -> list[str]:
        """The names of what has no shape yet."""
        return [n for n, p in self.late.model.named_parameters() if is_placeholder(p)] + [
            n for n, b in self.late.model.named_buffers() if is_placeholder(b)
        ]

    def deferred(self) -> dict[str, torch.Tensor]:
        found = self.late.tensors().items()
        for _, tensor in found:
            tensor.device  # noqa: B018 - one whose memory is real by now is real once it is asked
        return {p: t for p, t in found if not is_placeholder(t) and lateinit.is_deferred(t)}

    def example(self) -> torch.Tensor:
        """An input in the dtype of the twin's first floating-point parameter."""
        dtype = next(p.dtype for p in self.twin.model.parameters() if p.is_floating_point())
        return self.twin.model.example().to(dtype)

    def runs(self) -> bool:
        """Whether the twin has a forward pass, as it is now: mixed dtypes may leave it none."""
        state = torch.get_rng_state()
        kept = {name: value.clone() for name, value in self.twin.model.named_buffers()}
        with torch.no_grad():
            try:
                self.twin.model(self.example())
            except RuntimeError:
                return False
            finally:
                torch.set_rng_state(state)
                for name, value in self.twin.model.named_buffers():
                    value.copy_(kept[name])
        return True

    def finish(self) -> None:
        """Whatever the calls were: the rest is materialised, and is what the twin has."""
        state = torch.get_rng_state()
        if self.lazy and self.runs():
            assert lateinit.infer_shapes(self.late.model, self.example().to("meta")) == []
        elif self.lazy:
            known = self.twin.model.state_dict()
            self.late.model.load_state_dict({n: known[n] for n in self.lazy}, strict=False)
        self.agree()
        lateinit.materialize(self.late.model)
        for tensor in self.late.tensors().values():
            lateinit.materialize(tensor)
        assert torch.equal(state, torch.get_rng_state())
        assert_same(self.twin.all(), self.late.all())

    def agree(self) -> None:
        """What can be seen by now is what the twin has."""
        expected, found = self.twin.tensors(), self.late.tensors()
        assert expected.keys() == found.keys()
        deferred = False
        for path, tensor in found.items():
            if is_placeholder(tensor):
                continue
            facts = [_facts(t) for t in (expected[path], tensor)]
            assert facts[0] == facts[1], f"{path}: expected {facts[0]}, found {facts[1]}"
            if lateinit.is_deferred(tensor):
                deferred = True
                continue
            values = [bits(path, t) for t in (expected[path], tensor)]
            assert values[0] == values[1], f"{path}: expected {expected[path]}, found {tensor}"
        assert lateinit.is_deferred(self.late.all()) == deferred

    def objects(self) -> list[tuple[str, int, int]]:
        """The parameter objects of both sides; kept alive, so that no other has their id."""
        sides = [dict(s.model.named_parameters(remove_duplicate=False)) for s in self.sides]
        assert sides[0].keys() == sides[1].keys()
        return [(name, id(sides[0][name]), id(sides[1][name])) for name in sides[0]]

    @property
    def sides(self) -> tuple[Side, Side]:
        return self.twin, self.late


def _facts(tensor: torch.Tensor) -> tuple[Any, ...]:
    return (
        isinstance(tensor, nn.Parameter),
        tuple(tensor.shape),
        tensor.dtype,
        significant(tensor),
        tensor.requires_grad,
        tensor.is_leaf,
    )


def twins(build: Callable[..., nn.Module], seed: int | None = None) -> Pair:
    """A pair from one random state. After a lazy model it is the twin's: see docs/lazy.md."""
    if seed is not None:
        torch.manual_seed(seed)
    before = torch.get_rng_state()
    poison(EAGER_POISON)
    twin = build(lazy=False)
    ended = torch.get_rng_state()
    torch.set_rng_state(before)
    poison(LATE_POISON)
    late = lateinit.deferred_init(build, lazy=True)
    pair = Pair(Side(twin), Side(late))
    if pair.lazy:
        torch.set_rng_state(ended)
    assert torch.equal(ended, torch.get_rng_state())
    return pair


# -- one call on both ------------------------------------------------------------------------------


class _Refused:
    def __bool__(self) -> bool:
        return False


REFUSED = _Refused()


def state_of(pair: Pair) -> list[tuple[Any, ...]]:
    """What a refused call must leave as it is, beside the values."""
    return [
        (path, id(t), is_placeholder(t), t.is_meta, t.dtype, t.requires_grad)
        for path, t in pair.late.tensors().items()
    ]


def both(
    pair: Pair,
    late: Callable[[], Any],
    twin: Callable[[], Any] = lambda: None,
    *,
    refusals: Iterable[str] = (),
) -> Any:
    """Call both sides from one random state, which they have to leave alike.

    Gives what both returned, or `REFUSED` if the deferred side refused in words of `refusals`.
    """
    before, was = torch.get_rng_state(), state_of(pair)
    raised: list[Exception | None] = [None, None]
    try:
        found = late()
    except LateinitError as error:
        said = f"{type(error).__name__}: {error}"
        if not any(re.search(words, said) for words in refusals):
            raise
        assert torch.equal(before, torch.get_rng_state()), said
        assert state_of(pair) == was, said
        return REFUSED
    except (RuntimeError, TypeError, ValueError) as error:
        raised[1], found = error, None
    ended = torch.get_rng_state()
    torch.set_rng_state(before)
    try:
        expected = twin()
    except (RuntimeError, TypeError, ValueError) as error:
        raised[0], expected = error, None
    assert torch.equal(ended, torch.get_rng_state())
    if any(raised):
        if raised[0] is None or raised[1] is None:
            raise AssertionError(f"expected {raised[0]!r}, found {raised[1]!r}") from raised[1]
        return REFUSED
    return expected, found


def cast_saved(model: nn.Module, dtype: torch.dtype) -> None:
    """Cast what one `dtype=` casts in a real model: parameters, and buffers of its state dict."""
    state = model.state_dict(keep_vars=True).values()
    cast_together([*model.parameters(), *(t for t in state if isinstance(t, torch.Tensor))], dtype)


def cast_together(tensors: list[torch.Tensor], dtype: torch.dtype) -> None:
    """What `materialize(dtype=)` says: floating-point values cast, ties kept."""
    storages: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    for tensor in {id(t): t for t in tensors if t.is_floating_point()}.values():
        storage = tensor.untyped_storage()
        if storage._cdata not in storages:
            whole = torch.empty(0, dtype=tensor.dtype).set_(storage)
            # The old storage is kept, so that no other gets its address.
            storages[storage._cdata] = whole, whole.to(dtype)
        _, cast = storages[storage._cdata]
        tensor.data = cast.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def shares_outside(pair: Pair, taken: set[str], pairs: list[Pair]) -> bool:
    """Whether a deferred tensor beside those that are taken of one pair has memory of theirs."""
    storages: dict[int, set[bool]] = {}
    for each in pairs:
        for path, tensor in each.deferred().items():
            mine = each is pair and path in taken
            storages.setdefault(tensor.untyped_storage()._cdata, set()).add(mine)
    return any(len(found) > 1 for found in storages.values())


def other_values(model: nn.Module) -> dict[str, torch.Tensor]:
    """A checkpoint with the same ties: each value is a function of the one that it replaces."""
    return {
        name: tensor.clone() if tensor.dtype == torch.bool else tensor.clone().mul_(3).add_(1)
        for name, tensor in model.state_dict().items()
    }
