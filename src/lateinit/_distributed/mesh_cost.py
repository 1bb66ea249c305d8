"""The memory and draws of one rank of a mesh for a deferred model, computed without any rank.

The axes are ``replicate`` (a full copy on each), ``fsdp`` (parameters cut along their first dim, as
``fully_shard`` does), ``tp`` (cut by the model's own tensor-parallel plan, or by a given one),
``pp`` (the longest list of layers divided into stages; modules before it are in the first stage,
all others in the last) and ``ep``: experts are divided along it, and all other parameters are cut
by FSDP along ``fsdp`` and ``ep`` together, as in torchtitan. The figures are for the first rank of
a stage, which has the largest of uneven shards, and for the stage that holds most.
``lateinit inspect --mesh`` shows them.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import nn

from lateinit._distributed.activations import activations_of
from lateinit._distributed.mesh_cuts import Cutting
from lateinit._distributed.training_cost import (
    Activations,
    Batch,
    Policy,
    Training,
    activation_bytes,
    bytes_of,
    transformer_of,
)
from lateinit._program import Program, Step, plan_storages
from lateinit._replay import fill_of
from lateinit._tensors import Deferred, Found, find_tensors
from lateinit._units import format_bytes
from lateinit.errors import ShardingError, candidates

AXES = ("replicate", "fsdp", "tp", "pp", "ep")
# Elements that are drawn to measure how fast this machine draws: 16 MiB.
_TRIAL = 1 << 22
# The time of torch's own code in `fully_shard` for a parameter, without the views of all ranks'
# chunks. Measured on meta with torch 2.13, 8 ranks.
_SECONDS_TO_SHARD = 3e-4


@dataclass(frozen=True, slots=True)
class Share:
    """One rank's share of a model.

    Attributes:
        mesh: the size of each axis.
        model_bytes: the bytes of the full model.
        rank_bytes: the bytes that the rank holds.
        parameters: the elements of the model's parameters.
        rank_parameters: the elements of parameters that the rank holds.
        buffer_bytes: the bytes of buffers and other tensors, which are not cut.
        drawn: the elements that the rank draws.
        seconds: the estimated time to draw them.
        threads: the number of threads for that estimate.
        whole: the name of the largest tensor that is computed in full for a shard, if any.
        whole_bytes: the bytes of this tensor.
        whole_tensors: the number of tensors that are computed in full.
        whole_elements: the elements of these, all of which are drawn on every rank.
        seconds_to_shard: the estimated time of ``fully_shard``.
        stage: the number of the pipeline stage, from 0.
        training: the memory for training, if requested.
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
    whole_tensors: int = 0
    whole_elements: int = 0
    seconds_to_shard: float = 0.0
    stage: int = 0
    training: Training | None = None

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain data."""
        return asdict(self)

    def __str__(self) -> str:
        ranks = math.prod(self.mesh.values())
        axes = " x ".join(f"{name} {size}" for name, size in self.mesh.items())
        whole = (
            f"{self.whole}, {format_bytes(self.whole_bytes)}, the largest of {self.whole_tensors}"
            if self.whole
            else "none of its shards"
        )
        stage = f"stage {self.stage}, " if self.mesh.get("pp", 1) > 1 else ""
        many = "s" * (self.threads != 1)
        buffers = f"{format_bytes(self.buffer_bytes)} are buffers and other tensors"
        held = f"{self.rank_parameters:,} parameters, {format_bytes(self.rank_bytes)}"
        peak = format_bytes(self.rank_bytes + self.whole_bytes)
        time_to = f"{self.seconds:.2g} s to draw {self.drawn:,} elements"
        lines = [
            f"{axes}: {ranks:,} rank{'s' * (ranks != 1)}",
            f"the model    {self.parameters:,} parameters, {format_bytes(self.model_bytes)}",
            f"each rank    {stage}{held}, of which {buffers}",
            f"at once      {peak} at most; computed whole on the way to a shard: {whole}",
            f"time         about {time_to}, by {self.threads} thread{many} of this machine",
            f"sharding     about {self.seconds_to_shard:.2g} s for fully_shard",
        ]
        if self.training is not None:
            lines.append(self.training_line)
        return "\n".join(lines)

    @property
    def training_line(self) -> str:
        """The memory for training, in words."""
        assert self.training is not None
        held = format_bytes(self.training.total + self.buffer_bytes)
        return f"training     {held}: {self.training}"


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
    model: nn.Module,
    mesh: Mapping[str, int],
    plan: Mapping[str, str] | None = None,
    policy: Policy | None = None,
    batch: Batch | None = None,
) -> Share:
    """The share of a deferred model that a rank of a mesh would hold, and the time to draw it.

    Args:
        model: a deferred module; it is not changed.
        mesh: the size of each axis.
        plan: how parameters are cut along ``tp``: globs on the fully qualified names of modules or
            parameters, each with a style that has ``colwise`` or ``rowwise`` in its name, as in
            ``transformers``. By default the model's own plan.
        policy: the bytes that training keeps for each element; None leaves training out.
        batch: the batch of a rank, for an estimate of the activations.

    Raises:
        ShardingError: there is a ``tp`` axis and no plan, or a pattern of the plan matches nothing;
            there is a ``pp`` axis and fewer layers than stages; there is an ``ep`` axis and no
            experts; or a batch is given, and the model neither takes token ids without values nor
            has its sizes in a configuration.
    """
    cutting = Cutting.of(model, mesh, plan)
    found = find_tensors(model)
    stages = [_Held() for _ in range(mesh.get("pp", 1))]
    for tensor in found:
        shape = cutting.shape(tensor) if tensor.kind == "parameter" else None
        cost = (0, False) if shape is None else _cost(tensor, shape)
        for number in cutting.stages(tensor):
            stages[number].add(tensor, shape, cost, cutting)
    most = max(range(len(stages)), key=lambda number: stages[number].nbytes)
    held = stages[most]
    threads = torch.get_num_threads()
    training = None
    if policy is not None:
        kept = None if batch is None else _activations(model, cutting, plan, policy, batch)
        training = held.training(policy, kept, sharded=bool({"fsdp", "ep"} & mesh.keys()))
    parameters = [t.tensor for t in found if t.kind == "parameter"]
    return Share(
        mesh=dict(mesh),
        model_bytes=sum(t.tensor.numel() * t.tensor.element_size() for t in found),
        rank_bytes=held.nbytes,
        parameters=sum(p.numel() for p in parameters),
        rank_parameters=held.parameters,
        buffer_bytes=held.buffers,
        drawn=held.drawn,
        seconds=held.drawn * _seconds_to_draw() / threads,
        threads=threads,
        whole=held.largest[1],
        whole_bytes=held.largest[0],
        whole_tensors=held.whole,
        whole_elements=held.whole_elements,
        seconds_to_shard=held.tensors * _seconds_to_shard(cutting.fsdp),
        stage=most,
        training=training,
    )


@dataclass(slots=True)
class _Held:
    """Sums over the tensors that the first rank of a pipeline stage holds."""

    nbytes: int = 0
    parameters: int = 0
    buffers: int = 0
    drawn: int = 0
    tensors: int = 0
    whole: int = 0
    whole_elements: int = 0
    largest: tuple[int, str | None] = (0, None)
    frozen: int = 0
    trainable: dict[int, int] = field(default_factory=dict)
    layers: dict[str, tuple[int, int]] = field(default_factory=dict)

    def add(
        self, found: Found, shape: tuple[int, ...] | None, cost: tuple[int, bool], cut: Cutting
    ) -> None:
        """Count a tensor; ``shape`` is the shape of its shard, None if the rank has none."""
        size = found.tensor.element_size()
        if found.kind != "parameter":
            self.buffers += found.tensor.numel() * size
            self.nbytes += found.tensor.numel() * size
        elif shape is not None:
            count = math.prod(shape)
            self.tensors += 1
            self.parameters += count
            self.nbytes += count * size
            if found.tensor.requires_grad:
                self.trainable[size] = self.trainable.get(size, 0) + count
            else:
                self.frozen += count * size
            layer, gathered = cut.layer(found.name), count * cut.fsdp_of(found.name)
            self.layers[layer] = (self.layers.get(layer, (0, 0))[0] + gathered, size)
            self.drawn += cost[0]
            if cost[1]:
                self.whole += 1
                self.whole_elements += found.tensor.numel()
                self.largest = max(self.largest, (found.tensor.numel() * size, found.name))

    def training(
        self, policy: Policy, activations: Activations | None, *, sharded: bool
    ) -> Training:
        """The memory for training with a policy, with FSDP or without."""

        def total(each: int) -> int:
            return sum(bytes_of(each, count, size) for size, count in self.trainable.items())

        layers = sorted(bytes_of(policy.gathered, *layer) for layer in self.layers.values())
        # Without FSDP, autocast keeps its casts until the end of the step
        # (aten/src/ATen/autocast_mode.cpp, cached_casts).
        cast = total(policy.gathered) if policy.gathered != policy.parameters else 0
        return Training(
            total(policy.parameters) + self.frozen,
            total(policy.gradients),
            total(policy.optimizer),
            sum(layers[-2:]) if sharded else cast,
            activations,
            sharded,
        )


def _activations(
    model: nn.Module,
    cutting: Cutting,
    plan: Mapping[str, str] | None,
    policy: Policy,
    batch: Batch,
) -> Activations:
    """The activations of one device, by a pass on shapes, and cut by a published formula."""
    known = plan if plan is not None else getattr(model, "_tp_plan", None) or {}
    tensor, pipeline = cutting.mesh.get("tp", 1), cutting.mesh.get("pp", 1)
    sequence = any("sequence" in style for style in known.values())

    def formula(tensor: int, pipeline: int, sequence: bool) -> int:
        sizes = transformer_of(model)
        return activation_bytes(sizes, batch, tensor=tensor, pipeline=pipeline, sequence=sequence)

    layers = cutting.blocks[0] if cutting.blocks else None
    if batch.recompute == "full" and layers is None:
        raise ShardingError(
            f"--recompute full: {type(model).__name__} has no list of layers to compute again"
        )
    dtype = torch.bfloat16 if policy.gathered > 0 else None
    try:
        alone = activations_of(model, batch, dtype, layers)
    except Exception as error:  # noqa: BLE001 - the model's own, of ids without values
        return Activations(_told_by_formula(lambda: formula(tensor, pipeline, sequence), error))
    if (tensor, pipeline) == (1, 1):
        return Activations(alone, measured=True)
    part = formula(tensor, pipeline, sequence) / formula(1, 1, False)
    return Activations(round(alone * part), measured=True)


def _told_by_formula(formula: Callable[[], int], error: Exception) -> int:
    try:
        return formula()
    except ShardingError as unknown:
        reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        raise ShardingError(
            f"{unknown}. (Its forward pass on token ids without values raises {reason})"
        ) from error


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
    # Rows are drawn completely, even if only some columns are kept (`shard_ranges.leaves`).
    return math.prod((shape[0], *ref.size[1:])) * draws if shape else whole * draws, False


def _in_ranges(program: Program, step: Step) -> bool:
    """Whether a step fills a tensor in flat order, so that a part of it can be computed alone."""
    fill = fill_of(program, step)
    return fill is not None and len(fill.ops) == len(step.ops)


def _seconds_to_draw() -> float:
    """The seconds in which one thread of this machine draws an element: the best of three."""
    trial, generator = torch.empty(_TRIAL), torch.Generator()
    times = []
    for _ in range(3):
        started = time.perf_counter()
        trial.normal_(generator=generator)
        times.append(time.perf_counter() - started)
    return min(times) / _TRIAL


def _seconds_to_shard(ranks: int) -> float:
    """The seconds that ``fully_shard`` takes for a parameter: it makes a view for each rank."""
    trial = torch.empty(ranks, 1, device="meta")
    times = []
    for _ in range(3):
        started = time.perf_counter()
        trial.chunk(ranks)
        times.append(time.perf_counter() - started)
    return min(times) + _SECONDS_TO_SHARD
