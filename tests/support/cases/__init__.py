"""What a case is: one small model, there for one difficulty. All are in `support.models`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from collections.abc import Callable


@dataclass(frozen=True, slots=True)
class Case:
    """A model and the laws that its difficulty takes it out of.

    A flag is about what *eager* torch can do with the model, but for `reads_random`: there a
    Python value depends on a drawn one, so another seed would have run another constructor, and
    `materialize(seed=)` may refuse.
    """

    name: str
    build: Callable[[], nn.Module]
    reads_random: bool = False
    deepcopies: bool = True
    pickles: bool = True
    loads: bool = True
    trains: bool = True
    casts: bool = True

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True, slots=True)
class Registry:
    """The cases of one theme, in the order in which they are written."""

    cases: list[Case]

    def case(self, **flags: bool) -> Callable[[Any], Any]:
        """Register a function or a module class that takes no arguments."""

        def register(build: Any) -> Any:
            self.cases.append(Case(build.__name__, build, **flags))
            return build

        return register


class Bag(nn.Module):
    """A module of what it is given: parameters, buffers for plain tensors, and attributes."""

    def __init__(self, **things: Any) -> None:
        super().__init__()
        for name, thing in things.items():
            if isinstance(thing, torch.Tensor) and not isinstance(thing, nn.Parameter):
                self.register_buffer(name, thing)
            else:
                setattr(self, name, thing)
