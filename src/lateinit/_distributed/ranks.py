"""Ranks that make one call: at the end of each phase they exchange their results.

A phase that fails on one rank fails on all of them, each with an error that names the phase. These
rules prevent deadlocks:

- A rank sends one *word* for each phase, in every case: an error is a word too.
- A word names the call and the phase. If a rank was interrupted and calls again, its word differs
  from those of the ranks that still wait for it, and all of them raise.
- Groups communicate in the order of their names, which is the same on all ranks, so that no two
  ranks wait for each other in two groups.
- If a rank sends nothing (it is dead, or never made the call), the others raise after the timeout
  of the group.

Only ranks that hold shards on a common mesh communicate (``ranks_of``). Without shards there is no
communication. ``every_rank`` is for calls that all ranks make, with shards or without.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch.distributed as dist

from lateinit._tensors import Only, shards_in
from lateinit.errors import LateinitError, ShardingError, listing

T = TypeVar("T")
# The most characters of an error that are sent to other ranks.
_LONGEST = 1000
_Word = tuple[str, str, str, tuple[Any, ...]]  # call, phase, error, and a summary to compare


class Compared(Protocol):
    """State that must be the same on all ranks.

    Attributes:
        summary: differs between ranks if the state differs.
    """

    @property
    def summary(self) -> tuple[Any, ...]: ...

    def compare(self, ranks: Ranks) -> None:
        """Raise ``ShardingError`` with the difference; collective, called if summaries differ."""


class Arguments:
    """The arguments of a call that must be the same on all ranks; ``Ranks`` compare them.

    Args:
        said: the arguments, in words.
    """

    def __init__(self, said: str) -> None:
        self.summary = (said,)

    def compare(self, ranks: Ranks) -> None:
        """Raise ``ShardingError`` with the difference; a collective operation."""
        found = ranks.say(self.summary[0])
        raise ShardingError(
            f"the ranks were given different arguments: {by_words(found)}. Give every rank the same"
        )


@dataclass(slots=True)
class Phase:
    """A phase of a call; the code in the phase sets ``compared``."""

    compared: Compared | None = None


class Ranks:
    """The ranks of some process groups.

    Args:
        call: the public function that was called, for messages.
        groups: the groups, in an order that is the same on all of their ranks.
        shards: the shards that they hold, by fully qualified name.
    """

    def __init__(self, call: str, groups: Iterable[Any], shards: Mapping[str, Any]) -> None:
        self.shards = shards
        self._call = call
        # torch's fake process group (for tests and tracing) has no other ranks.
        self._groups = [
            group
            for group in groups
            if dist.get_backend(group) != "fake" and dist.get_world_size(group) > 1
        ]

    def __bool__(self) -> bool:
        """Whether there is another rank to communicate with."""
        return bool(self._groups)

    @contextlib.contextmanager
    def together(self, name: str) -> Iterator[Phase]:
        """Run a block as a phase: a collective operation of all the ranks.

        Args:
            name: the work of the phase, for messages.

        Raises:
            ShardingError: another rank failed, did not answer, is in another phase, or differs in
                ``compared``. An error of this rank is raised itself.
        """
        phase = Phase()
        if not self:
            yield phase
            return
        try:
            yield phase
        except Exception as error:
            with contextlib.suppress(ShardingError):
                self._say(name, f"{type(error).__name__}: {error}"[:_LONGEST])
            raise
        compared = phase.compared
        said = self._say(name, "", () if compared is None else compared.summary)
        failed = {words: ranks for (_, _, words, _), ranks in said.items() if words}
        if failed:
            errors = "; ".join(f"on rank {listing(map(str, w))}: {e}" for e, w in failed.items())
            raise ShardingError(
                f"{self._call} failed, {name}, {errors}. What is done stands: when that is mended, "
                f"call it again on every rank{self._of_mesh()}"
            )
        places: dict[str, tuple[int, ...]] = {}
        for (call, where, _, _), who in said.items():
            places[f"in {call}, {where},"] = (*places.get(f"in {call}, {where},", ()), *who)
        if len(places) > 1:
            raise ShardingError(
                f"the ranks are not in the same call: {by_words(places)}. Call "
                f"{self._call} on every rank{self._of_mesh()}, in the same order"
            )
        if len(said) > 1 and compared is not None:
            compared.compare(self)

    def gather(self, value: T, merge: Callable[[list[T]], T]) -> T:
        """Merge the values of all ranks, along one axis after the other; a collective operation."""
        return self._spread(value, merge, "comparing what the ranks have")

    def say(self, value: T) -> dict[T, tuple[int, ...]]:
        """The values of all ranks, each with the ranks that have it; a collective operation."""
        return self.gather({value: (dist.get_rank(),)}, _joined)

    def _say(
        self, phase: str, error: str, summary: tuple[Any, ...] = ()
    ) -> dict[_Word, tuple[int, ...]]:
        """Send a word, and return the words of all ranks, each with the ranks that sent it."""
        # Plain data alone, since other ranks may have other versions of these classes.
        own: dict[_Word, tuple[int, ...]] = {
            (self._call, phase, error, summary): (dist.get_rank(),)
        }
        return self._spread(own, _joined, phase)

    def _spread(self, value: T, merge: Callable[[list[T]], T], phase: str) -> T:
        for group in self._groups:
            answers: list[Any] = [None] * dist.get_world_size(group)
            with answered(self._call, phase, group, errors=Exception):
                dist.all_gather_object(answers, value, group=group)
            value = merge(answers)
        return value

    def _of_mesh(self) -> str:
        return " of the mesh" if self.shards else ""


def is_running() -> bool:
    """Whether there is a default process group."""
    return dist.is_available() and dist.is_initialized()


def ranks_of(target: Any, call: str, *, only: Only | None = None, ask: bool = True) -> Ranks:
    """The ranks that hold the shards of a target, real or deferred; no ranks if not ``ask``."""
    shards = shards_in(target, only) if ask and is_running() else {}
    return Ranks(call, _groups(shards.values()), shards)


def every_rank(call: str, group: Any = None) -> Ranks:
    """All ranks of the default process group; ``group``: another group of all ranks to use."""
    return Ranks(call, [group or dist.group.WORLD] if is_running() else [], {})


@contextlib.contextmanager
def answered(
    call: str, phase: str, group: Any = None, *, errors: type[Exception] = RuntimeError
) -> Iterator[None]:
    """Raise errors of a process group as ``ShardingError``.

    Args:
        call: the public function that was called, for messages.
        phase: what is done in the block, for messages.
        group: whose ranks are asked, for messages; by default all.
        errors: the errors that come from the group.
    """
    try:
        yield
    except LateinitError:
        raise
    except errors as error:
        who = "ranks"
        if group is not None:
            who = f"of the ranks {listing(map(str, dist.get_process_group_ranks(group)))}"
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ShardingError(
            f"{call}, {phase}: not all {who} answered. One of them has ended, is busy for "
            "longer than the timeout of the process group, or did not make the same call on the "
            f"same shards ({reason})"
        ) from error


def by_words(found: Mapping[Any, Iterable[int]]) -> str:
    """The values of the ranks in words, each with the ranks that have it."""
    return "; ".join(f"{words} on rank {listing(map(str, who))}" for words, who in found.items())


def _groups(shards: Iterable[Any]) -> list[Any]:
    """The process groups along the axes of all meshes, each once, in the order of their names."""
    found: dict[str, Any] = {}
    meshes = {id(shard.device_mesh): shard.device_mesh for shard in shards}
    for mesh in meshes.values():
        # A rank that is not in a mesh has no shards on it.
        for group in mesh.get_all_groups() if mesh.get_coordinate() is not None else ():
            found[group.group_name] = group
    return [found[name] for name in sorted(found)]


def _joined(answers: list[dict[T, tuple[int, ...]]]) -> dict[T, tuple[int, ...]]:
    found: dict[T, set[int]] = {}
    for answer in answers:
        for word, ranks in answer.items():
            found.setdefault(word, set()).update(ranks)
    every = {word: tuple(sorted(ranks)) for word, ranks in found.items()}
    return dict(sorted(every.items(), key=lambda item: item[1]))
