"""Write ops into a program, and make the deferred tensors that they return.

Ops that only make views are not written: tensors are recorded as windows on storages (see
``program``), and its window describes a view completely.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lateinit._integrations import before_sending
from lateinit._program import Ambient, Const, Draw, Op, Program, TensorRef, initializer
from lateinit._recording import argument_checks
from lateinit._recording.by_running import record_by_running
from lateinit._recording.generators import Generators, Settled
from lateinit._recording.kinds import fits
from lateinit._recording.layouts import LayoutUnknownError, as_kernel_lays_out, results_on_meta
from lateinit._recording.shared_memory import SharedMemory
from lateinit._recording.value_checks import check_values
from lateinit._recording.value_reads import ValueReads
from lateinit._recording.windows import CPU, Windows
from lateinit._replay import execution_of
from lateinit._tensors import ON_META, Slot, slot_of
from lateinit._torch import (
    Args,
    FillOp,
    Kwargs,
    OpInfo,
    calling_modules,
    default_generator,
    flat,
    has_tensor,
    here,
    is_deterministic,
    operators,
    tensors_in,
    without_modes,
)
from lateinit.errors import RecordingError


def current() -> ProgramWriter | None:
    """The writer of the recording in force in this thread, or None outside recordings."""
    writer: ProgramWriter | None = here.writer
    return writer


class ProgramWriter(Windows):
    """Writes ops into a program, with the draws, constants and settings that they depend on.

    Args:
        program: the program.
        drawing: False treats no op as one that draws.
        alone: True refuses the deferred tensors of other programs.

    Attributes:
        generators: follows the random generators.
        scripts: the TorchScript modules that were made, weakly.
        kept: the real tensors of bytes that modules hold, by name.
        lazy_buffer_of: returns the name of the lazy buffer on a storage, or None.
        busy: whether an op is being recorded: calls by torch's Python kernels inside it are no
            calls of the constructor.
        call: the arguments of the Python call that led to the current op.
        values: answers reads.
        shared: memory that deferred and real tensors share.
    """

    def __init__(self, program: Program, *, drawing: bool = True, alone: bool = False) -> None:
        super().__init__(program, drawing=drawing, alone=alone)
        self.generators = Generators(program)
        self.scripts: list[weakref.ref[nn.Module]] = []
        self.kept: list[tuple[str, Tensor]] = []
        self.lazy_buffer_of: Callable[[Slot], str | None] = _of_none
        self.busy = False
        self.call: tuple[tuple[Any, ...], dict[str, Any] | None] = ((), None)
        self._ambient_key: tuple[Any, ...] = ()
        self.values = ValueReads(program)
        self.shared = SharedMemory(self.values, self.data, self.assign)

    # -- ops -----------------------------------------------------------------------------------

    def record(self, info: OpInfo, args: Args, kwargs: Kwargs, deferred: list[Tensor]) -> Any:
        """Record an op, and return deferred tensors for its results.

        Args:
            info: the op.
            args: its positional arguments.
            kwargs: its keyword arguments.
            deferred: the deferred tensors among the arguments.
        """
        # An in-place op that takes only numbers returns its first argument, unchanged in shape.
        alone = info.scalar_inplace and len(deferred) == 1 and args[0] is deferred[0]
        floating = alone and args[0].is_floating_point()
        if floating and argument_checks.are_usual(info, args[1:], kwargs):
            self._append(info, args, kwargs, ())
            return args[0]
        # Meta kernels accept numbers that real kernels refuse: complex numbers, 1e30 for float16,
        # an integer factor for a boolean tensor, and an empty range of random integers.
        checked = not floating or info.usual is not None or complex in map(type, args[1:])
        if alone and checked and not has_tensor(args[1:]):
            ref, device = self.ref(args[0]), self.device_of(args[0])
            named = {key: value for key, value in kwargs.items() if key != "generator"}
            argument_checks.check_numbers(info, ref, device, args[1:], **named)
        if info.collective:
            instead = before_sending(calling_modules()) or "call it after materialising"
            raise RecordingError(
                f"{info.name} exchanges values with other ranks, which cannot be recorded: "
                f"{instead}"
            )
        device = self.device_for(kwargs, deferred)
        try:
            on_cpu = {device, *map(self.device_of, deferred)} == {CPU}
            result = results_on_meta(info, args, kwargs, device, small=on_cpu)
        # No meta kernel, or a layout that depends on values. If the call is wrong, it raises again
        # in the run, as it would in eager construction.
        except Exception:  # noqa: BLE001
            return record_by_running(self, info, args, kwargs, deferred)
        if info.checks_values:
            check_values(self, info, args, kwargs)
        self._note(info, args, kwargs, device, result)
        return result

    def made(self, tensor: Tensor, device: torch.device, fill: FillOp | None) -> Tensor:
        """Record a new tensor and its fill. Allocation needs no op: replay allocates on demand."""
        number = self._number(tensor, device)
        if fill is not None:
            name, values = fill
            args = (TensorRef.of(tensor, number), *values)
            self.program.ops.append(Op(name, args, {}, (), None, self.ambient_number(), None))
        return tensor

    def overwrite(
        self,
        info: OpInfo,
        tensor: Tensor,
        values: tuple[Any, ...],
        generator: Any,
        label: str | None = None,
    ) -> bool:
        """Record an op that fills a tensor in place from numbers, without running a kernel.

        Args:
            info: the op.
            tensor: the tensor to fill.
            values: the numbers.
            generator: the generator to draw from, None for the default one.
            label: the words for the initialiser, if the caller knows them.

        Returns:
            False if nothing was recorded: the tensor is not deferred, or only the kernel knows
            whether its dtype accepts the fill.
        """
        slot = slot_of(tensor)
        if slot is None or slot is ON_META or not fits(info, tensor):
            return False
        if self.shared:
            self.take_back([tensor])
        ref = self._ref(slot, tensor)  # first, since it may absorb a program and renumber the ops
        if ref.size == argument_checks.EMPTY:
            self._check_kept(slot)
        draw = None
        device = self.program.storages[ref.storage].device
        argument_checks.check_fill(info, ref, device, values)
        label, ambient = label or initializer(), self.ambient_number()
        if info.random:
            drawn = generator or default_generator(device)
            number = len(self.program.ops)
            draw = self.generators.draw(drawn, number, root=generator is None)
        self.append(Op(info.name, (ref, *values), {}, (), draw, ambient, label))
        return True

    def record_laid_out(
        self, info: OpInfo, args: Args, kwargs: Kwargs, shapes: list[Tensor]
    ) -> list[Tensor]:
        """Record an op whose results have the shapes of some meta tensors, but not their layouts.

        Args:
            info: the op.
            args: its positional arguments.
            kwargs: its keyword arguments.
            shapes: the results of the op on ``meta``.
        """
        deferred = [t for t in tensors_in(args, kwargs) if t.is_meta]
        device = self.device_for({}, deferred)
        try:
            laid = as_kernel_lays_out(info, args, kwargs, shapes, device)
        except LayoutUnknownError:
            return list(flat(record_by_running(self, info, args, kwargs, deferred)))
        made = [self.mirror(leaf, device) for leaf in laid]
        self._append(info, args, kwargs, tuple(made))
        return made

    def assign(self, tensor: Tensor, data: Tensor) -> None:
        """Record that a deferred tensor takes the values of another tensor."""
        self._append(operators.by_name("aten::copy_"), (tensor, data), {}, ())

    def refuse(self, tensor: Tensor, what: str) -> None:
        """Record that a tensor's values cannot be computed; materialising it raises."""
        with without_modes():
            self._append(operators.by_name(operators.REFUSED), (tensor, what), {}, ())

    # -- real data that enters, values that leave ----------------------------------------------

    def lift(self, data: Tensor) -> Tensor:
        """A deferred copy of real data."""
        return self.keep(data.detach().clone())

    def keep(self, data: Tensor) -> Tensor:
        """A deferred constant of data to which no other code can write; it is not copied."""
        tensor: Tensor = self.mirror(data, data.device)
        constant, outs = self.data.own(data), (self.ref(tensor),)
        op = Op(operators.CONSTANT, (constant,), {}, outs, None, self.ambient_number(), "constant")
        self.program.ops.append(op)
        return tensor

    def read(self, tensor: Tensor) -> Tensor:
        """The current values of a deferred tensor; notes that they were read if random."""
        if self.shared:
            self.take_back([tensor])
        return self.values.read(self.ref(tensor))

    def expose(self, tensor: Tensor) -> Tensor:
        """A real tensor kept equal to a deferred one: writes to either show in the other."""
        return self.shared.expose(tensor, self.ref(tensor))

    def take_back(self, used: Iterable[Tensor]) -> None:
        """Record the writes of other code to memory that it shares with some tensors."""
        slots = [slot for slot in map(slot_of, used) if slot is not None and slot is not ON_META]
        self.shared.take_back([number for _, number in map(Slot.resolve, slots)])

    # -- the end of a block --------------------------------------------------------------------

    def finish(self) -> None:
        """Record the last writes to shared memory, and the generator states that modules keep."""
        with without_modes():
            if self.shared:
                self.shared.finish()
            for name, kept in self.kept:
                if self.generators.keeps_state(kept, execution_of(self.program).state):
                    self.program.seed_bound = f"{name!r} kept the state of a random generator"
            self.kept.clear()

    def settle(self) -> list[Settled]:
        """Put the generators into the states that eager construction would have left by now."""
        # An open hole counts as no draws, since their number is not known yet.
        with without_modes():
            execution = execution_of(self.program, past_holes=None in self.program.holes)
            return self.generators.settle(execution.state)

    @contextlib.contextmanager
    def settled(self, *, told: bool = False) -> Iterator[None]:
        """A block in which the generators are in their eager states; ``told``: which are read."""
        settled = self.settle()
        try:
            yield
        finally:
            with without_modes():
                self.generators.resume(settled, told=told)

    # -- how an op is written ------------------------------------------------------------------

    def _note(
        self, info: OpInfo, args: Args, kwargs: Kwargs, device: torch.device, result: Any
    ) -> None:
        if info.is_factory:
            fill = info.fill_for(args)
            if fill is not None:
                shown = TensorRef.of(result, 0)
                argument_checks.check_fill(operators.by_name(fill[0]), shown, device, fill[1])
            # If memory and layout are known, it needs no op of its own, only its fill.
            if _is_usual(args, kwargs):
                self.made(result, device, fill)
                return
        results = flat(result)
        new = [self.adopt(leaf, device) for leaf in results if isinstance(leaf, Tensor)]
        # An op that makes no new storage and writes nothing is a view: the windows of its results
        # describe it. Metadata ops such as t_() change a window, which is read anew at each use.
        if (any(new) or info.mutates or info.mutates_kw) and not info.metadata_only:
            self._append(info, args, kwargs, results)

    def _append(self, info: OpInfo, args: Args, kwargs: Kwargs, results: tuple[Any, ...]) -> None:
        written = {k: self.referred(v) for k, v in kwargs.items() if k != "generator"}
        referred = tuple(self.referred(value) for value in args)
        for changed in info.mutates:
            if changed < len(args) and type(referred[changed]) is Const and args[changed].is_meta:
                self.ref(args[changed])  # raises: the write would be lost
            elif changed < len(args) and argument_checks.takes_all(*referred[changed:]):
                for tensor in flat(args[changed]):
                    self._check_kept(slot_of(tensor))
        outs = tuple(
            self.ref(leaf) if isinstance(leaf, Tensor) and leaf.is_meta else None
            for leaf in results
        )
        label = initializer() if info.mutates or info.mutates_kw else None
        ambient = self.ambient_number()
        # Last: referring to a tensor may absorb a program, whose ops then precede this op, and the
        # draw is noted under this op's number. Also, if anything fails, no draw is left without op.
        draw = self.draw(info, args, kwargs)
        self.append(Op(info.name, referred, written, outs, draw, ambient, label))

    def _check_kept(self, slot: Slot | None) -> None:
        """Raise if a write to an empty tensor would be lost, since its shape is not known yet."""
        if slot is not None and slot.lazy is None:
            slot.lazy = self.lazy_buffer_of(slot)
        argument_checks.check_kept(slot)

    def append(self, op: Op) -> None:
        """Append an op, and show its results where memory or a generator is shared."""
        self.program.ops.append(op)
        if self.shared:
            self.shared.show(dict.fromkeys(ref.storage for ref in op.written()))
        # No state after an open hole is known.
        if self.generators.drawn is not None and None not in self.program.holes:
            with without_modes():
                self.generators.reveal(execution_of(self.program).state)

    def draw(self, info: OpInfo, args: Args, kwargs: Kwargs) -> Draw | None:
        """Note the place of an op in its random stream; None if it draws nothing."""
        if not (info.random and self._drawing):
            return None
        generator = kwargs.get("generator")
        if generator is None:
            # Some ops, such as ``poisson``, take the generator as a positional argument.
            generator = next((a for a in args if isinstance(a, torch.Generator)), None)
        explicit = generator is not None
        if generator is None:
            tensors = [t for t in tensors_in(args, kwargs) if t.is_meta]
            generator = default_generator(self.device_for(kwargs, tensors))
        return self.generators.draw(generator, len(self.program.ops), root=not explicit)

    def ambient_number(self) -> int:
        """The number of the ambient settings; a new entry is added only if the key changed."""
        key = torch.get_default_dtype(), is_deterministic()
        if key != self._ambient_key:
            self._ambient_key = key
            self.program.ambients.append(Ambient(*key))
        return len(self.program.ambients) - 1


def _of_none(slot: Slot) -> None:
    return None


def _is_usual(args: Args, kwargs: Kwargs) -> bool:
    """Whether a factory's result is plain memory whose layout the meta kernel gives exactly."""
    # Then factories fill memory that is otherwise uninitialised (torch/utils/deterministic.py).
    if is_deterministic():
        return False
    if kwargs.get("pin_memory") or kwargs.get("layout") not in (None, torch.strided):
        return False
    # Real and meta kernels disagree on the strides of dims of length one.
    like = args[0]
    return not isinstance(like, Tensor) or 1 not in like.size()
