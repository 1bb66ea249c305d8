"""Whether the ranks of a mesh recorded one and the same construction.

Each rank computes its shards alone. They are parts of one model only if all ranks recorded the same
ops for them, from the same random state and after the same draws. A digest of these is compared
once, along every axis of the meshes that the shards are on. If the digests differ, all ranks
exchange more, to say in what.
"""

from __future__ import annotations

import hashlib
from collections import ChainMap
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, TypeVar

import torch.distributed as dist

from lateinit._program import Const, Op, Program, TensorRef
from lateinit._replay import costs_of, needed_for, recorded_seed
from lateinit._tensors import Deferred
from lateinit._torch import digest
from lateinit.errors import ShardingError, listing

T = TypeVar("T")
# Bytes kept of each op's digest. They only locate the first difference; equality is decided by a
# full SHA-256 over all of them.
_HASH = 8


def agree(shards: dict[str, Any], program: Program, seed: int | None) -> None:
    """Raise on every rank unless all ranks of the shards' meshes agree.

    A collective operation: every rank of the meshes must call it.

    Args:
        shards: the ``DTensor`` of each fully qualified name.
        program: the program they were recorded in.
        seed: the seed that replaces the recorded random state.

    Raises:
        ShardingError: another rank recorded another construction, started from another random
            state, or sharded otherwise; or it did not answer.
    """
    account, groups = _account(shards, program, seed), list(_groups(shards.values()))
    told = _spread(frozenset({account.summary}), groups, lambda a: frozenset().union(*a))
    if len(told) > 1:
        early = [name for name, tensor in shards.items() if _is_construction(program, tensor)]
        raise ShardingError(_difference(account, groups, early))


class Draws(NamedTuple):
    """What the draws of one stream cost."""

    costs: list[Any]

    def __str__(self) -> str:
        digest = hashlib.sha256(repr(self).encode()).hexdigest()[:12]
        return f"{len(self.costs)} draws (of the digest {digest})"


@dataclass(frozen=True, slots=True)
class _Account:
    """What one rank recorded.

    Attributes:
        start: the random state it started from, in words.
        placed: how each tensor is sharded.
        ops: the ops of the construction that the shards depend on, and what draws cost.
        hashes: a short digest of each of them, one after another.
    """

    start: str
    placed: dict[str, str]
    ops: list[Op | Draws]
    hashes: bytes

    @property
    def summary(self) -> tuple[str, bytes, bytes]:
        placed = hashlib.sha256(repr(self.placed).encode()).digest()
        return self.start, placed, hashlib.sha256(self.hashes).digest()


def _account(shards: dict[str, Any], program: Program, seed: int | None) -> _Account:
    # Only these are there on every rank: what no tensor of a rank needs is dropped (``keep``). A
    # shard without elements is made of a parameter too, but does not depend on its ops.
    whole = {program.origin(Deferred.of(tensor).ref.storage) for tensor in shards.values()}
    needed = [program.ops[number] for number in sorted(needed_for(program, whole))]
    # By what they write, and not by number: dead ops are not there, so that only the ops on one
    # storage can be set against each other.
    needed.sort(key=lambda op: [ref.storage for ref in op.written()])
    ops: list[Op | Draws] = [
        *filter(partial(_in_block, program), needed),
        *map(Draws, costs_of(program)),
    ]
    names: dict[int, int] = {}
    hashes = (hashlib.sha256(repr(_plain(op, program, names)).encode()).digest() for op in ops)
    placed = {name: _placed(tensor) for name, tensor in shards.items()}
    return _Account(_start(program, seed), placed, ops, b"".join(h[:_HASH] for h in hashes))


def _is_construction(program: Program, tensor: Any) -> bool:
    """Whether the local part of a shard was made by the construction itself."""
    return not program.storages[Deferred.of(tensor).ref.storage].followed


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
    states = [s.start for s in program.streams if isinstance(s.start, bytes)]
    known = recorded_seed(program)
    if known is not None and len(states) == 1:
        return f"seed {known}"
    return f"the random state {hashlib.sha256(b''.join(states)).hexdigest()[:12]}"


def _placed(tensor: Any) -> str:
    mesh, sizes = tensor.device_mesh, tuple(tensor.shape)
    names = mesh.mesh_dim_names or ()
    return f"{sizes} as {tensor.placements} on a mesh {tuple(mesh.shape)} {tuple(names)}"


def _groups(shards: Iterable[Any]) -> Iterator[dist.ProcessGroup]:
    """The process groups along the axes of all meshes, each once, in one order on all ranks."""
    seen: set[str] = set()
    for tensor in shards:
        for group in tensor.device_mesh.get_all_groups():
            # torch's fake process group (for tests and tracing) has no other ranks to ask.
            if group.group_name not in seen and dist.get_backend(group) != "fake":
                seen.add(group.group_name)
                yield group


def _spread(value: T, groups: list[dist.ProcessGroup], merge: Callable[[list[T]], T]) -> T:
    """Merge the values of all ranks, along one axis after the other."""
    for group in groups:
        answers: list[Any] = [None] * dist.get_world_size(group)
        try:
            dist.all_gather_object(answers, value, group=group)
        except RuntimeError as error:
            ranks = listing(map(str, dist.get_process_group_ranks(group)))
            raise ShardingError(
                f"not all of the ranks {ranks} answered when they were asked what they recorded: "
                "one of them failed, or did not call materialize() on the same shards "
                f"({str(error).splitlines()[0]})"
            ) from error
        value = merge(answers)
    return value


def _difference(account: _Account, groups: list[dist.ProcessGroup], early: list[str]) -> str:
    """In what the ranks differ. A collective operation: all of them call it.

    Args:
        account: what this rank recorded.
        groups: the process groups to ask.
        early: the names of shards that the construction itself has made.
    """

    def by_rank(value: T) -> dict[int, T]:
        spread = _spread({dist.get_rank(): value}, groups, lambda a: dict(ChainMap(*a)))
        return dict(sorted(spread.items()))

    hashes = by_rank(account.hashes)
    place = _first_difference(list(hashes.values()))
    ops = by_rank(str(account.ops[place]) if place < len(account.ops) else "nothing more")
    starts, placed = by_rank(account.start), by_rank(account.placed)
    if len(set(hashes.values())) > 1 and early:
        return (
            f"{listing(early)}: sharded inside `with lateinit.deferred():`, in a way that was "
            "recorded as a part of the construction. So that differs between the ranks, first at "
            f"op {place}: {_told(ops)}. Shard the model after the block, before materialize()"
        )
    if len(set(hashes.values())) > 1:
        return (
            f"the ranks recorded different constructions, first at op {place}: {_told(ops)}. Build "
            "the same model, by the same code and configuration, on every rank"
        )
    if len(set(starts.values())) > 1:
        return (
            f"the ranks recorded the construction from different random states: {_told(starts)}. "
            "Call torch.manual_seed() with the same seed on every rank, before "
            "`with lateinit.deferred():`"
        )
    for name in dict.fromkeys(name for each in placed.values() for name in each):
        found = {rank: each.get(name, "not sharded") for rank, each in placed.items()}
        if len(set(found.values())) > 1:
            return f"the ranks shard the model differently: {name!r} is {_told(found)}"
    return "the ranks shard the model differently: their parameters come in another order"


def _told(found: dict[int, str]) -> str:
    """What each rank said, ranks that said the same together."""
    ranks: dict[str, list[str]] = {}
    for rank, words in found.items():
        ranks.setdefault(words, []).append(str(rank))
    return "; ".join(f"{words} on rank {listing(who)}" for words, who in ranks.items())


def _first_difference(hashes: list[bytes]) -> int:
    """The number of the first op that differs between ranks."""
    shortest = min(map(len, hashes)) // _HASH
    for place in range(shortest):
        if len({h[place * _HASH : (place + 1) * _HASH] for h in hashes}) > 1:
            return place
    return shortest
