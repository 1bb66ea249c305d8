"""``Streams``: the generator state before each draw of a program, found without drawing.

A draw whose cost is known is jumped over (``_rng.position``). Any other draw is made, once.
"""

from __future__ import annotations

import abc
import functools
import threading
import weakref
from collections.abc import Collection, Iterable
from typing import Any, Protocol

import torch

from lateinit._program import Draw, Op, Program, TensorRef, tensor_refs
from lateinit._rng import (
    Cost,
    Run,
    Seeker,
    consumption,
    seed_behind,
    set_state,
    state_of,
    truncated_normal,
)
from lateinit._torch import NORMAL, TRUNCATED, by_name
from lateinit.errors import RecordingError


class _Seeker(Protocol):
    def __len__(self) -> int: ...
    def append(self, cost: Cost | None) -> None: ...
    def state(self, index: int, run: Run) -> bytes: ...
    def words(self, first: int, last: int, run: Run) -> int | None: ...


class Streams(abc.ABC):
    """The generator states along the streams of one program, from one seed. Thread-safe.

    The program caches these objects, so they refer to it weakly.

    Args:
        program: the program.
        seed: replaces the state in which the root streams start; None keeps the recorded one.
        past_holes: assume that open holes draw nothing, instead of raising at draws after them.

    Attributes:
        late: the late rounds of the truncated normals that were drawn.
    """

    def __init__(self, program: Program, seed: int | None, past_holes: bool) -> None:
        self._program = weakref.ref(program)
        self.seed = seed
        self.past_holes = past_holes
        self.late = truncated_normal.Kept()
        self._seekers: dict[int, _Seeker] = {}
        self._lock = threading.RLock()

    @abc.abstractmethod
    def draw(self, number: int, generator: torch.Generator) -> None:
        """Run a random op whose cost is not known, to move a generator past it."""

    @property
    def program(self) -> Program:
        """The program; its owner must still be alive."""
        program = self._program()
        assert program is not None
        return program

    def state(self, draw: Draw) -> bytes:
        """The state of the generator before a draw; the state at the end if its number is past it.

        Raises:
            RecordingError: the draw comes after an open hole.
        """
        if draw.number == 0:
            return self._start(draw.stream)
        with self._lock:
            seeker, run = self._until(draw)
            return seeker.state(draw.number, run)

    def words(self, first: Draw, last: Draw) -> int | None:
        """The number of words drawn from ``first`` up to ``last``, or None if not known."""
        if first.stream != last.stream or last.number < first.number:
            return None
        with self._lock:
            seeker, run = self._until(last)
            return seeker.words(first.number, last.number, run)

    def _until(self, draw: Draw) -> tuple[_Seeker, Run]:
        """The seeker of a stream, extended up to a draw, and the function that makes its draws."""
        stream = self.program.streams[draw.stream]
        cpu = stream.device.type == "cpu"
        seeker = self._seekers.get(draw.stream)
        if seeker is None:
            start = self._start(draw.stream)
            seeker = Seeker(start) if cpu else _InSequence(start, stream.device)
            self._seekers[draw.stream] = seeker
        for number in stream.ops[len(seeker) : draw.number]:
            seeker.append(cost(self.program.ops[number]) if number >= 0 and cpu else None)
        return seeker, lambda i, generator: self._pass(stream.ops[i], generator)

    def check_known(self, draws: Iterable[Draw], filled: Collection[int] = ()) -> None:
        """Raise if any of some draws comes after an open hole; makes no draw.

        Called before the first value is computed, so that a refused call leaves nothing half done.

        Args:
            draws: the draws.
            filled: the numbers of open holes that will be filled before the draws are made.
        """
        last: dict[int, int] = {}
        for draw in draws:
            last[draw.stream] = max(draw.number, last.get(draw.stream, 0))
        for number, end in last.items():
            stream = self.program.streams[number]
            for op in stream.ops[:end]:
                hole = -1 - op
                if op < 0 and self.program.holes[hole] is None and hole not in filled:
                    raise _unknown()
            if isinstance(stream.start, Draw):
                self.check_known([stream.start], filled)

    def _pass(self, number: int, generator: torch.Generator) -> None:
        """Move a generator past a draw of unknown cost, or past a hole.

        A filled hole ends where the stream that fills it ends.
        """
        if number >= 0:
            self.draw(number, generator)
            return
        child = self.program.holes[-1 - number]
        if child is not None:
            end = Draw(child, len(self.program.streams[child].ops))
            set_state(generator, self.state(end))
        elif not self.past_holes:
            raise _unknown()

    def _start(self, number: int) -> bytes:
        stream = self.program.streams[number]
        if isinstance(stream.start, Draw):
            return self.state(stream.start)
        if stream.root and self.seed is not None:
            return state_of(torch.Generator(stream.device).manual_seed(self.seed))
        return stream.start

    def generator(self, draw: Draw) -> torch.Generator:
        """A new generator in the state before a draw."""
        generator = torch.Generator(self.program.streams[draw.stream].device)
        set_state(generator, self.state(draw))
        return generator


def _unknown() -> RecordingError:
    return RecordingError(
        "a random value is needed that is drawn after the initialisation of a lazy module, "
        "whose shape is not known yet: call lateinit.infer_shapes(model, ...) first, or "
        "lateinit.discard(model) if that module was removed"
    )


class _InSequence:
    """A seeker for generators of other devices: no cost is known, so each draw is made once."""

    def __init__(self, start: bytes, device: torch.device) -> None:
        self._states = [start]
        self._device = device
        self._length = 0

    def __len__(self) -> int:
        return self._length

    def append(self, cost: Cost | None) -> None:
        self._length += 1

    def state(self, index: int, run: Run) -> bytes:
        while len(self._states) <= index:
            number = len(self._states) - 1
            generator = torch.Generator(self._device)
            set_state(generator, self._states[number])
            run(number, generator)
            self._states[number + 1 :] = [state_of(generator)]
        return self._states[index]

    def words(self, first: int, last: int, run: Run) -> None:
        return None


def cost(op: Op) -> Cost | None:
    """The cost of a random op, or None if the op must be run to find it."""
    filled = op.fills()
    numbers = op.args[1:]
    if filled is None:
        written = op.written()
        rest = numbers if by_name(op.name).mutates else op.args
        # Where another tensor takes part, such as probabilities, the cost may depend on values.
        if not written or any(tensor_refs(a) for a in rest):
            return None
        filled = written[0]
        numbers = tuple([a for a in rest if a is None or isinstance(a, (int, float))])
    # Layers repeat: without storage and offset, few different keys remain for the cache.
    return _cost(op.name, TensorRef(0, filled.dtype, filled.size, filled.stride, 0), numbers)


@functools.lru_cache(maxsize=4096)
def _cost(name: str, filled: TensorRef, numbers: tuple[Any, ...]) -> Cost | None:
    if name == TRUNCATED:
        normal = truncated_normal.Normal(*numbers)
        if not truncated_normal.draws_once(filled.dtype, normal):
            return None
        name, numbers = NORMAL, normal[:2]
    draw = consumption.DrawSpec(name, filled.numel, filled.dtype, filled.is_contiguous(), numbers)
    return consumption.consumption(draw)


def recorded_seed(program: Program) -> int | None:
    """The seed that was set just before recording began, or None."""
    for stream in program.streams:
        if stream.root and isinstance(stream.start, bytes) and stream.device.type == "cpu":
            return seed_behind(stream.start)
    return None
