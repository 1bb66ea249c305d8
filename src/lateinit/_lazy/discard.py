"""``discard``: do without lazy modules whose shapes nobody will know."""

from __future__ import annotations

from torch import nn

from lateinit._lazy.protocols import is_lazy_module
from lateinit._recording import abandoned, fill, hole_of, holes
from lateinit._tensors import Deferred, bound_in, find_tensors
from lateinit._torch import restoring


@restoring
def discard(module: nn.Module, /) -> None:
    """Do without lazy modules that were replaced or deleted before their shapes were known.

    In a model that was built in a ``deferred()`` block, random values that come after a lazy module
    wait until it is known how much it draws. From this call on it draws nothing: later values are
    those of a model that never had it. (The eager twin had it and drew its values; nobody can tell
    how many.)

    Args:
        module: a lazy module, which is given up with all that it holds; or a model, whose block is
            searched for lazy modules that are gone.

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
        own = [Deferred.of(f.tensor).program for f in find_tensors(module) if f.deferred]
        programs = dict.fromkeys([*own, *bound_in(module)])
        given_up = [hole for program in programs for hole in abandoned(program)]
    for hole in given_up:
        assert hole is not None
        with fill(hole):
            pass
    for part in parts:
        holes.close(part)
