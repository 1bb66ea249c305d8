"""``init=``: initialisers that act on finished values, by name.

A rule is recorded in an extension of the program: a copy that ends with the ops of the rules. The
extension is planned, replayed, sharded and written like any program, and the program itself does
not change.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lateinit._identity import IdentityMap
from lateinit._program import Draw, Program, Ruled
from lateinit._replay import execution_of
from lateinit._rng import set_state, state_from, state_of
from lateinit._tensors.deferred import Deferred
from lateinit._tensors.initialisers import Init, Rule, rules_by_name, told
from lateinit._tensors.slots import Slot
from lateinit._tensors.walk import Found, find_tensors
from lateinit._torch import is_dtensor
from lateinit.errors import DeferredTensorError, InitError


class Rules:
    """The rules for the tensors of one target.

    A pattern acts on the parameters that it matches, or, if it matches none, on all its tensors.

    Args:
        init: the argument ``init=``, or None.
        found: all tensors of the target.

    Raises:
        PatternError: a pattern matches nothing, or two contradict each other on one tensor.
        InitError: a value is no initialiser.
    """

    def __init__(self, init: Init | None, found: Iterable[Found] = ()) -> None:
        self._rules: IdentityMap[Tensor, tuple[Found, Rule]] = IdentityMap()
        self._recorded: set[Slot] = set()
        if init is None:
            return
        every, named = list(found), rules_by_name(init)
        named.check(every)
        for_parameters = {
            pattern
            for each in every
            if each.kind == "parameter" or each.given
            for name in each.names
            for pattern in named.given
            if named.matches(pattern, name)
        }
        for each in every:
            entry = named.entry_of(each)
            usual = each.kind == "parameter" or each.given
            if entry is not None and (usual or entry not in for_parameters):
                self._rules[each.tensor] = each, named.given[entry]

    def __bool__(self) -> bool:
        return bool(self._rules)

    def of(self, tensor: Tensor) -> Rule | None:
        """The rule for a tensor."""
        found = self._rules.get(tensor)
        return None if found is None else found[1]

    def tensors(self) -> list[Tensor]:
        """The deferred tensors that have rules."""
        return [item.tensor for item, _ in self._rules.values() if item.deferred]

    def leave(self, tensors: Iterable[Tensor]) -> None:
        """Drop the rules for some tensors, which get their values from another source."""
        for tensor in tensors:
            self._rules.pop(tensor, None)

    def extend(self, tensors: Iterable[Deferred], seed: int | None = None) -> None:
        """Move tensors that have rules to extensions of their programs.

        Args:
            tensors: deferred tensors. If one has a rule, all tensors of its program are moved.
            seed: replaces the recorded random state.

        Raises:
            InitError: a rule failed, or did anything but initialise its tensor.
            DeferredTensorError: a tensor shares its memory with a tensor that is real already.
        """
        if not self:
            return
        by_program: dict[Program, list[Deferred]] = {}
        for deferred in tensors:
            by_program.setdefault(deferred.program, []).append(deferred)
        for program, every in by_program.items():
            ruled = list(self.ruled(program, every, seed))
            if not ruled:
                continue
            assert program.record_rules is not None
            extension = program.record_rules(program, ruled)
            for deferred in every:
                deferred.program = extension

    def ruled(
        self, program: Program, every: list[Deferred], seed: int | None = None
    ) -> Iterable[Ruled]:
        """The tensors of a program that rules act on, each with the random state of its rule.

        They are in the order of the target, and have its numbers, whichever of them are selected.

        Args:
            program: the program.
            every: the tensors to compute. The rules of all tensors on their storages act.
            seed: replaces the recorded random state.

        Raises:
            InitError: one window has two rules.
            DeferredTensorError: a tensor shares its memory with one that is real already.
        """
        state, slots = _first_state(program, seed), {deferred.slot for deferred in every}
        windows: dict[Any, tuple[str, Rule]] = {}
        keys: dict[str, int] = {}
        for item, rule in self._rules.values():
            deferred = Deferred.of(item.tensor, item.name) if item.deferred else None
            if deferred is None or deferred.program is not program:
                continue
            known = windows.get(deferred.ref)
            if known is not None and known[1] != rule:
                raise InitError(
                    f"init=: {known[0]!r} and {item.name!r} are one tensor, for which there are "
                    f"two rules: {told(known[1])} and {told(rule)}"
                )
            if known is not None:
                continue  # a rule runs once for each window
            windows[deferred.ref] = item.name, rule
            key = _key(deferred, item.name)
            keys[key] = keys.get(key, -1) + 1  # two models of one block may have equal names
            if deferred.slot in slots and deferred.ref.numel and self._is_left(deferred, rule):
                start = _digest(state, key, keys[key])
                yield Ruled(item.name, deferred.tensor, deferred.ref, rule, start)

    def _is_left(self, deferred: Deferred, rule: Rule) -> bool:
        """Whether the values of a tensor are still to be computed.

        Raises:
            DeferredTensorError: another tensor on the storage is real, without the rule.
        """
        slot = deferred.slot
        if slot.real is None:
            self._recorded.add(slot)
        elif slot not in self._recorded:
            raise DeferredTensorError(
                f"init=: {deferred.name!r} shares its memory with a tensor that is materialised, "
                f"so that {told(rule)} would change both: call it on the tensor itself, after "
                "lateinit.materialize()"
            )
        return slot.real is None


def _key(deferred: Deferred, name: str) -> str:
    """The key of a tensor: its name in the recorded model, if it has one.

    The key must not depend on which part of that model is the target, nor on which part of the
    tensor a rank holds.
    """
    key, ref = deferred.slot.name or name, deferred.ref
    if is_dtensor(deferred.tensor) or deferred.is_whole():
        return key
    return f"{key}{list(ref.size)}+{ref.offset}"


def rule_states(model: nn.Module, init: Init) -> dict[str, bytes]:
    """The states that rules for a deferred model start in, by the tensor's name, in their order.

    Args:
        model: the model, of which nothing is materialised.
        init: the rules.
    """
    rules = Rules(init, find_tensors(model))
    programs: dict[Program, list[Deferred]] = {}
    for deferred in map(Deferred.of, rules.tensors()):
        programs.setdefault(deferred.program, []).append(deferred)
    return {
        ruled.name: ruled.key
        for program, every in programs.items()
        for ruled in rules.ruled(program, every)
    }


def call_rules(model: nn.Module, init: Init, states: Mapping[str, bytes]) -> None:
    """Call rules on a real model, with the values that ``init=`` gives a deferred model.

    Args:
        model: the model.
        init: the rules.
        states: the ``rule_states`` of its deferred twin.
    """
    found = find_tensors(model)
    rules, cpu = Rules(init, found), torch.default_generator
    by_name = {name: each.tensor for each in found for name in each.names}
    before = state_of(cpu)
    try:
        for name, state in states.items():
            tensor = by_name.get(name)
            rule = None if tensor is None else rules.of(tensor)
            if tensor is not None and rule is not None:
                set_state(cpu, state_from(state, cpu.device))
                with torch.no_grad():
                    rule(tensor)
    finally:
        set_state(cpu, before)


NO_RULES = Rules(None)


def _first_state(program: Program, seed: int | None) -> bytes:
    """The random state in which the construction began."""
    root = next((n for n, stream in enumerate(program.streams) if stream.root), None)
    if root is None:
        return b"" if seed is None else str(seed).encode()
    return execution_of(program, seed).state(Draw(root, 0))


def _digest(state: bytes, key: str, number: int) -> bytes:
    return hashlib.sha256(state + f"/{key}/{number}".encode()).digest()
