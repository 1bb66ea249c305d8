"""Random hooks: short programs of what hooks do to state dicts and modules while these load."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

if TYPE_CHECKING:
    import random
    from collections.abc import Callable

SAVED = ("a.weight", "b.weight", "bias", "buffer")
OWN = (*SAVED, "table", "note")


class Statement(NamedTuple):
    """One line of a hook: what it does, to which names, with which number."""

    what: str
    key: str
    other: str
    own: str
    number: int


class Program(NamedTuple):
    """A model's hooks, before and after loading, and how its tensors share memory."""

    before: tuple[Statement, ...]
    after: tuple[Statement, ...]
    tied: bool
    views: bool


def random_program(rng: random.Random) -> Program:
    def statements(names: list[str]) -> tuple[Statement, ...]:
        return tuple(
            Statement(
                *(rng.choice(names), rng.choice(SAVED), rng.choice(SAVED), rng.choice(OWN)),
                rng.randrange(2, 5),
            )
            for _ in range(rng.randrange(4))
        )

    before, after = statements([*TO_STATES, *TO_MODULES]), statements([*TO_MODULES])
    return Program(before, after, tied=rng.random() < 0.3, views=rng.random() < 0.3)


class Programmed(nn.Module):
    """Runs a program while it loads."""

    def __init__(self, program: Program) -> None:
        super().__init__()
        self.a, self.b = Weight(), Weight()
        if program.tied:
            self.b.weight = self.a.weight
        whole = torch.randn(6)
        self.bias = nn.Parameter(whole[:4] if program.views else torch.randn(4))
        self.register_buffer("buffer", whole[2:] if program.views else torch.randn(4))
        self.register_buffer("table", torch.randn(4), persistent=False)
        self.note = torch.rand(4)
        self._program = program
        self.register_load_state_dict_pre_hook(run_before)
        self.register_load_state_dict_post_hook(run_after)

    def set(self, name: str, tensor: torch.Tensor) -> None:
        path, _, last = name.rpartition(".")
        if isinstance(self.get_parameter_or_none(name), nn.Parameter):
            setattr(self.get_submodule(path), last, nn.Parameter(tensor))

    def get_parameter_or_none(self, name: str) -> Any:
        path, _, last = name.rpartition(".")
        return getattr(self.get_submodule(path), last)


class Weight(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4))


def run_before(module: Any, state: dict[str, Any], prefix: str, *_: Any) -> None:
    for statement in module._program.before:
        what, key, other, own, number = statement
        if what in TO_MODULES:
            TO_MODULES[what](module, *statement[1:])
        elif prefix + key in state:
            TO_STATES[what](module, state, prefix + key, prefix + other, own, number)


def run_after(module: Any, _: Any) -> None:
    for statement in module._program.after:
        TO_MODULES[statement.what](module, *statement[1:])


def of(module: Any, name: str) -> torch.Tensor:
    tensor: torch.Tensor = module.get_parameter_or_none(name)
    return tensor


# -- what is done to a state dict ------------------------------------------------------------------


def written(module: Any, state: Any, key: str, other: str, own: str, number: int) -> None:
    state[key].mul_(number)


def written_by_data(module: Any, state: Any, key: str, other: str, own: str, number: int) -> None:
    state[key].data.add_(number)


def written_by_view(module: Any, state: Any, key: str, other: str, own: str, number: int) -> None:
    state[key].view(-1)[1:].mul_(number)
    state[key][0] = number


def computed(module: Any, state: Any, key: str, other: str, own: str, number: int) -> None:
    state[key] = state[key] * number + of(module, own).detach()


def renamed(module: Any, state: Any, key: str, other: str, own: str, number: int) -> None:
    state[other] = state.pop(key)


def doubled(module: Any, state: Any, key: str, other: str, own: str, number: int) -> None:
    state[other] = state[key]


def wrapped(module: Any, state: Any, key: str, other: str, own: str, number: int) -> None:
    state[key] = nn.Parameter(state[key].detach())


def drawn(module: Any, state: Any, key: str, other: str, own: str, number: int) -> None:
    state[key] = torch.randn(4, device=state[key].device)


def filled(module: Any, state: Any, key: str, other: str, own: str, number: int) -> None:
    buffer = torch.empty_like(state[key])
    buffer.copy_(state[key])
    state[other] = buffer


def own_value(module: Any, state: Any, key: str, other: str, own: str, number: int) -> None:
    state[key] = of(module, own)


def copied_by_hand(module: Any, state: Any, key: str, other: str, own: str, number: int) -> None:
    of(module, own).data.copy_(state[key])
    state[key].add_(number)


def kept(module: Any, state: Any, key: str, other: str, own: str, number: int) -> None:
    module.kept = state[key]


def taken(module: Any, state: Any, key: str, other: str, own: str, number: int) -> None:
    module.set(own, state[key])


# -- what is done to a module ----------------------------------------------------------------------


def scaled(module: Any, key: str, other: str, own: str, number: int) -> None:
    of(module, own).data.mul_(number)


def copied(module: Any, key: str, other: str, own: str, number: int) -> None:
    with torch.no_grad():
        of(module, own).copy_(of(module, key))


def noted(module: Any, key: str, other: str, own: str, number: int) -> None:
    module.derived = of(module, own).detach() * number
    module.value = float(of(module, key).detach().sum())


def exchanged(module: Any, key: str, other: str, own: str, number: int) -> None:
    module.set(key, of(module, own).detach().clone())


def branched(module: Any, key: str, other: str, own: str, number: int) -> None:
    if of(module, own).detach().sum() > 0:
        of(module, other).data.add_(number)


def set_data(module: Any, key: str, other: str, own: str, number: int) -> None:
    of(module, own).data = of(module, key).data * number


TO_STATES: dict[str, Callable[..., None]] = {
    function.__name__: function
    for function in (
        *(written, written_by_data, written_by_view, computed, renamed, doubled, wrapped, drawn),
        *(filled, own_value, copied_by_hand, kept, taken),
    )
}
TO_MODULES: dict[str, Callable[..., None]] = {
    function.__name__: function
    for function in (scaled, copied, noted, exchanged, branched, set_data)
}
