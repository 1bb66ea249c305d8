"""``Filling``: give the deferred tensors of a target their values, on this rank.

The order is fixed: collect the selected tensors by program, check everything that can fail before a
tensor changes, then execute the plan and put each storage into its tensors as soon as it has its
values. The order of the checks is here; the checks themselves are in ``checks.py``.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any, NamedTuple

from lateinit._log import log
from lateinit._materialize.checks import (
    check_constants,
    check_holes,
    check_script_constants,
    check_seed,
    check_shards,
    check_shared,
)
from lateinit._materialize.offload import Offload
from lateinit._materialize.scheduler import execute
from lateinit._program import Plan, Program, Step, plan_storages
from lateinit._progress import Progress
from lateinit._replay import Session, execution_of, one_thread
from lateinit._tensors import (
    AS_IT_IS,
    NO_RULES,
    Casting,
    Casts,
    Deferred,
    Only,
    Rules,
    Wanted,
    bound_in,
    is_deferred_tensor,
    modules_in,
    unbind,
    wanted_in,
)
from lateinit._torch import held_by_script, is_out_of_memory, without_modes
from lateinit.errors import ConstantChangedError, MaterializeError, OutOfMemoryError


class _Planned(NamedTuple):
    group: Wanted
    plan: Plan
    session: Session


class Filling:
    """The deferred tensors of a target, about to be given their values.

    Args:
        target: a module, a tensor, or a container of them.
        only: selects tensors; by default all deferred ones.
        casts: the device and dtype of each tensor.
        seed: replaces the recorded random state; None keeps it.
        rules: the initialisers that act on finished values.
        offload: takes the tensors that go to disk.
    """

    def __init__(
        self,
        target: Any,
        only: Only | None = None,
        casts: Casting | Casts = AS_IT_IS,
        seed: int | None = None,
        rules: Rules = NO_RULES,
        offload: Offload | None = None,
    ) -> None:
        self._target = target
        self._whole = only is None
        self._seed = seed
        self._offload = offload
        scripts = list(modules_in(target))
        check_script_constants(scripts)
        # Held from before the walk: TorchScript makes new tensor objects unless old ones live.
        self._held = held_by_script(scripts)
        self._wanted = wanted_in(target, only, casts)
        for group in self._wanted:
            check_shards(group)
            group.extend(rules, seed)

    def left(self) -> list[Deferred]:
        """The shards still to compute."""
        shards = (shard for group in self._wanted for shard in group.shards())
        return [shard for shard in shards if shard.slot.real is None]

    def check(self) -> None:
        """Run all checks that precede the first change. ``run`` repeats them."""
        with one_thread:
            self._planned()

    def run(self, *, threads: int | None = None, progress: bool = False) -> None:
        """Give the tensors their values."""
        start = time.perf_counter()
        # While this lock is held there is no communication with other ranks.
        with one_thread:
            programs = self._programs()
            planned = self._planned()
            total = sum(s.record.nbytes for g in self._wanted for s in g.storages.values())
            try:
                with Progress("materialise", total, shown=progress) as bar:
                    for group, plan, session in planned:
                        group.recorded.seed = self._seed
                        log.debug("%r", plan)
                        _run(group, plan, session, threads, bar, self._offload)
                self._put_back()
            except BaseException:
                self._put_back()
                raise
        if self._offload is not None:
            self._offload.finish()
        if self._whole:
            unbind(self._target, programs)
        if planned:
            count = sum(len(group.storages) for group in self._wanted)
            seconds = time.perf_counter() - start
            log.info("materialised %d storages, %d bytes, in %.2f s", count, total, seconds)

    def _programs(self) -> dict[Program, None]:
        return bound_in(self._target) | dict.fromkeys(group.recorded for group in self._wanted)

    def _planned(self) -> list[_Planned]:
        wanted = self._wanted
        extended = (group.program for group in wanted if group.program is not group.recorded)
        for program in (*self._programs(), *extended):
            check_seed(program, self._seed)
        for group in wanted:
            _leave_real(group)
            check_shared(group)
            if self._offload is not None:
                self._offload.check(group.storages.values())
        planned = [
            _Planned(g, plan_of(g), execution_of(g.program, self._seed).session()) for g in wanted
        ]
        for group, plan, session in planned:
            check_constants(group, plan, session)
            check_holes(group, plan, session)
        return planned

    def _put_back(self) -> None:
        for script in self._held:
            script.put_back()


def plan_of(group: Wanted, storages: Iterable[int] | None = None) -> Plan:
    """The plan that computes the tensors of one program.

    Args:
        group: the selected tensors.
        storages: the storages to compute, by default all that are not real yet.
    """
    wanted = group.to_compute() if storages is None else storages
    names = tuple((deferred.name, deferred.ref) for deferred in group.tensors())
    return Plan(group.program, tuple(plan_storages(group.program, wanted)), names)


def _leave_real(group: Wanted) -> None:
    """Drop the tensors that another thread has materialised since ``group`` was collected."""
    for number, shared in list(group.storages.items()):
        if shared.slot.real is not None:
            shared.tensors = [d for d in shared.tensors if is_deferred_tensor(d.tensor)]
            if not shared.tensors:
                del group.storages[number]


def _run(
    group: Wanted,
    plan_: Plan,
    session: Session,
    threads: int | None,
    bar: Progress,
    offload: Offload | None = None,
) -> None:
    """Run the plan of one program, and realise each storage as soon as it has its values."""
    left = dict.fromkeys(number for step in plan_.steps for number in step.gives)
    with without_modes():
        # The other storages became real in an earlier call. Deferred tensors on them only need to
        # share that memory.
        for number in group.storages.keys() - left.keys():
            group.storages[number].share()
    running: Step | None = None
    try:
        with session:
            for step, run in execute(session, plan_.steps, threads):
                running = step
                results = run()
                for number in step.gives:
                    shared = group.storages[number]
                    shared.give(results.pop(number))
                    if offload is not None:
                        offload.take(deferred.tensor for deferred in shared.tensors)
                    bar.advance(shared.record.nbytes)
                    del left[number]
                running = None
    except Exception as error:
        # No step is running if `execute` failed while it started a later one, for example when
        # allocating memory: then the message names all remaining tensors.
        names = group.names(left if running is None else running.gives)
        if is_out_of_memory(error):
            raise OutOfMemoryError(
                f"out of memory while materialising {names}; what was done before stands: free "
                "memory and call materialize() again, or materialise a part"
            ) from error
        if isinstance(error, (MaterializeError, ConstantChangedError)):
            raise type(error)(f"{names!r}: {error}") from (error.__cause__ or error)
        raise
