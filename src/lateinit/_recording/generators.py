"""Follow the random generators through a block in which no number is drawn.

Recording a draw does not advance the generator. Instead it writes a *token* into it: a state that
names the place of the next draw (stream and index). Code may save and set the generator's state
meanwhile (``fork_rng``, ``set_state``, from Python or C++). At the next draw, a token says at which
place of which stream the generator is, and any other state begins a new stream.
"""

from __future__ import annotations

import ctypes
import itertools
import secrets
import struct
from collections.abc import Callable
from typing import Any

import torch

from lateinit._program import Draw, Program, Stream
from lateinit._rng import set_state, state_of
from lateinit._torch import generator_key
from lateinit.errors import RecordingError

_MAGIC = 0x9A17E1A7  # marks tokens; a true state has it with probability 2**-32
# Tells the tokens of one recording from those of another: of this process by counting, of another
# (states can be saved to files) by starting at random.
_NONCES = itertools.count(secrets.randbits(24))

# The state of a CPU generator (aten/src/ATen/CPUGeneratorImpl.cpp) has a seed at byte 0, `left`,
# `seeded` and `next` at bytes 8 to 24, then 624 words in 8 bytes each. That of a CUDA generator
# (Philox) is a seed and an offset. The bytes compared between two states are called the key. In
# the key of a CPU token the first four words are magic, nonce, stream and index; in that of a
# Philox token the seed holds magic, nonce and stream, and the offset holds the index.
_CPU_KEY = (8, 48)
_CPU_TOKEN = struct.Struct("=iiQQQQQ")
_CPU_INDEX = 48
_PHILOX_KEY = (0, 16)
_PHILOX_INDEX = 8
_PHILOX_TOKEN = struct.Struct("=QQ")
_INDEX = struct.Struct("=Q")
# `left`, `seeded` and `next` of a token. A kernel that draws changes `left` and `next` and leaves
# the words, so that a draw which recording did not see shows up in read_token().
_UNUSED = (624, 1, 0)


class Generators:
    """The generators that a recording uses, and the place of each in the program's streams.

    A root stream begins at the state in which the block found the default generator.
    """

    def __init__(self, program: Program) -> None:
        self.program = program
        self._nonce = next(_NONCES) & 0xFFFFFFFF
        self._watched: dict[int, _Watch] = {}
        self._settled: dict[bytes, Draw] = {}

    def draw(self, generator: torch.Generator, op: int, root: bool) -> Draw:
        """Record that op number ``op`` draws from a generator, and return the draw's place.

        Args:
            generator: the generator.
            op: the number of the op, or -1 - hole.
            root: whether a stream that begins here is a root stream.
        """
        watch = self._watched.get(generator_key(generator))
        if watch is None:
            # Its state may be a token or settled state of another generator, copied to this one.
            watch = self._follow(generator)
            self._begin(watch, self._named(watch, watch.expected) or watch.first, root)
        elif watch.key() != watch.expected:
            self._moved(watch)
        ops = self.program.streams[watch.stream].ops
        # Another generator was set to this place and drew there: this one branches off.
        if len(ops) != watch.at:
            self._begin(watch, Draw(watch.stream, watch.at))
            ops = self.program.streams[watch.stream].ops
        place = Draw(watch.stream, len(ops))
        ops.append(op)
        watch.leave_token(len(ops))
        return place

    def reserve(self, generator: torch.Generator) -> Draw:
        """Open a hole: keep a place in the default stream for draws that are not known yet."""
        self.program.holes.append(None)
        return self.draw(generator, -len(self.program.holes), root=True)

    def watch_from(self, generator: torch.Generator, place: Draw) -> int:
        """Follow a generator as if it were at ``place``; returns the stream that begins there."""
        watch = self._follow(generator)
        self._begin(watch, place)
        return watch.stream

    def watch(self, generator: torch.Generator) -> None:
        """Follow the default generator from now on, even if nothing is drawn from it."""
        watch = self._follow(generator)
        self._begin(watch, watch.first, root=True)

    def reseeded(self, generator: torch.Generator) -> None:
        """Record that a generator was seeded: its next draw begins a new stream."""
        watch = self._watched.get(generator_key(generator))
        if watch is not None:
            watch.stand()
            self._begin(watch, state_of(generator))

    def settle(self, state: Callable[[Draw], bytes]) -> None:
        """Put every generator into the state that eager construction would have left by now.

        Settled states are remembered, so that a draw after them continues its stream.

        Args:
            state: gives the generator state before a draw.
        """
        for watch in self._watched.values():
            place = self._place(watch)
            # Not drawn from since its stream began: it has its eager state already, which may be
            # saved now and restored later.
            if place is None and watch.key() == watch.expected:
                self._settled.setdefault(state_of(watch.generator), Draw(watch.stream, 0))
            if place is not None:
                true = state(place)
                set_state(watch.generator, true)
                self._settled[true] = place
                if self.program.streams[watch.stream].root and place.stream == watch.stream:
                    self.program.final = true

    def restore(self) -> None:
        """Put every generator into the state in which the block found it."""
        for watch in self._watched.values():
            set_state(watch.generator, watch.first)

    def _follow(self, generator: torch.Generator) -> _Watch:
        watch = self._watched[generator_key(generator)] = _Watch(generator, self._nonce)
        return watch

    def _begin(self, watch: _Watch, start: bytes | Draw, root: bool = False) -> None:
        watch.stream, watch.at = len(self.program.streams), 0
        self.program.streams.append(Stream(start, watch.device, root))

    def _moved(self, watch: _Watch) -> None:
        """Find the place of a generator whose state was set from outside since its last draw."""
        place = self._place(watch)
        if place is None:
            state = state_of(watch.generator)
            watch.stand()
            self._begin(watch, self._settled.get(state, state))
        # A token at the end of its stream continues the stream; one before the end, which draws
        # have passed already, starts a branch (as after fork_rng).
        elif place.number == len(self.program.streams[place.stream].ops):
            watch.stream, watch.at = place
        else:
            watch.stand()
            self._begin(watch, place)

    def _place(self, watch: _Watch) -> Draw | None:
        """The place of the generator, or None if its state belongs to no known stream."""
        key = watch.key()
        if key == watch.expected and not watch.has_token:
            return None  # neither drawn from nor set from outside
        return self._named(watch, key)

    def _named(self, watch: _Watch, key: bytes) -> Draw | None:
        """The place named by the generator's token, or by a state that was settled before."""
        place = watch.read_token(key)
        if place is None:
            return self._settled.get(state_of(watch.generator))
        return place


class _Watch:
    """One generator, its first state, and the key of the state that it is expected to be in."""

    def __init__(self, generator: torch.Generator, nonce: int) -> None:
        self.generator = generator
        self.device = generator.device
        self.first = state_of(generator)
        self.stream = -1
        self.at = 0  # the number of its next draw in the stream
        self.has_token = False
        self._cpu = self.device.type == "cpu"
        self._nonce = nonce
        self._start, length = _CPU_KEY if self._cpu else _PHILOX_KEY
        self._end = self._start + length
        self.expected = self.first[self._start : self._end]
        self._words = bytearray()
        self._token: Any = None  # a tensor on the memory of _words: the state to set
        self._named = -1  # the stream that the token names
        # The key is read from raw memory, and methods are looked up once: this runs at every draw.
        self._get_state, self._set_state = generator.get_state, generator.set_state
        self._key_at = (ctypes.c_char * length).from_address

    def key(self) -> bytes:
        state = self._get_state()
        found: bytes = self._key_at(state.data_ptr() + self._start).raw
        return found

    def stand(self) -> None:
        """Expect the generator in its current state."""
        self.expected = self.key()
        self.has_token = False

    def leave_token(self, index: int) -> None:
        if self.stream != self._named:
            self._name_stream()
        if self._cpu:
            _INDEX.pack_into(self._words, _CPU_INDEX, index)
        else:
            # set_state refuses offsets that are no multiples of 4 (a Philox block is 4 words).
            _INDEX.pack_into(self._words, _PHILOX_INDEX, 4 * index)
        self._set_state(self._token)
        self.expected = bytes(self._words[self._start : self._end])
        self.has_token = True
        self.at = index

    def _name_stream(self) -> None:
        """Write a token of the generator's stream; ``leave_token`` adds the index."""
        if not self._words:
            self._words[:] = self.first
            self._token = torch.frombuffer(self._words, dtype=torch.uint8)
        if self._cpu:
            # The token keeps the seed of the current state: initial_seed() reports it.
            self._words[: self._start] = state_of(self.generator)[: self._start]
            key = _CPU_TOKEN.pack(*_UNUSED, _MAGIC, self._nonce, self.stream, 0)
        else:
            named = (_MAGIC << 32) | (self._nonce & 0xFFFF) << 16 | self.stream
            key = _PHILOX_TOKEN.pack(named, 0)
        self._words[self._start : self._end] = key
        self._named = self.stream

    def read_token(self, key: bytes) -> Draw | None:
        """The place that a key names, or None if it is not the key of a token.

        Raises:
            RecordingError: a kernel drew from the token unseen, or another recording wrote it.
        """
        if self._cpu:
            *unused, magic, nonce, stream, index = _CPU_TOKEN.unpack(key)
            intact = (*unused, nonce) == (*_UNUSED, self._nonce)
        else:
            named, offset = _PHILOX_TOKEN.unpack(key)
            magic, stream, index = named >> 32, named & 0xFFFF, offset // 4
            intact = (named >> 16 ^ self._nonce) & 0xFFFF == 0
        if magic != _MAGIC:
            return None
        if not intact:
            raise RecordingError(
                "a random generator was moved in a way that recording did not see: either a "
                "kernel drew from it unseen, or it was set to a state taken in another block; "
                "take states with torch.get_rng_state()"
            )
        return Draw(stream, index)
