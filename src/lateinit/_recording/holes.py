"""Holes: the places in a program where the initialisations of lazy modules belong.

A lazy module that is constructed in a block draws nothing yet, but its eager twin draws at this
place of the random stream. A hole keeps the place. Once the shape is known, ``block.fill`` records
the initialisation, whose draws start at the hole; all later draws of the stream move up by as many.
"""

from __future__ import annotations

import gc
import weakref
from typing import Any

import torch
from torch import nn

from lateinit._program import Draw, Program
from lateinit._recording.writer import current
from lateinit._torch import remove_hook

_ATTRIBUTE = "_lateinit_hole"
FIRST_CALL = "_lateinit_first_call"
"""An attribute of a module with a hole: the handle of the hook that intercepts its first call."""


class Hole:
    """The place of one lazy module's initialisation. Deep copies of the module share its hole."""

    __slots__ = ("__weakref__", "number", "place", "program")

    def __init__(self, program: Program, number: int, place: Draw) -> None:
        self.__setstate__((program, number, place))

    def __deepcopy__(self, memo: dict[int, Any]) -> Hole:
        return self

    def __getstate__(self) -> tuple[Program, int, Draw]:
        return self.resolve()  # so that a program which was merged into another is not pickled

    def __setstate__(self, state: tuple[Program, int, Draw]) -> None:
        self.program, self.number, self.place = state
        _held.add(self)

    def resolve(self) -> tuple[Program, int, Draw]:
        """The program, the hole's number and its place, after any merging of programs."""
        while self.program.merged_into is not None:
            self.program, bases = self.program.merged_into
            self.number += bases.hole
            self.place = bases.draw_of(self.place)
        return self.program, self.number, self.place


_held: weakref.WeakSet[Hole] = weakref.WeakSet()


def abandoned(program: Program) -> list[Hole]:
    """New ``Hole`` objects for the open holes of a program whose modules no longer exist."""
    gc.collect()  # a lazy module's own hook refers to it
    open_ = {number for number, stream in enumerate(program.holes) if stream is None}
    for hole in list(_held):
        other, number, _ = hole.resolve()
        if other is program:
            open_.discard(number)
    return [
        Hole(program, -1 - op, Draw(stream, at))
        for stream, each in enumerate(program.streams)
        for at, op in enumerate(each.ops)
        if -1 - op in open_
    ]


def hole_of(module: nn.Module) -> Hole | None:
    """The hole of a module, or None if it was not constructed in a block."""
    hole: Hole | None = module.__dict__.get(_ATTRIBUTE)
    return hole


def reserve(module: nn.Module) -> None:
    """Reserve the hole of a lazy module that is being constructed in a block, once."""
    if current() is not None and hole_of(module) is None:
        module.__dict__[_ATTRIBUTE] = new_hole()


def new_hole() -> Hole:
    """A hole at the current place of the default stream of the block that is running."""
    writer = current()
    assert writer is not None
    place = writer.generators.reserve(torch.default_generator)
    return Hole(writer.program, len(writer.program.holes) - 1, place)


def close(module: nn.Module) -> None:
    """Forget the hole of a module whose initialisation is recorded."""
    module.__dict__.pop(_ATTRIBUTE, None)
    handle = module.__dict__.pop(FIRST_CALL, None)
    if handle is not None:
        remove_hook(module, handle.id)
