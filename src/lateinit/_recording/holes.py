"""Holes: the places in a program where lazy modules' initialisations belong.

A lazy module that is constructed in a block draws nothing yet, but its eager twin did so at this
very place. The hole keeps the place in the random stream; once the shape is known, what is
recorded in ``fill`` draws from there, and everything after it moves up by as much.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from lateinit._program.program import Draw, Program
from lateinit._recording.recorder import current

_ATTRIBUTE = "_lateinit_hole"


class Hole:
    """The place of one lazy module's initialisation. Deep copies of the module share it."""

    __slots__ = ("number", "place", "program")

    def __init__(self, program: Program, number: int, place: Draw) -> None:
        self.program = program
        self.number = number
        self.place = place

    def __deepcopy__(self, memo: dict[int, Any]) -> Hole:
        return self

    def __getstate__(self) -> tuple[Program, int, Draw]:
        return self.resolve()  # a program that was merged into another one is not pickled with it

    def __setstate__(self, state: tuple[Program, int, Draw]) -> None:
        self.program, self.number, self.place = state

    def resolve(self) -> tuple[Program, int, Draw]:
        """The program, the hole's number and its place, wherever programs have been merged to."""
        while self.program.merged_into is not None:
            self.program, bases = self.program.merged_into
            self.number += bases.hole
            self.place = bases.draw_of(self.place)
        return self.program, self.number, self.place


def hole_of(module: nn.Module) -> Hole | None:
    """The hole that was reserved for a module, if it was constructed in a block."""
    hole: Hole | None = module.__dict__.get(_ATTRIBUTE)
    return hole


def reserve(module: nn.Module) -> None:
    """Reserve the hole of a lazy module that is constructed in a block, once."""
    recorder = current()
    if recorder is not None and hole_of(module) is None:
        place = recorder.generators.reserve(torch.default_generator)
        hole = Hole(recorder.program, len(recorder.program.holes) - 1, place)
        module.__dict__[_ATTRIBUTE] = hole


def close(module: nn.Module) -> None:
    """Forget the hole of a module that is initialised."""
    module.__dict__.pop(_ATTRIBUTE, None)
