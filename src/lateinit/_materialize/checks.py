"""The checks that run before the first tensor changes, so that a failed call changes nothing."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from numbers import Integral
from typing import Any

from torch import nn

from lateinit._distributed import reads_nothing, refuse_sums
from lateinit._program import Plan, Program
from lateinit._replay import Session, execution_of
from lateinit._tensors import Wanted, described, is_deferred_tensor
from lateinit._torch import constants_of_script, digest, name_of_class, without_modes
from lateinit.errors import (
    ConstantChangedError,
    DeferredTensorError,
    MaterializeError,
    RecordingError,
    SeedError,
    ShardingError,
    listing,
)


def check_script_constants(modules: Iterable[nn.Module]) -> None:
    """Raise ``MaterializeError`` if a TorchScript graph has a deferred tensor as a constant."""
    for module in modules:
        for constant in constants_of_script(module):
            if is_deferred_tensor(constant):
                raise MaterializeError(
                    f"a graph of the TorchScript module {name_of_class(module)} holds "
                    f"{described(constant)} as a constant, which cannot be given values: freeze or "
                    "trace the module after lateinit.materialize()"
                )


def check_seed(program: Program, seed: int | None) -> None:
    """Raise ``SeedError`` if the construction would have run differently under ``seed``.

    A constructor that read a random value may have branched on it, and the program holds only the
    branch that was taken. Each recorded read is therefore replayed under ``seed`` and compared.
    """
    if seed is None:
        return
    given: Any = seed
    if type(given) is bool or not isinstance(given, Integral):
        raise TypeError(f"seed={seed!r}: an integer is meant, as for torch.manual_seed()")
    if not -(2**63) <= seed < 2**64:
        raise ValueError(f"seed={seed}: torch.manual_seed() takes -2**63 to 2**64 - 1")
    if program.seed_bound:
        raise SeedError(f"seed={seed} cannot be honoured: while recording, {program.seed_bound}")
    execution = execution_of(program, seed)
    for read in program.reads:
        value = execution.value(read.ref, read.before)
        # A read without a digest is a read of a shape, which replay itself compares.
        if read.digest and digest(value) != read.digest:
            reader = f"{read.name!r} realised itself with" if read.name else "the constructor read"
            raise SeedError(
                f"seed={seed} cannot be honoured: {reader} a random value ({read.ref}) and seed "
                f"{seed} gives another one; record again under that seed"
            )


def check_shards(group: Wanted) -> None:
    """Raise ``ShardingError`` for shards that cannot be computed alone."""
    shards = group.shards()
    refuse_sums({shard.name: shard.tensor for shard in shards})
    empty = [s.name for s in shards if reads_nothing(group.program, s.ref.storage)]
    if empty:
        raise ShardingError(
            f"{listing(empty)}: sharded by a means that cannot be followed on deferred tensors: "
            "use distribute_tensor, parallelize_module or fully_shard"
        )


def check_shared(group: Wanted) -> None:
    """Raise if a storage is real already with another device or dtype than requested now."""
    for shared in group.storages.values():
        real = shared.slot.real
        if real is None or shared.as_recorded:
            continue
        for deferred in shared.tensors:
            own, ref, before = deferred.device, deferred.ref, real.cast
            same_place = (before.device or own) == (shared.cast.device or own)
            if not same_place or real.window(ref).dtype != shared.cast.dtype_of(ref):
                raise DeferredTensorError(
                    f"{deferred.name!r} shares its memory with a tensor that was materialised with "
                    f"device={before.device}, dtype={before.dtype}: ask for the same"
                )


def check_constants(group: Wanted, plan_: Plan, session: Session) -> None:
    """Raise if real data from which values are computed has changed.

    Args:
        group: the selected tensors of one program.
        plan_: the plan that will be executed.
        session: reads the constants and compares their checksums.
    """
    program = group.program
    if all(constant.checksum is None for constant in program.constants):
        return
    for step in plan_.steps:
        try:
            with without_modes():
                for number in step.ops:
                    for constant in program.ops[number].constants():
                        session.constant(constant)
        except ConstantChangedError as error:
            raise ConstantChangedError(f"{group.names(step.gives)!r}: {error}") from None


def check_holes(group: Wanted, plan_: Plan, session: Session, filled: Collection[int] = ()) -> None:
    """Raise if a value is drawn after a lazy module whose shape is not known.

    Such a module draws an unknown number of words, so no later draw has a known position.

    Args:
        group: the selected tensors of one program.
        plan_: the plan that will be executed.
        session: the session that will execute it.
        filled: the numbers of holes that will be filled before.
    """
    program = group.program
    if None not in program.holes:
        return
    for step in plan_.steps:
        draws = (program.ops[number].draw for number in step.ops)
        try:
            session.streams.check_known((draw for draw in draws if draw is not None), filled)
        except RecordingError as error:
            raise RecordingError(f"{group.names(step.gives)!r}: {error}") from None
