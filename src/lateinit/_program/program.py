"""``Program``, the recorded construction: plain data, printable and picklable.

A program is a sequence of ops (``ops``) over numbered storages.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lateinit._program.ops import Const, Draw, Op, TensorRef
from lateinit._torch import (
    autocast_in_force,
    is_any_autocast_enabled,
    is_deterministic,
    operators,
    put_determinism,
    read_determinism,
)


@dataclass(slots=True)
class Storage:
    """The size of one storage, and the device that the constructor asked for.

    ``followed`` marks a storage that an op made after a block, such as a shard: it is no part of
    the construction, and may differ between ranks. ``made_of`` is then the storage of the
    construction from whose values or shape it was made. ``gone`` marks a storage that no living
    tensor uses.
    """

    nbytes: int
    device: torch.device
    followed: bool = False
    made_of: int | None = None
    gone: bool = False


_DROPPED_STORAGE = Storage(0, torch.device("cpu"), gone=True)
_DROPPED_OP = Op(operators.REFUSED, ("dropped",), {}, (), None, 0, None)
"""Takes the place of an op that no tensor needs: it reads and writes nothing."""


@dataclass(slots=True)
class Constant:
    """Real data that a program keeps; ``checksum`` is None if no one else can write to it."""

    tensor: Tensor
    checksum: int | None


class Ambient(NamedTuple):
    """Process-wide settings that the result of a kernel depends on.

    Autocast is not among them: its casts are recorded as ops.
    """

    default_dtype: torch.dtype
    deterministic: bool

    def holds(self) -> bool:
        """Whether exactly these settings are in force now."""
        return (
            self.default_dtype is torch.get_default_dtype()
            and self.deterministic == is_deterministic()
            and not is_any_autocast_enabled()
        )

    @contextlib.contextmanager
    def in_force(self) -> Iterator[None]:
        """Run a block under these settings, without autocast, and restore the present ones."""
        if self.holds():
            yield
            return
        dtype, determinism = torch.get_default_dtype(), read_determinism()
        try:
            torch.set_default_dtype(self.default_dtype)
            if determinism[0] != self.deterministic:
                torch.use_deterministic_algorithms(self.deterministic)
            with autocast_in_force(None):
                yield
        finally:
            torch.set_default_dtype(dtype)
            if determinism[0] != self.deterministic:
                put_determinism(determinism)


@dataclass(slots=True, repr=False)
class Stream:
    """A sequence of draws from one generator, and the state of the generator before the first.

    ``start`` is that state, or a place in another stream from which this stream branches off.
    ``root`` marks a stream that starts from the state that the default generator had when the block
    began: ``seed=`` replaces that state. A negative number among ``ops`` is a hole: ``-1 - hole``.
    """

    start: bytes | Draw
    device: torch.device
    root: bool
    ops: list[int] = field(default_factory=list)

    def __repr__(self) -> str:
        start = self.start if isinstance(self.start, Draw) else f"{len(self.start)} bytes"
        kind = "root stream" if self.root else "stream"
        return f"<{kind} on {self.device}: {len(self.ops)} draws from {start}>"


class Read(NamedTuple):
    """A read of a random value: its window, the op before which it was read, and its digest.

    The digest is empty if only the shape of the value was read. Materialising under another seed
    compares digests (or shapes) and raises ``SeedError`` if they differ. ``name`` is the name of a
    tensor that realised itself, or empty if the constructor read the value.
    """

    ref: TensorRef
    before: int
    digest: bytes
    name: str = ""


NEVER = sys.maxsize  # as a number of storages
_FEW, _MANY, _MUCH = 16, 100, 1 << 20  # tensors; ops a tensor; bytes


class Ruled(NamedTuple):
    """A tensor that a rule of ``init=`` acts on.

    Attributes:
        name: its name, for messages.
        tensor: the tensor.
        ref: its window.
        rule: a function that initialises a tensor in place.
        key: the text from which the generator of the rule is seeded.
    """

    name: str
    tensor: Tensor
    ref: TensorRef
    rule: Callable[[Tensor], Any]
    key: bytes


class Program:
    """A recorded construction. Any room may read it; only recording extends it.

    ``holes`` has the stream that fills each hole, or None while the hole is open. ``seed_bound`` is
    the reason why no other seed can be honoured, or None. ``final`` is the state of the default
    generator after the block, and ``end`` the place in the streams that has this state once all
    holes are filled.

    ``seed`` is the seed of the last materialising, or None for the recorded state: tensors that
    realise themselves later use it too, so that they belong to the same construction. ``gone``
    counts the storages that no living tensor uses; when it reaches ``drop_at``, the ops that no
    living tensor needs are dropped, unless something is ``recording``. ``record_rules`` returns an
    extension of this program in which rules act on finished values. Recording sets it and
    materialising calls it, since neither room may import the other.
    """

    def __init__(self) -> None:
        self.ops: list[Op] = []
        self.storages: list[Storage] = []
        self.constants: list[Constant] = []
        self.ambients: list[Ambient] = []
        self.streams: list[Stream] = []
        self.reads: list[Read] = []
        self.holes: list[int | None] = []
        self.seed_bound: str | None = None
        self.seed: int | None = None
        self.final: bytes | None = None
        self.end: Draw | None = None
        self.merged_into: tuple[Program, Bases] | None = None
        self.recording = False
        self.record_rules: Callable[[Program, list[Ruled]], Program] | None = None
        self.rules_at: int | None = None  # in an extension: the first stream of its rules
        self.gone, self.drop_at = 0, NEVER
        self._reset()

    def _reset(self) -> None:
        self._writers: tuple[int, list[list[int]]] = (0, [])  # number of indexed ops, and the index

    def __getstate__(self) -> dict[str, Any]:
        kept = (
            "ops",
            "storages",
            "constants",
            "ambients",
            "streams",
            "reads",
            "holes",
            "seed_bound",
            "seed",
            "final",
            "end",
            "record_rules",
        )
        return {name: getattr(self, name) for name in kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.merged_into = None
        self.recording = False
        self.gone = sum(storage.gone for storage in self.storages)
        self.rest()
        self._reset()

    def extension(self, changed: Iterable[int]) -> Program:
        """A program that starts with the ops of this one and can be extended; it drops no op.

        Args:
            changed: the storages that the further ops will write.
        """
        program = Program()
        shared = self.__getstate__()
        copied = {k: list(v) if isinstance(v, list) else v for k, v in shared.items()}
        program.__dict__.update(copied)
        program.rules_at = len(self.streams)
        for number in changed:  # a temporary tensor that dies marks its storage as gone
            program.storages[number] = replace(self.storages[number])
        return program

    def writers(self, storage: int) -> list[int]:
        """The numbers of the ops that write a storage, in ascending order."""
        indexed, writers = self._writers
        if indexed != len(self.ops) or len(writers) != len(self.storages):
            writers = self._index()
        return writers[storage]

    def _index(self) -> list[list[int]]:
        """Extend the index of writers by the ops that were recorded since the last call."""
        (indexed, known), end = self._writers, len(self.ops)
        found: dict[int, list[int]] = {}
        for number in range(indexed, end):
            for ref in self.ops[number].written():
                numbers = found.setdefault(ref.storage, [])
                if not numbers or numbers[-1] != number:
                    numbers.append(number)
        writers = [*known, *([] for _ in range(len(known), len(self.storages)))]
        for storage, numbers in found.items():
            writers[storage] = writers[storage] + numbers
        # One assignment of new lists: an interrupt leaves the old index whole, and threads that
        # index at the same time do not disturb each other.
        self._writers = end, writers
        return writers

    def forget(self, number: int) -> None:
        """Drop op ``number`` and all later ops, none of which draws."""
        del self.ops[number:]
        if self._writers[0] > number:
            self._reset()

    def merged(self) -> Program:
        """The program that this one was merged into, or this program itself."""
        return self if self.merged_into is None else self.merged_into[0].merged()

    def rest(self) -> None:
        """Set ``drop_at``: unneeded ops are dropped when half of the present tensors are gone."""
        shown = len(self.storages) - self.gone
        # Each time at most half as many ops are examined as the last time, and at first no more
        # than were recorded, so the total stays proportional to the program. If few tensors need
        # much memory, ops are dropped as soon as one of these tensors is gone.
        much = len(self.ops) > _MANY * shown or any(
            c.tensor.numel() * c.tensor.element_size() > _MUCH for c in self.constants
        )
        self.drop_at = self.gone + (1 if much and shown < _FEW else (shown + 1) // 2)

    def origin(self, storage: int) -> int:
        """The storage of the construction from which a later storage was made; else itself."""
        made_of = self.storages[storage].made_of
        return storage if made_of is None else made_of

    def keep(self, needed: set[int], alike: Callable[[Op], Any]) -> None:
        """Drop all ops but some, and the constants and storages that none of these needs.

        All numbers stay. If a dropped op draws, its place in the stream goes to a kept op that
        moves a generator equally far. An interrupt at any line leaves every needed op in place.

        Args:
            needed: the numbers of the ops to keep.
            alike: returns equal values for ops that move a generator equally far.
        """
        end, first = len(self.ops), dict[Any, int]()
        for stream in self.streams:
            for place, number in enumerate(stream.ops):
                if number >= 0 and number not in needed:
                    stream.ops[place] = first.setdefault(alike(self.ops[number]), number)
        kept = needed.union(first.values())
        storages = {s.made_of for s in self.storages if not s.gone}
        constants = set[int]()
        for number in kept:
            op = self.ops[number]
            storages.update(ref.storage for ref in (*op.written(), *op.read()))
            constants |= op.constants()
        for number in range(end):
            if number not in kept:
                self.ops[number] = _DROPPED_OP
        for number, storage in enumerate(self.storages):
            if storage.gone and number not in storages:
                self.storages[number] = _DROPPED_STORAGE
        for number, constant in enumerate(self.constants):
            if number not in constants:  # in place: a program merged into this one shares it
                constant.tensor, constant.checksum = torch.empty(0), None
        self._reset()

    def draws(self) -> int:
        """The number of recorded draws, holes included."""
        return sum(len(stream.ops) for stream in self.streams)

    def covers(self, ref: TensorRef) -> bool:
        """Whether a window shows every byte of its storage exactly once."""
        # A dense window of as many bytes as the storage has shows every byte once.
        nbytes = ref.numel * ref.dtype.itemsize
        if ref.offset != 0 or nbytes != self.storages[ref.storage].nbytes:
            return False
        return ref.is_contiguous() or ref.is_dense()

    def absorb(self, other: Program) -> None:
        """Append another program to this one; afterwards ``other`` only forwards to this one.

        The slots and holes of ``other`` find their new numbers through ``merged_into``.
        """
        bases = Bases(
            op=len(self.ops),
            storage=len(self.storages),
            constant=len(self.constants),
            ambient=len(self.ambients),
            stream=len(self.streams),
            hole=len(self.holes),
        )
        self.ops += [bases.op_of(op) for op in other.ops]
        for storage in other.storages:
            if storage.made_of is not None:
                storage.made_of += bases.storage
        self.storages += other.storages
        self.constants += other.constants
        self.ambients += other.ambients
        self.streams += [bases.stream_of(stream) for stream in other.streams]
        self.holes += [h if h is None else h + bases.stream for h in other.holes]
        self.gone += other.gone
        self.reads += [
            r._replace(ref=bases.value_of(r.ref), before=r.before + bases.op) for r in other.reads
        ]
        self.seed_bound = self.seed_bound or other.seed_bound or self._follow(other, bases.stream)
        if self.end is None and other.end is not None:  # else this is the later block
            self.end = bases.draw_of(other.end)
        other.merged_into = (self, bases)

    def _follow(self, other: Program, base: int) -> str | None:
        """Let the root stream start where the root stream of an appended program ended.

        Then ``seed=`` can be honoured for both blocks: it replaces the start of the first block.

        Returns:
            None, or the reason why no other seed can be honoured.
        """
        for stream in self.streams[:base]:
            if stream.root and stream.start == other.final:
                ended = next(i for i, s in enumerate(other.streams) if s.root)
                stream.start = Draw(ended + base, len(other.streams[ended].ops))
                stream.root = False
                return None
        return "its blocks did not follow each other on the random stream"

    def __str__(self) -> str:
        lines = [f"{number:>6}  {op}" for number, op in enumerate(self.ops)]
        return "\n".join(lines) or "(an empty program)"

    def __repr__(self) -> str:
        return f"<Program: {len(self.ops)} ops, {len(self.storages)} storages>"


@dataclass(frozen=True, slots=True)
class Bases:
    """The offsets of the numbers of an appended program."""

    op: int
    storage: int
    constant: int
    ambient: int
    stream: int
    hole: int

    def value_of(self, value: Any) -> Any:
        if type(value) is TensorRef:
            return value._replace(storage=value.storage + self.storage)
        if type(value) is Const:
            return Const(value.number + self.constant)
        if type(value) is tuple:
            return tuple(self.value_of(item) for item in value)
        return value

    def draw_of(self, draw: Draw) -> Draw:
        return Draw(draw.stream + self.stream, draw.number)

    def op_of(self, op: Op) -> Op:
        return op._replace(
            args=self.value_of(op.args),
            kwargs={key: self.value_of(value) for key, value in op.kwargs.items()},
            outs=self.value_of(op.outs),
            draw=op.draw and self.draw_of(op.draw),
            ambient=op.ambient + self.ambient,
        )

    def stream_of(self, stream: Stream) -> Stream:
        start = stream.start
        return Stream(
            start=self.draw_of(start) if isinstance(start, Draw) else start,
            device=stream.device,
            root=stream.root,
            ops=[n + self.op if n >= 0 else n - self.hole for n in stream.ops],
        )
