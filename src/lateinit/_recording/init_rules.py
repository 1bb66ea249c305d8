"""Record the rules of ``init=``: ops at the end of an extension of a program."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lateinit._program import NEVER, Op, Program, Ruled, TensorRef
from lateinit._recording.writer import ProgramWriter
from lateinit._rng import state_from
from lateinit._tensors import ON_META, Slot, is_parameter, slot_of, told
from lateinit._torch import ZERO, by_name, default_generator, is_dtensor
from lateinit.errors import InitError, ShardingError


class RuleRecorder:
    """Records rules, each with a generator of its own, in an extension of a program.

    Args:
        program: the program.
        ruled: the tensors that rules act on, in their order.
    """

    def __init__(self, program: Program, ruled: Sequence[Ruled]) -> None:
        self._targets = [_Target(program, one) for one in ruled]
        self.program = program.extension(target.ref.storage for target in self._targets)
        self.writer = ProgramWriter(self.program, alone=True)
        # Made here and not in the block, which would record it.
        slots: dict[int, Slot] = {}
        for target in self._targets:
            number = target.ref.storage
            slot = slots.setdefault(number, Slot(self.program, number))
            target.tensor = target.like(slot.window(target.ref))

    def run(self) -> None:
        """Call each rule on its tensor, inside a block of ``writer``."""
        for target in self._targets:
            first = len(self.program.ops)
            device = self.program.storages[target.ref.storage].device
            stream = self.writer.generators.begin_at(
                default_generator(device), state_from(target.ruled.key, device)
            )
            target.call()
            self._check(target, first, stream)
            self.program.ops += target.again

    def finish(self) -> Program:
        """The extension, with all of its ops."""
        self.writer.generators.restore()
        self.program.drop_at = NEVER
        return self.program

    def _check(self, target: _Target, first: int, stream: int) -> None:
        """Raise if a rule drew from another generator, or wrote to anything but its tensor."""
        slot = slot_of(target.tensor)
        own = slot is not None and slot is not ON_META and slot.program is self.program
        if not own or self.writer.ref(target.tensor) != target.ref:
            raise target.failed("it put another tensor in the place of this one")
        for op in self.program.ops[first:]:
            if op.draw is not None and op.draw.stream != stream:
                raise target.failed(
                    "it draws from another generator, or seeds it: a rule draws from a generator "
                    "of its own, as torch's functions do by default"
                )


class _Target:
    """The tensor with which a rule is called: for a shard, the whole tensor."""

    def __init__(self, program: Program, ruled: Ruled) -> None:
        self.ruled = ruled
        self.again: list[Op] = []  # the ops that cut the shard again
        self.ref = ruled.ref
        if is_dtensor(ruled.tensor) and ruled.ref.numel != ruled.tensor.numel():
            self.ref, self.again = _whole(program, ruled)
        self.tensor = ruled.tensor

    def like(self, window: Tensor) -> Tensor:
        """A tensor on the window, of the same kind as the original one."""
        original = self.ruled.tensor
        if is_parameter(original):
            return nn.Parameter(window, original.requires_grad)
        return window

    def call(self) -> None:
        rule, tensor = self.ruled.rule, self.tensor
        try:
            with torch.no_grad():
                result = rule(tensor)
        except Exception as error:
            raise self.failed(f"{type(error).__name__}: {error}") from error
        if isinstance(result, Tensor) and slot_of(result) is not slot_of(tensor):
            raise self.failed("it returned another tensor: a rule initialises its tensor in place")

    def failed(self, why: str) -> InitError:
        """The error for a rule that cannot be honoured."""
        return InitError(
            f"init=: {told(self.ruled.rule)} for {self.ruled.name!r} {tuple(self.ref.size)}: {why}"
        )


def _whole(program: Program, ruled: Ruled) -> tuple[TensorRef, list[Op]]:
    """The whole tensor from which a shard was cut, and the ops that cut it.

    Raises:
        ShardingError: another op than a cut was called on the shard, or between the two.
    """
    tensor, storage = ruled.tensor, ruled.ref.storage
    nbytes = math.prod(tensor.shape) * tensor.dtype.itemsize
    again: list[Op] = []
    while True:
        ops = [program.ops[number] for number in program.writers(storage)]
        sources = {ref.storage for op in ops for ref in op.read()} - {storage}
        same = all(ref.dtype == tensor.dtype for op in ops for ref in (*op.read(), *op.written()))
        if len(sources) != 1 or not same or not all(map(_cuts, ops)):
            raise ShardingError(
                f"init=: {ruled.name!r} was cast, or written to, after it was sharded, so that "
                f"{told(ruled.rule)} cannot act on the whole tensor: do that before sharding"
            )
        again = ops + again
        (storage,) = sources
        ref = TensorRef(storage, tensor.dtype, tuple(tensor.shape), tuple(tensor.stride()), 0)
        if program.storages[storage].nbytes == nbytes and program.covers(ref):
            return ref, again


def _cuts(op: Op) -> bool:
    """Whether an op copies, or makes the target of a copy."""
    info = by_name(op.name)
    made = info.is_empty or ZERO in (op.name, *(info.filled_by or ()))
    return op.draw is None and (made or info.copies is not None or op.name in _COPIES)


_COPIES = ("aten::constant_pad_nd",)
