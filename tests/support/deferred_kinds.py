"""Calls of functions on tensors, and the kinds of deferred tensor that they are made on."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from tests.sharding.placements import line

Given = list[Any]
PAD = 2


@dataclass(frozen=True)
class Call:
    """A function of tensors, and values for them.

    Attributes:
        name: what is called, and how.
        values: the values of the tensors.
        run: calls it on tensors with these values.
        late: the tensors that are deferred; the others are real.
        grad: whether gradients are recorded.
        unsaid: what differs between two eager runs too, or need not be equal.
        make: makes the module that holds the tensors; ``run`` is given the module alone.
        kinds: the kinds of tensor that it is called on, by default all.
        mixes: whether it is also called among meta and fake tensors.
        asks_device: whether it asks what a parameter answers with ``meta`` (DESIGN.md, law 10).
        names: of which a refusal says one; by default those of the deferred tensors.
    """

    name: str
    values: tuple[Tensor, ...]
    run: Callable[[Given], Any] = field(repr=False)
    late: tuple[int, ...] = (0,)
    grad: bool = True
    unsaid: frozenset[str] = frozenset()
    make: Callable[[], nn.Module] | None = None
    names: tuple[str, ...] = ()
    kinds: tuple[str, ...] = ()
    mixes: bool = True
    asks_device: bool = False


def copied(value: Tensor) -> Tensor:
    """A tensor that is made here, with the values and the strides of another."""
    steps = zip(value.size(), value.stride(), strict=True)
    if any(n > 1 and step == 0 for n, step in steps):
        made = torch.empty(value.size(), dtype=value.dtype)
    else:
        made = torch.empty_strided(value.size(), value.stride(), dtype=value.dtype)
    return made.copy_(value.detach())


def can_be_late(value: Tensor) -> bool:
    """Whether ``copied`` can make a tensor like this one."""
    return value.layout is torch.strided and not value.is_nested and not value.is_quantized


def differentiable(value: Tensor) -> bool:
    return value.is_floating_point() or value.is_complex()


def plain(model: nn.Module, name: str, value: Tensor) -> None:
    setattr(model, name, copied(value))


def parameter(model: nn.Module, name: str, value: Tensor) -> None:
    setattr(model, name, nn.Parameter(copied(value), differentiable(value)))


def buffer(model: nn.Module, name: str, value: Tensor) -> None:
    model.register_buffer(name, copied(value))


def larger(model: nn.Module, name: str, value: Tensor) -> None:
    """A parameter of which ``window`` shows a part."""
    whole = torch.ones(value.numel() + 2 * PAD, dtype=value.dtype)
    whole[PAD : PAD + value.numel()] = value.detach().reshape(-1)
    setattr(model, name, nn.Parameter(whole, requires_grad=False))


def window(held: Tensor, value: Tensor) -> Tensor:
    return held.detach()[PAD : PAD + value.numel()].view(value.shape)


def itself(held: Tensor, value: Tensor) -> Tensor:
    return held


def distributed(held: Tensor, value: Tensor) -> Tensor:
    placement = Shard(0) if value.dim() else Replicate()
    return distribute_tensor(held, line(1), [placement])


def local(held: Tensor, value: Tensor) -> Tensor:
    return distributed(held.detach(), value).to_local()


KINDS: dict[str, tuple[Callable[..., None], Callable[[Tensor, Tensor], Tensor]]] = {
    "plain": (plain, itself),
    "parameter": (parameter, itself),
    "buffer": (buffer, itself),
    "view": (larger, window),
    "dtensor": (parameter, distributed),
    "shard": (parameter, local),
}


WAITING = ("parameter", "view", "dtensor", "shard")
"""The kinds that wait for ``materialize``; the others realise themselves."""


def build(call: Call, kind: str) -> nn.Module:
    """A module that holds the tensors of a call that are to be deferred."""
    if call.make is not None:
        return call.make()
    model = nn.Module()
    for i in call.late:
        KINDS[kind][0](model, f"held{i}", call.values[i])
    return model


def given(call: Call, kind: str, model: nn.Module) -> Given:
    """The arguments of a call: those that a module holds, and copies of the others."""
    if call.make is not None:
        return [model]
    made: Given = []
    for i, value in enumerate(call.values):
        if i in call.late:
            made.append(KINDS[kind][1](getattr(model, f"held{i}"), value))
        elif can_be_late(value):
            real = copied(value)
            made.append(distributed(real, value) if kind == "dtensor" else real)
        else:
            made.append(value.clone())
    return made


OTHERS = ("real", "meta", "fake")


def variants(call: Call) -> list[tuple[str, str]]:
    """The kinds of tensor that a call can be made on, and what the other tensors can be."""
    others = OTHERS if call.mixes and 0 < len(call.late) < len(call.values) else OTHERS[:1]
    return [(kind, other) for kind in call.kinds or KINDS for other in others]


def chosen(call: Call) -> tuple[str, str]:
    """One of them, the same in every run; half of the time the other tensors are real."""
    number, found = zlib.crc32(call.name.encode()), variants(call)
    real = [variant for variant in found if variant[1] == "real"]
    among_these = real if number % 2 else found
    return among_these[number // 2 % len(among_these)]
