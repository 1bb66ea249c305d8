"""Follow the random generators through a block in which no number is drawn.

Recording a draw does not advance the generator. Instead it writes a *token* into it: a state that
names the place of the next draw (stream and index). Code may save and set the generator's state
meanwhile (``fork_rng``, ``set_state``, from Python or C++). At the next draw, a token identifies
the stream and the place in it, and any other state begins a new stream.

The default generator of the CPU holds a token from the beginning of the block to its end, so that
seeding it to the same state as before is noticed. It has its eager state only while that is read
(``settle``). A generator that the constructor made has it after each draw (``reveal``).
"""

from __future__ import annotations

import ctypes
import itertools
import secrets
import struct
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from lateinit._program import Draw, Program, Stream
from lateinit._rng import seed_behind, set_state, state_of
from lateinit._torch import generator_key
from lateinit.errors import RecordingError

_MAGIC = 0x9A17E1A7  # marks tokens; a true state has it with probability 2**-32
# Distinguishes the tokens of different recordings: within this process by counting, from other
# processes (states can be saved to files) by starting at random.
_NONCES = itertools.count(secrets.randbits(24))

# The state of a CPU generator (aten/src/ATen/CPUGeneratorImpl.cpp) has a seed at byte 0, `left`,
# `seeded` and `next` at bytes 8 to 24, then 624 words in 8 bytes each. The state of a CUDA one
# (Philox) is a seed and an offset. The bytes compared between two states are called the key. In
# the key of a CPU token the first four words are magic, nonce, stream and index; in that of a
# Philox token the seed holds magic, nonce and stream, and the offset holds the index.
_CPU_KEY = (8, 48)
_CPU_TOKEN = struct.Struct("=iiQQQQQ")
_CPU_INDEX = 48
_CPU_WORDS_END = 24 + 624 * 8  # cached normal samples follow
_PHILOX_KEY = (0, 16)
_PHILOX_INDEX = 8
_PHILOX_TOKEN = struct.Struct("=QQ")
_INDEX = struct.Struct("=Q")
# `left`, `seeded` and `next` of a token. A kernel that draws changes `left` and `next` and leaves
# the words, so that a draw which recording did not see shows up in read_token().
_UNUSED = (624, 1, 0)


class Settled(NamedTuple):
    """A generator in its eager state, and the place and the token that it had before."""

    generator: torch.Generator
    place: Draw
    token: bytes
    true: bytes


class Generators:
    """The generators that a recording uses, and the place of each in the program's streams.

    A root stream begins at the state that the default generator had when the block began. ``drawn``
    is a generator that the constructor made and that has just drawn, until ``reveal``.
    """

    def __init__(self, program: Program) -> None:
        self.program = program
        self._nonce = next(_NONCES) & 0xFFFFFFFF
        self._watched: dict[int, _Watch] = {}
        self._settled: dict[bytes, Draw] = {}  # the places of the eager states that were read
        self._ambiguous: set[bytes] = set()  # those read at two places: one under this seed only
        self.drawn: _Watch | None = None  # a generator of the constructor that just drew

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
            self._check_source(watch)
            self._begin(watch, self._named(watch, watch.expected) or watch.first, root)
        elif watch.key() != watch.expected:
            self._check_source(watch)
            self._moved(watch)
        ops = self.program.streams[watch.stream].ops
        # Another generator was set to this place and drew there, so this one begins a branch.
        if len(ops) != watch.at:
            self._begin(watch, Draw(watch.stream, watch.at))
            ops = self.program.streams[watch.stream].ops
        place = Draw(watch.stream, len(ops))
        ops.append(op)
        watch.leave_token(len(ops))
        if watch.is_own:
            self.drawn = watch
        return place

    def undo(self, place: Draw) -> None:
        """Forget the last draw of a stream: its op has failed."""
        del self.program.streams[place.stream].ops[place.number :]
        for watch in self._watched.values():
            if (watch.stream, watch.at) == (place.stream, place.number + 1):
                watch.leave_token(place.number)

    def reserve(self, generator: torch.Generator) -> Draw:
        """Open a hole: keep a place in the default stream for draws that are not known yet."""
        self.program.holes.append(None)
        return self.draw(generator, -len(self.program.holes), root=True)

    def watch_from(self, generator: torch.Generator, place: Draw) -> int:
        """Follow a generator as if it were at ``place``; returns the stream that begins there."""
        watch = self._follow(generator, default=True)
        self._begin(watch, place)
        watch.leave_token(0)
        return watch.stream

    def begin_at(self, generator: torch.Generator, start: bytes) -> int:
        """Follow a default generator as if it were in a state; returns the stream that begins."""
        watch = self._watched.get(generator_key(generator))
        watch = watch or self._follow(generator, default=True)
        self._begin(watch, start)
        watch.leave_token(0)
        return watch.stream

    def watch(self, generator: torch.Generator) -> None:
        """Follow the default generator from now on, even if nothing is drawn from it."""
        watch = self._follow(generator, default=True)
        self._begin(watch, watch.first, root=True)
        watch.leave_token(0)

    def reseeded(self, generator: torch.Generator) -> None:
        """Record that the default generator was seeded: its next draw begins a new stream."""
        watch = self._watched.get(generator_key(generator))
        if watch is not None:
            self._begin(watch, state_of(generator))
            watch.leave_token(0)

    def restored(self, generator: torch.Generator) -> None:
        """Record that the default generator was set to a state, read before or not."""
        watch = self._watched.get(generator_key(generator))
        if watch is not None and watch.key() != watch.expected:
            self._check_source(watch, restored=True)
            self._moved(watch)
            watch.leave_token(watch.at)

    def tell_seed(self, generator: torch.Generator) -> None:
        """Bind the seed if the constructor reads it, and has not itself set it."""
        watch = self._watched.get(generator_key(generator))
        place = watch and self._place(watch)
        if place is not None and self._is_root(place.stream):
            self.program.seed_bound = "the constructor read torch.initial_seed()"

    def reveal(self, state: Callable[[Draw], bytes]) -> None:
        """Put the generator that just drew, made by the constructor, into its eager state.

        Args:
            state: returns the generator state before a draw.
        """
        watch, self.drawn = self.drawn, None
        assert watch is not None
        place = Draw(watch.stream, watch.at)
        true = state(place)
        set_state(watch.generator, true)
        watch.stand()
        # A generator that is later set to this state continues from this place, under any seed.
        if isinstance(self.program.streams[watch.stream].start, Draw):
            self._remember(true, place)

    def settle(self, state: Callable[[Draw], bytes]) -> list[Settled]:
        """Put every generator into the state that eager construction would have left by now.

        Args:
            state: returns the generator state before a draw.

        Returns:
            The argument of ``resume``.
        """
        settled = []
        for watch in self._watched.values():
            if watch.default and watch.key() != watch.expected:
                self._check_source(watch)
            place = self._place(watch)
            if place is not None:
                token, true = state_of(watch.generator), state(place)
                set_state(watch.generator, true)
                settled.append(Settled(watch.generator, place, token, true))
                if watch.default and watch.device.type == "cpu":
                    self.program.end = place
                if self.program.streams[watch.stream].root and place.stream == watch.stream:
                    self.program.final = true
        return settled

    def resume(self, settled: list[Settled], *, told: bool) -> None:
        """Put the tokens back into the generators that did not change since ``settle``.

        Args:
            settled: the result of ``settle``.
            told: whether the constructor has read the states, and may set generators to them.
        """
        for generator, place, token, true in settled:
            if state_of(generator) == true:
                set_state(generator, token)
                if told:
                    self._remember(true, place)

    def keeps_state(self, kept: torch.Tensor, state: Callable[[Draw], bytes]) -> bool:
        """Whether a real tensor is a state that depends on the seed; turns a token into a state."""
        held = bytes(kept.numpy().tobytes())
        for watch in self._watched.values():
            if watch.default and len(held) == len(watch.first):
                place = watch.read_token(held)
                if place is not None:
                    kept.copy_(torch.frombuffer(bytearray(state(place)), dtype=torch.uint8))
                return place is not None or held in self._settled
        return False

    def restore(self) -> None:
        """Put every generator into the state that it had when the block began."""
        for watch in self._watched.values():
            set_state(watch.generator, watch.first)

    def _follow(self, generator: torch.Generator, *, default: bool = False) -> _Watch:
        watch = self._watched[generator_key(generator)] = _Watch(generator, self._nonce, default)
        return watch

    def _begin(self, watch: _Watch, start: bytes | Draw, root: bool = False) -> None:
        watch.stream, watch.at = len(self.program.streams), 0
        self.program.streams.append(Stream(start, watch.device, root))

    def _check_source(self, watch: _Watch, *, restored: bool = False) -> None:
        """Bind the seed if the origin of a state is unknown: under another seed it may differ.

        Args:
            watch: the generator, whose state was set from outside.
            restored: whether it was set by ``torch.set_rng_state``, not seeded.
        """
        state = state_of(watch.generator)
        told = state in self._settled
        # The constructor may have changed a state that it read.
        unknown = bool(self._settled) and not told and self._named(watch, state) is None
        if state in self._ambiguous:
            self.program.seed_bound = (
                "a generator was set to a state that was read at two places, which have different "
                "states under another seed"
            )
        elif (told and not restored) or (unknown and seed_behind(state) is None):
            self.program.seed_bound = (
                "a generator was set to a state that the default generator had or might have had "
                "under another seed, without torch.set_rng_state"
            )

    def _remember(self, state: bytes, place: Draw) -> None:
        """Note the place at which an eager state was read: a generator may be set to it again."""
        before = self._settled.get(state, place)
        alike = self._origin(before) == self._origin(place)
        if not alike and (self._is_root(before.stream) or self._is_root(place.stream)):
            self._ambiguous.add(state)
        self._settled[state] = place

    def _origin(self, place: Draw) -> Draw:
        """The same place in the stream that its stream branched off, if it is the first there."""
        start = self.program.streams[place.stream].start
        while place.number == 0 and isinstance(start, Draw):
            place = start
            start = self.program.streams[place.stream].start
        return place

    def _is_root(self, stream: int) -> bool:
        """Whether a stream is a root stream, or branched off one."""
        start = self.program.streams[stream].start
        if isinstance(start, Draw):
            return self._is_root(start.stream)
        return self.program.streams[stream].root

    def _moved(self, watch: _Watch) -> None:
        """Find the place of a generator whose state was set from outside since its last draw."""
        place = self._place(watch)
        if place is None:
            watch.stand()
            self._begin(watch, state_of(watch.generator))
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

    def __init__(self, generator: torch.Generator, nonce: int, default: bool) -> None:
        self.generator = generator
        self.device = generator.device
        self.default = default
        self.first = state_of(generator)
        self.stream = -1
        self.at = 0  # the number of its next draw in the stream
        self.has_token = False
        self._cpu = self.device.type == "cpu"
        self.is_own = self._cpu and not default
        self._nonce = nonce
        self._start, length = _CPU_KEY if self._cpu else _PHILOX_KEY
        self._end = self._start + length
        self.expected = self.first  # the key of a token, or a whole state that is no token
        self._words = bytearray()
        self._token: Any = None  # a tensor on the memory of _words: the state to set
        self._named = -1  # the stream that the token names
        # The key is read from raw memory, and methods are looked up once: this runs at every draw.
        self._get_state, self._set_state = generator.get_state, generator.set_state
        self._key_at = (ctypes.c_char * length).from_address
        self._state_at = (ctypes.c_char * len(self.first)).from_address

    def key(self) -> bytes:
        """The key of the current state if a token is expected, else the whole state."""
        state = self._get_state()
        start = state.data_ptr()
        found = self._key_at(start + self._start) if self.has_token else self._state_at(start)
        key: bytes = found.raw
        return key

    def stand(self) -> None:
        """Expect the generator to stay in its current state."""
        self.has_token = False
        self.expected = self.key()

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
            if self._cpu:
                # Without cached normals, which a kernel could use up unnoticed.
                self._words[_CPU_WORDS_END:] = bytes(len(self.first) - _CPU_WORDS_END)
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
        """The place that a key or a state names, or None if it belongs to no token.

        Raises:
            RecordingError: a kernel drew from the token unseen, or another recording wrote it.
        """
        if len(key) == len(self.first):
            key = key[self._start : self._end]
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
