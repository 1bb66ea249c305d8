"""The random state and lazy modules: ``settle_rng`` and ``discard``.

After a block the random state is as if its lazy modules had drawn nothing. ``settle_rng`` corrects
it once all shapes are known; ``discard`` gives up lazy modules that will never have a shape.
"""

from __future__ import annotations

import torch
from torch import nn

from lateinit._lazy.protocols import close_holes, is_lazy_module
from lateinit._program import Program
from lateinit._recording import abandoned, fill, hole_of, holes
from lateinit._replay import execution_of
from lateinit._tensors import Deferred, bound_in, ends_in, find_tensors
from lateinit._torch import name_of_class, restoring
from lateinit.errors import RecordingError


@restoring
def discard(module: nn.Module, /) -> None:
    """Give up lazy modules that were replaced or deleted before their shapes were known.

    In a model that was built in a ``deferred()`` block, random values that are drawn after a lazy
    module wait until the number of its draws is known. From this call on it draws nothing: later
    values are those of a model that never had it. (The eager twin had it and drew its values, but
    their number cannot be known.)

    Args:
        module: a lazy module, which is given up with its parts; or a model, in whose block all lazy
            modules that no longer exist are given up.

    Raises:
        TypeError: ``module`` is no module.

    Example:
        >>> with lateinit.deferred():
        ...     net = torch.nn.Sequential(lateinit.nn.LazyLinear(3), torch.nn.Linear(3, 2))
        >>> net[0] = torch.nn.Identity()
        >>> lateinit.discard(net)
        >>> lateinit.materialize(net)[1].weight.shape
        torch.Size([2, 3])
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"discard takes a module, not {type(module)}")
    if is_lazy_module(module):
        parts = [part for part in module.modules() if hole_of(part) is not None]
        given_up = [hole_of(part) for part in parts]
    else:
        parts = []
        close_holes(module)
        given_up = [hole for program in _programs_of(module) for hole in abandoned(program)]
    for hole in given_up:
        assert hole is not None
        with fill(hole):
            pass
    for part in parts:
        holes.close(part)


@restoring
def settle_rng(module: nn.Module, /) -> None:
    """Put the CPU's default generator into the state after construction of the eager twin.

    The random state after a ``deferred()`` block is as if its lazy modules had drawn nothing, since
    the number of their draws is not known there. When their shapes are known, this function sets
    the state after those draws, so that the order of data, dropout and the next model are those of
    the eager twin too. Numbers that were drawn since the block do not count.

    Args:
        module: a model that was built in one ``deferred()`` block; it may be materialised already.

    Raises:
        RecordingError: a lazy module of the block has no shape yet, or the model was built in no
            block, in several, or in one with ``advance_rng=False``.
        TypeError: ``module`` is no module.

    Example:
        >>> with lateinit.deferred():
        ...     net = torch.nn.Sequential(lateinit.nn.LazyLinear(3), torch.nn.Linear(3, 2))
        >>> _ = lateinit.infer_shapes(net, torch.empty(1, 5, device="meta"))
        >>> lateinit.settle_rng(net)
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"settle_rng takes a module, not {type(module)}")
    states = [*ends_in(module), *map(_end_of, _programs_of(module))]
    if len(set(states)) != 1 or states[0] is None:
        raise RecordingError(
            f"settle_rng takes a model of one deferred() block that advances the random state, or "
            f"what lateinit.materialize(model) has given it; for {name_of_class(module)} the "
            f"random states of {len(set(states) - {None})} blocks are known: call it on that model"
        )
    torch.set_rng_state(torch.frombuffer(bytearray(states[0]), dtype=torch.uint8))


def _end_of(program: Program) -> bytes | None:
    if program.end is None:
        return None
    execution = execution_of(program, program.seed)
    execution.check_known([program.end])
    return execution.state(program.end)


def _programs_of(module: nn.Module) -> list[Program]:
    own = [Deferred.of(f.tensor).program for f in find_tensors(module) if f.deferred]
    return list(dict.fromkeys([*own, *bound_in(module)]))
