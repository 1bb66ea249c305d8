"""Following random generators through a block in which nothing is drawn.

While recording, a generator does not move. So that whatever is done to it in between is noticed
(``manual_seed``, ``fork_rng``, ``set_state``: from Python or below it), each recorded draw leaves
a *token* in the generator: a state that names its place in its stream. A token found later says
where in which stream the generator stands; any other state begins a stream of its own.
"""

from __future__ import annotations

import ctypes
import itertools
import secrets
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from lateinit.errors import RecordingError
from lateinit.program import Draw, Program, Stream
from lateinit.streams import set_state, state_of

_MAGIC = 0x9A17E1A7
_NONCES = itertools.count(secrets.randbits(24))

# A CPU state holds `left` and `next` at bytes 8 to 24, then 624 words in 8 bytes each; any other
# generator's (Philox) is a seed and an offset. A key is what tells two states apart.
_CPU_KEY = (8, 48)
_PHILOX_KEY = (0, 16)


class Generators:
    """The generators that a recording has met, and where each stands in the program's streams."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self._nonce = next(_NONCES) & 0xFFFFFFFF
        self._watched: dict[int, _Watch] = {}
        self._settled: dict[bytes, Draw] = {}

    def draw(self, generator: torch.Generator, op: int, root: bool) -> Draw:
        """Note that op number ``op`` draws from a generator; where it stood before."""
        watch = self._watched.get(_address(generator))
        if watch is None:
            watch = self._watched[_address(generator)] = _Watch(generator, self._nonce)
            self._begin(watch, self._place(watch) or state_of(generator), root)
        elif watch.key() != watch.expected:
            self._moved(watch)
        ops = self.program.streams[watch.stream].ops
        place = Draw(watch.stream, len(ops))
        ops.append(op)
        watch.leave_token(place.number + 1)
        return place

    def reserve(self, generator: torch.Generator) -> Draw:
        """Keep a place in the default generator's stream for draws that are not known yet."""
        self.program.holes.append(None)
        return self.draw(generator, -len(self.program.holes), root=True)

    def watch_from(self, generator: torch.Generator, place: Draw) -> int:
        """Follow a generator as if it stood at a place; gives the stream that begins there."""
        watch = self._watched[_address(generator)] = _Watch(generator, self._nonce)
        self._begin(watch, place)
        return watch.stream

    def watch(self, generator: torch.Generator) -> None:
        """Follow the default generator from now on, whether or not it is drawn from."""
        watch = self._watched[_address(generator)] = _Watch(generator, self._nonce)
        self._begin(watch, state_of(generator), root=True)

    def reseeded(self, generator: torch.Generator) -> None:
        """Note that a generator was seeded: it stands in no stream that it stood in before."""
        watch = self._watched.get(_address(generator))
        if watch is not None:
            self._begin(watch, state_of(generator))

    def settle(self, state: Callable[[Draw], bytes]) -> None:
        """Put every generator where eager construction would have it now."""
        for watch in self._watched.values():
            place = self._place(watch)
            if place is None and watch.key() == watch.expected:
                self._settled.setdefault(state_of(watch.generator), Draw(watch.stream, 0))
            if place is not None:
                true = state(place)
                set_state(watch.generator, true)
                self._settled[true] = place
                if self.program.streams[watch.stream].root and place.stream == watch.stream:
                    self.program.final = true

    def restore(self) -> None:
        """Put every generator where the block found it."""
        for watch in self._watched.values():
            set_state(watch.generator, watch.first)

    def _begin(self, watch: _Watch, start: bytes | Draw, root: bool = False) -> None:
        watch.stream = len(self.program.streams)
        self.program.streams.append(Stream(start, watch.generator.device, root))
        watch.expected = watch.key()
        watch.has_token = False

    def _moved(self, watch: _Watch) -> None:
        """Something else has set the generator since: continue a stream or begin one."""
        place = self._place(watch)
        if place is None:
            state = state_of(watch.generator)
            self._begin(watch, self._settled.get(state, state))
        elif place.number == len(self.program.streams[place.stream].ops):
            watch.stream = place.stream
        else:
            self._begin(watch, place)

    def _place(self, watch: _Watch) -> Draw | None:
        """The place that a token in the generator names; None if there is no token in it."""
        if watch.key() == watch.expected and not watch.has_token:
            return None  # nothing was drawn and nothing has moved it
        place = watch.read_token(self._nonce)
        if place is None:
            return self._settled.get(state_of(watch.generator))
        return place


def _address(generator: torch.Generator) -> int:
    # Two Python objects may stand for one generator.
    address: int = generator._cdata  # type: ignore[attr-defined]
    return address


def device_number(device: torch.device) -> int:
    """The number of a CUDA device, that of the current one where it has none."""
    number: Any = device.index  # None where it was not given, whatever the stubs say
    return torch.cuda.current_device() if number is None else int(number)


def default_generator(device: torch.device) -> torch.Generator:
    """The generator that random ops on a device draw from unless told otherwise."""
    if device.type == "cpu":
        return torch.default_generator
    if device.type == "cuda" and torch.cuda.is_available():
        torch.cuda.init()
        return torch.cuda.default_generators[device_number(device)]
    raise RecordingError(
        f"the constructor draws random numbers on {device}, whose generator is not available "
        "here: build the model on a machine that has this device, or on the CPU"
    )


class _Watch:
    """One generator, its first state, and the token that it should hold."""

    def __init__(self, generator: torch.Generator, nonce: int) -> None:
        self.generator = generator
        self.cpu = generator.device.type == "cpu"
        self.first = state_of(generator)
        self.stream = -1
        self.has_token = False
        self._token = generator.get_state().clone()
        self._words = self._token.numpy()[: len(self.first) // 8 * 8].view(np.uint64)
        self._start, self._length = _CPU_KEY if self.cpu else _PHILOX_KEY
        self._nonce = nonce
        self.expected = b""
        if self.cpu:
            left = self._token.numpy()[8:16].view(np.int32)
            left[:] = (624, 1)
            self._words[2] = 0
            self._words[3:5] = (_MAGIC, nonce)

    def key(self) -> bytes:
        state = self.generator.get_state()
        return ctypes.string_at(state.data_ptr() + self._start, self._length)

    def leave_token(self, index: int) -> None:
        words = self._words
        if self.cpu:
            words[5] = self.stream
            words[6] = index
        else:
            words[0] = (_MAGIC << 32) | (self._nonce & 0xFFFF) << 16 | self.stream
            words[1] = 4 * index
        self.generator.set_state(self._token)
        self.expected = ctypes.string_at(self._token.data_ptr() + self._start, self._length)
        self.has_token = True

    def read_token(self, nonce: int) -> Draw | None:
        words = np.frombuffer(self.key(), dtype=np.uint64)
        if self.cpu:
            position, left, found = words[1], int(words[0]) & 0xFFFFFFFF, words[2:4].tolist()
            if found[0] != _MAGIC:
                return None
            place = Draw(int(words[4]), int(words[5]))
            intact = found[1] == nonce and position == 0 and left == 624
        else:
            if int(words[0]) >> 32 != _MAGIC:
                return None
            place = Draw(int(words[0]) & 0xFFFF, int(words[1]) // 4)
            intact = (int(words[0]) >> 16) & 0xFFFF == nonce & 0xFFFF
        if not intact:
            raise RecordingError(
                "a random generator was moved in a way that recording did not see: either a "
                "kernel drew from it unseen, or it was set to a state taken in another block; "
                "take states with torch.get_rng_state()"
            )
        return place
