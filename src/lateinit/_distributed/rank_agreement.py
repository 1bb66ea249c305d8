"""Check that the ranks of a mesh are about to fill the shards of one and the same model.

Each rank fills its shards alone. They are parts of one model only if all ranks recorded the same
ops for them, from the same random state and after the same draws, compute these with kernels that
give the same bits, and load the same files. Digests of all this are compared. If they differ, all
ranks exchange more, to name the difference.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch

from lateinit._distributed.ranks import Ranks, by_words
from lateinit._program import Const, Draw, Op, Program, TensorRef
from lateinit._replay import costs_of, needed_for, one_thread, recorded_seed, sample_of
from lateinit._tensors import Deferred
from lateinit._torch import digest
from lateinit._version import __version__
from lateinit.errors import ShardingError, listing

# Bytes kept of each op's digest. They only locate the first difference; equality is decided by a
# full SHA-256 over all of them.
_HASH = 8


class Draws(NamedTuple):
    """The costs of the draws of one stream."""

    costs: list[Any]

    def __str__(self) -> str:
        return f"{len(self.costs)} draws (of the digest {_sha(self)[:12]})"


class Agreement:
    """Everything that determines the values of a rank's shards; ``Ranks`` compare it.

    Args:
        shards: all shards, deferred or real, by fully qualified name.
        left: the shards still to compute.
        seed: the seed that replaces the recorded random state.
        dtype_of: the dtype that a shard will have.
        files: a text that identifies the tensors to load.
    """

    def __init__(
        self,
        shards: Mapping[str, Any],
        left: Iterable[Deferred],
        seed: int | None,
        dtype_of: Callable[[Any], torch.dtype],
        files: str = "",
    ) -> None:
        self._placed = {name: _placed(shard, dtype_of(shard)) for name, shard in shards.items()}
        self._left = list(left)
        self._seed = seed
        self._files = files
        self._account = _account(self._left, seed)

    @property
    def summary(self) -> tuple[Any, ...]:
        return _sha(self._placed), _sha(self._names()), self._files, *self._account.summary

    def compare(self, ranks: Ranks) -> None:
        """Raise ``ShardingError`` that names the difference, if any that matters exists.

        A collective operation: all ranks call it.
        """
        if len(ranks.say(_sha(self._names()))) > 1:
            # After a call that failed on some ranks, the ranks have different shards left. A shard
            # with values on any rank was compared before.
            common = ranks.gather(
                frozenset(self._names()), lambda said: said[0].intersection(*said)
            )
            self._account = _account([d for d in self._left if d.name in common], self._seed)
        if len(ranks.say((_sha(self._placed), self._files, self._account.summary))) > 1:
            raise ShardingError(self._difference(ranks))

    def _names(self) -> list[str]:
        return [deferred.name for deferred in self._left]

    def _difference(self, ranks: Ranks) -> str:
        """The difference between the ranks, in words; a collective operation."""
        account = self._account
        hashes = ranks.say(account.hashes)
        place = _first_difference(list(hashes))
        ops = ranks.say(str(account.ops[place]) if place < len(account.ops) else "nothing more")
        settings, starts, files = map(ranks.say, (account.setting, account.start, self._files))
        samples, placed = map(ranks.say, (_items(account.samples), _items(self._placed)))
        if len(settings) > 1:
            return (
                f"the ranks compute with different kernels, which give different bits: "
                f"{by_words(settings)}. {_WAYS_OUT}"
            )
        early = [deferred.name for deferred in self._left if _is_construction(deferred)]
        if len(hashes) > 1 and early:
            return (
                f"{listing(early)}: sharded inside `with lateinit.deferred():`, in a way that was "
                "recorded as a part of the construction. So that differs between the ranks, first "
                f"at op {place}: {by_words(ops)}. Shard the model after the block, before "
                "materialize()"
            )
        if len(hashes) > 1:
            return (
                f"the ranks recorded different constructions, first at op {place}: "
                f"{by_words(ops)}. Build the same model, by the same code and configuration, on "
                "every rank"
            )
        if len(starts) > 1:
            return (
                "the ranks recorded the construction from different random states: "
                f"{by_words(starts)}. Call torch.manual_seed() with the same seed on every rank, "
                "before `with lateinit.deferred():`"
            )
        if len(files) > 1:
            return (
                f"the ranks load different tensors: {by_words(files)}. Give every rank the same "
                "checkpoint, or a copy of it, and the same key=, prefix= and rename="
            )
        if len(samples) > 1:
            return (
                "the ranks compute with different kernels, which give different bits: a sample of "
                f"{_first_unlike(samples, 'not computed')}. {_WAYS_OUT}"
            )
        return (
            f"the ranks make different shards: {_first_unlike(placed, 'not sharded')}. Shard and "
            "cast the model in the same way, and give the same arguments, on every rank"
        )


def _common(said: list[frozenset[str]]) -> frozenset[str]:
    return frozenset.intersection(*said)


def _items(found: Mapping[str, str]) -> tuple[tuple[str, str], ...]:
    return tuple(found.items())


def _first_unlike(found: Mapping[tuple[tuple[str, str], ...], Iterable[int]], lacking: str) -> str:
    """The first name with different values on the ranks, and these values."""
    told = [(dict(items), ranks) for items, ranks in found.items()]
    for name in dict.fromkeys(name for items, _ in told for name in items):
        words: dict[str, list[int]] = {}
        for items, ranks in told:
            words.setdefault(items.get(name, lacking), []).extend(ranks)
        if len(words) > 1:
            return f"{name!r} is {by_words(words)}"
    return "the same names come in another order"


_WAYS_OUT = (
    "Use one kind of host and one installation for all ranks of a mesh, or set "
    "ATEN_CPU_CAPABILITY to one value on all of them; or compute on one host and send: "
    "lateinit.save_checkpoint() there, lateinit.load_checkpoint() on every rank"
)


@dataclass(frozen=True, slots=True)
class _Account:
    """Everything that one rank computes.

    Attributes:
        start: the random state from which it started, in words.
        ops: the ops of the construction that the shards depend on, and the costs of draws.
        hashes: a short digest of each of these, concatenated.
        samples: for each kernel that the ops use, a digest of its results for a small sample.
        setting: the versions and vector extensions that select kernels; empty without ops.
    """

    start: str
    ops: list[Op | Draws]
    hashes: bytes
    samples: dict[str, str]
    setting: str

    @property
    def summary(self) -> tuple[str, ...]:
        ops = hashlib.sha256(self.hashes).hexdigest()
        return self.start, ops, _sha(self.samples), self.setting


def _account(left: Iterable[Deferred], seed: int | None) -> _Account:
    # A shard without elements is made from a parameter too, but does not depend on its ops.
    whole: dict[Program, set[int]] = {}
    for shard in left:
        program = shard.program
        whole.setdefault(program, set()).add(program.origin(shard.ref.storage))
    ops: list[Op | Draws] = []
    hashes: list[bytes] = []
    samples: dict[str, dict[str, None]] = {}
    for program, storages in whole.items():
        # Only these ops exist on every rank: ops that no tensor of a rank needs are dropped
        # (``Program.keep``).
        needed = [program.ops[number] for number in sorted(needed_for(program, storages))]
        # Sorted by the storages that they write, not by number: dead ops are missing, so only ops
        # on the same storage can be compared in order.
        needed.sort(key=lambda op: [ref.storage for ref in op.written()])
        own = [*filter(partial(_in_block, program), needed)]
        # The streams of rules are left out: a rank has them only for the shards that it must fill.
        every: list[Op | Draws] = [*own, *map(Draws, costs_of(program)[: program.rules_at])]
        names: dict[int, int] = {}
        ops += every
        hashes += [_hash(_plain(op, program, names)) for op in every]
        with one_thread:
            found = [sample_of(program, op) for op in own]
        for kernel, sample in (item for each in found for item in each.items()):
            samples.setdefault(kernel, {})[sample] = None
    start = "; ".join(dict.fromkeys(_start(program, seed) for program in whole))
    short = b"".join(each[:_HASH] for each in hashes)
    setting = (
        f"torch {torch.__version__}, lateinit {__version__}, "
        f"CPU capability {torch.backends.cpu.get_cpu_capability()}"
    )
    kernels = {kernel: _sha(list(found))[:12] for kernel, found in sorted(samples.items())}
    return _Account(start, ops, short, kernels, setting if kernels else "")


def _is_construction(shard: Deferred) -> bool:
    """Whether the local part of a shard was made by the construction itself."""
    return not shard.storage.followed


def _in_block(program: Program, op: Op) -> bool:
    """Whether an op belongs to the construction; the ops of sharding differ between ranks."""
    return not any(program.storages[ref.storage].followed for ref in op.written())


def _plain(value: Any, program: Program, names: dict[int, int]) -> Any:
    """An argument of an op in a form that is the same in every process.

    Storages are numbered in the order in which the ops name them.
    """
    if type(value) is Op:
        parts = (value.args, sorted(value.kwargs.items()), value.outs, value.draw)
        ambient = program.ambients[value.ambient]
        return value.name, ambient, [_plain(part, program, names) for part in parts]
    if type(value) is Draw and program.rules_at is not None and value.stream >= program.rules_at:
        return program.streams[value.stream].start, value.number
    if type(value) is TensorRef:
        number = names.setdefault(value.storage, len(names))
        return tuple(value._replace(storage=number))
    if type(value) is Const:
        return digest(program.constants[value.number].tensor)
    if type(value) in (tuple, list):
        return [_plain(item, program, names) for item in value]
    return value


def _start(program: Program, seed: int | None) -> str:
    """The random state that a construction starts from, in words."""
    if seed is not None:
        return f"seed={seed}"
    streams = program.streams[: program.rules_at]
    states = [s.start for s in streams if isinstance(s.start, bytes)]
    known = recorded_seed(program)
    if known is not None and len(states) == 1:
        return f"seed {known}"
    return f"the random state {hashlib.sha256(b''.join(states)).hexdigest()[:12]}"


def _placed(tensor: Any, dtype: torch.dtype) -> str:
    mesh, sizes = tensor.device_mesh, tuple(tensor.shape)
    names = mesh.mesh_dim_names or ()
    return f"{sizes} {dtype} as {tensor.placements} on a mesh {tuple(mesh.shape)} {tuple(names)}"


def _sha(value: Any) -> str:
    return _hash(value).hex()


def _hash(value: Any) -> bytes:
    return hashlib.sha256(repr(value).encode()).digest()


def _first_difference(hashes: Iterable[bytes]) -> int:
    """The number of the first op that differs between ranks."""
    every = list(hashes)
    shortest = min(map(len, every)) // _HASH
    for place in range(shortest):
        if len({h[place * _HASH : (place + 1) * _HASH] for h in every}) > 1:
            return place
    return shortest
