"""``Execution``: the values of a program under one seed."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from lateinit._program import Program, Step, TensorRef, plan_storages
from lateinit._replay.chunks import after_redrawing, fill_of
from lateinit._replay.session import Computed, Memory, Session, failed
from lateinit._replay.streams import Streams
from lateinit._rng import set_state, state_of
from lateinit._torch import is_out_of_memory, operators, turn, without_modes
from lateinit.errors import LateinitError

one_thread = turn()
"""The lock to hold while realising tensors.

Replay sets process-wide state, such as the default dtype (``Ambient.in_force``). And two threads
that realise tensors on one storage must end up with one real storage.
"""


class Execution(Streams):
    """The generator states and values of a program under one seed. Get it by ``execution_of``.

    Threads may share it: all state that changes while steps run belongs to a ``Session``.
    """

    def session(self) -> Session:
        """A session to run steps in."""
        return Session(self)

    def values(self, storages: Iterable[int], before: int | None = None) -> dict[int, Computed]:
        """Compute storages as they are before op number ``before`` (by default: at the end)."""
        found: dict[int, Computed] = {}
        with self.session() as session:
            for step in plan_storages(self.program, storages, before):
                found |= session.run(step)
        return found

    def value(self, ref: TensorRef, before: int | None = None) -> Tensor:
        """Compute one tensor as it is before op number ``before``."""
        return ref.on(self.values([ref.storage], before)[ref.storage].storage)

    def draw(self, number: int, generator: torch.Generator) -> None:
        """Run one op to move the generator past its draw; its values are discarded.

        The distance may depend on earlier draws, which are replayed along the same streams.

        Args:
            number: the number of the op.
            generator: a generator in the state before the draw; it ends in the state after it.
        """
        op = self.program.ops[number]
        step = Step((number,), ())
        fill = fill_of(self.program, step) if op.name == operators.TRUNCATED else None
        if fill is not None:
            with without_modes():
                set_state(generator, after_redrawing(self.late, fill, state_of(generator)))
            return
        read = self.values(dict.fromkeys(ref.storage for ref in op.read()), number)
        with self.session() as session, self.program.ambients[op.ambient].in_force():
            memory = Memory({n: found.storage for n, found in read.items()})
            try:
                session.call(op, memory, generator)
            except RuntimeError as error:
                if is_out_of_memory(error) or isinstance(error, LateinitError):
                    raise
                raise failed(number, op, error) from error


_Key = tuple[int | None, Any]
_known: weakref.WeakKeyDictionary[Program, dict[_Key, Execution]] = weakref.WeakKeyDictionary()


def execution_of(
    program: Program, seed: int | None = None, *, past_holes: bool = False
) -> Execution:
    """The execution of a program, made once for each seed and policy for holes.

    Args:
        program: the program.
        seed: replaces the recorded state of the default generator; None keeps it.
        past_holes: assume that open holes draw nothing, instead of raising at draws after them.
    """
    # States found past open holes are valid until one of the holes is filled. A seed replaces the
    # start of root streams, and merging programs changes which streams are roots.
    roots = tuple(n for n, s in enumerate(program.streams) if s.root) if seed is not None else ()
    key = seed, (roots, tuple(program.holes) if past_holes else None)
    kept = _known.setdefault(program, {})
    if seed is not None:  # keep at most one execution under another seed
        for other in [k for k in kept if k[0] is not None and k != key]:
            kept.pop(other, None)
    # setdefault is atomic: threads that come here at the same time get the same execution.
    return kept.get(key) or kept.setdefault(key, Execution(program, seed, past_holes))


def forget_executions(program: Program) -> None:
    """Drop the cached executions of a program; ``execution_of`` makes them anew."""
    _known.pop(program, None)
