"""How much of a deferred model one rank of a mesh would hold and draw, without any rank.

The axes are ``replicate`` (a full copy on each), ``fsdp`` (parameters cut along their first dim, as
``fully_shard`` does) and ``tp`` (cut by the model's own tensor-parallel plan, or by a given one).
The figures are those of rank 0, which has the largest of uneven shards. ``lateinit inspect --mesh``
shows them.
"""

from __future__ import annotations

import fnmatch
import math
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from lateinit._program import Program, Step, plan_storages
from lateinit._replay import fill_of
from lateinit._tensors import Deferred, Found, find_tensors
from lateinit._units import format_bytes
from lateinit.errors import ShardingError, candidates, listing

AXES = ("replicate", "fsdp", "tp")
# Elements that are drawn to measure how fast this machine draws: 16 MiB.
_TRIAL = 1 << 22


@dataclass(frozen=True, slots=True)
class Share:
    """What one rank has of a model.

    Attributes:
        mesh: the size of each axis.
        model_bytes: the bytes of the full model.
        rank_bytes: the bytes that the rank holds.
        parameters: the elements of the model's parameters.
        rank_parameters: those that the rank holds.
        buffer_bytes: the bytes of buffers and other tensors, which are not cut.
        drawn: the elements that the rank draws.
        seconds: an estimate of the time for that.
        threads: the threads that the estimate is for.
        whole: the largest tensor that is computed in full for a shard, if any.
        whole_bytes: its bytes.
    """

    mesh: dict[str, int]
    model_bytes: int
    rank_bytes: int
    parameters: int
    rank_parameters: int
    buffer_bytes: int
    drawn: int
    seconds: float
    threads: int
    whole: str | None
    whole_bytes: int

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain data."""
        return asdict(self)

    def __str__(self) -> str:
        ranks = math.prod(self.mesh.values())
        axes = " x ".join(f"{name} {size}" for name, size in self.mesh.items())
        whole = (
            f"{self.whole}, {format_bytes(self.whole_bytes)}"
            if self.whole
            else "none of its shards"
        )
        return (
            f"{axes}: {ranks:,} rank{'s' * (ranks != 1)}\n"
            f"the model    {self.parameters:,} parameters, {format_bytes(self.model_bytes)}\n"
            f"each rank    {self.rank_parameters:,} parameters, {format_bytes(self.rank_bytes)}, "
            f"of which {format_bytes(self.buffer_bytes)} are buffers and other tensors\n"
            f"at once      {format_bytes(self.rank_bytes + self.whole_bytes)} at most; computed "
            f"whole on the way to a shard: {whole}\n"
            f"time         about {self.seconds:.2g} s to draw {self.drawn:,} elements, by "
            f"{self.threads} thread{'s' * (self.threads != 1)} of this machine"
        )


def parse_mesh(text: str) -> dict[str, int]:
    """Parse the axes of ``fsdp=64,tp=8``.

    Raises:
        ShardingError: an axis is unknown, is given twice, or has no positive size.
    """
    mesh: dict[str, int] = {}
    for part in text.split(","):
        name, _, size = (word.strip() for word in part.partition("="))
        if name not in AXES:
            near = candidates(name, AXES)
            raise ShardingError(f"--mesh {text}: no axis is called {name!r}; there are: {near}")
        if name in mesh or not size.isdecimal() or int(size) < 1:
            raise ShardingError(f"--mesh {text}: {name} needs one size of 1 or more: {name}=8")
        mesh[name] = int(size)
    return mesh


def share_of_rank(
    model: nn.Module, mesh: Mapping[str, int], plan: Mapping[str, str] | None = None
) -> Share:
    """What rank 0 of a mesh would hold of a deferred model, and how long it would draw.

    Args:
        model: a deferred module; nothing of it is changed.
        mesh: the size of each axis.
        plan: how parameters are cut along ``tp``: globs on the fully qualified names of modules or
            parameters, each with a style that has ``colwise`` or ``rowwise`` in its name, as in
            ``transformers``. By default the model's own plan.

    Raises:
        ShardingError: there is a ``tp`` axis and no plan, or a pattern of the plan matches nothing.
    """
    dims = _cut_by_plan(model, mesh, plan)
    held = parameters = rank_parameters = buffers = drawn = 0
    largest: tuple[int, str | None] = (0, None)
    total = 0
    for found in find_tensors(model):
        nbytes = found.tensor.numel() * found.tensor.element_size()
        total += nbytes
        if found.kind != "parameter":
            buffers += nbytes
            held += nbytes
            continue
        shape = _shard(tuple(found.tensor.shape), dims.get(found.name), mesh)
        count = math.prod(shape)
        parameters += found.tensor.numel()
        rank_parameters += count
        held += count * found.tensor.element_size()
        cost, whole = _cost(found, shape)
        drawn += cost
        if whole:
            largest = max(largest, (nbytes, found.name))
    threads = torch.get_num_threads()
    return Share(
        mesh=dict(mesh),
        model_bytes=total,
        rank_bytes=held,
        parameters=parameters,
        rank_parameters=rank_parameters,
        buffer_bytes=buffers,
        drawn=drawn,
        seconds=drawn * _seconds_to_draw() / threads,
        threads=threads,
        whole=largest[1],
        whole_bytes=largest[0],
    )


def _shard(shape: tuple[int, ...], dim: int | None, mesh: Mapping[str, int]) -> tuple[int, ...]:
    """The shape of rank 0's shard: cut along ``dim`` by ``tp``, then along dim 0 by FSDP."""
    sizes = list(shape)
    for place, parts in ((dim, mesh.get("tp", 1)), (0, mesh.get("fsdp", 1))):
        if place is not None and sizes:
            sizes[place] = -(-sizes[place] // parts)
    return tuple(sizes)


def _cost(found: Found, shape: tuple[int, ...]) -> tuple[int, bool]:
    """The elements drawn for a shard, and whether the full tensor is computed for it."""
    if not found.deferred:
        return 0, False
    deferred = Deferred.of(found.tensor)
    program, ref = deferred.program, deferred.ref
    steps = plan_storages(program, [ref.storage])
    draws = any(program.ops[n].draw is not None for step in steps for n in step.ops)
    whole = found.tensor.numel()
    if not all(_in_ranges(program, step) for step in steps):
        return whole * draws, math.prod(shape) < whole
    # Rows are drawn from end to end, whichever of their columns are kept (`shard_ranges.leaves`).
    return math.prod((shape[0], *ref.size[1:])) * draws if shape else whole * draws, False


def _in_ranges(program: Program, step: Step) -> bool:
    """Whether a step fills a tensor in flat order, so that a part of it can be computed alone."""
    fill = fill_of(program, step)
    return fill is not None and len(fill.ops) == len(step.ops)


def _cut_by_plan(
    model: nn.Module, mesh: Mapping[str, int], plan: Mapping[str, str] | None
) -> dict[str, int]:
    """The dim along which tensor parallelism cuts each parameter."""
    if mesh.get("tp", 1) == 1:
        return {}
    known = plan if plan is not None else getattr(model, "_tp_plan", None)
    if not known:
        raise ShardingError(
            f"{type(model).__name__} has no plan of tensor parallelism of its own: give one, as in "
            '--tp-plan \'{"*.up": "colwise", "*.down": "rowwise"}\''
        )
    found: dict[str, int] = {}
    parameters = dict(model.named_parameters())
    unmatched = []
    for pattern, style in known.items():
        names = [n for n in parameters if _matches(n, pattern)]
        # A model's own plan may name modules that this configuration lacks.
        if not names and plan is not None:
            unmatched.append(pattern)
        for name in names:
            dim = _dim(style, parameters[name].dim(), name)
            if dim is not None:
                found[name] = dim
    if unmatched:
        near = candidates(unmatched[0], parameters)
        raise ShardingError(
            f"the plan's {listing(unmatched)} matches no parameter; there are: {near}"
        )
    return found


def _matches(name: str, pattern: str) -> bool:
    return any(fnmatch.fnmatchcase(n, pattern) for n in (name, name.rpartition(".")[0]))


def _dim(style: str, dims: int, name: str) -> int | None:
    if "embedding" in style:
        return 0
    if "colwise" in style:
        return max(0, dims - 2)
    if "rowwise" in style and dims > 1 and not name.endswith(".bias"):
        return dims - 1
    return None


def _seconds_to_draw() -> float:
    """The time that one thread of this machine takes to draw an element: the best of three."""
    trial, generator = torch.empty(_TRIAL), torch.Generator()
    times = []
    for _ in range(3):
        started = time.perf_counter()
        trial.normal_(generator=generator)
        times.append(time.perf_counter() - started)
    return min(times) / _TRIAL
