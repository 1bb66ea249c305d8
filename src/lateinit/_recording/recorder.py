"""Record a construction at torch's dispatcher, without memory or arithmetic.

``Recorder`` is a dispatch mode. It sends every factory to ``meta``, records every op that writes to
a deferred storage, and computes a real answer where Python code reads a value. ``dispatch`` is the
place to look up how a given op is treated.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from lateinit._program import Op, Program
from lateinit._recording import value_bounds
from lateinit._recording.writer import ProgramWriter
from lateinit._replay import execution_of
from lateinit._tensors import ON_META, attach, is_deferred_tensor, slot_of
from lateinit._torch import (
    INTEGERS,
    META,
    Args,
    DispatchMode,
    Kwargs,
    OpInfo,
    OpOverload,
    flat,
    has_tensor,
    here,
    map_tensors,
    op_info,
    operators,
    tensors_in,
    without_modes,
)
from lateinit.errors import RecordingError


def current() -> Recorder | None:
    """The recorder in force in this thread, or None outside blocks."""
    recorder: Recorder | None = here.recorder
    return recorder


class Recorder(ProgramWriter, DispatchMode):
    """Dispatch mode: classifies each op of the thread and records those on deferred tensors.

    ``busy`` is True while an op is dispatched: the calls of torch's Python kernels below it are no
    calls of the constructor. ``call`` holds the arguments of the Python call that led to the op.
    """

    def __init__(self, program: Program | None = None) -> None:
        ProgramWriter.__init__(self, program or Program())
        DispatchMode.__init__(self)
        self.busy = False
        self.call: tuple[tuple[Any, ...], dict[str, Any] | None] = ((), None)

    def __torch_dispatch__(
        self, func: OpOverload, types: Any, args: Args = (), kwargs: Kwargs | None = None
    ) -> Any:
        busy, self.busy = self.busy, True
        try:
            return self.dispatch(op_info(func), args, kwargs or {})
        finally:
            self.busy = busy

    def end(self) -> None:
        """Record nothing any more, even if an interrupt has left the mode on a stack."""
        self.ended = self.busy = True
        self.dispatch = _run  # type: ignore[method-assign]

    def dispatch(self, info: OpInfo, args: Args, kwargs: Kwargs) -> Any:
        """Treat one op by the kinds of its arguments: deferred, real, or on meta by request."""
        # Writes to exposed memory (numpy) since the last op come before this op in the program.
        if self.shared:
            self.shared.take_back()
        if kwargs.get("device") == META:
            kwargs = kwargs | {"device": self._meant_by_meta()}
        # Before the arguments are sorted: a fill from numbers needs only the tensor it fills.
        if info.fills and self._filled(info, args, kwargs):
            return args[0]
        if info.random and info.filled_by is not None:
            return self._fill(info, args, kwargs)
        deferred, real, on_meta = self._sort(args, kwargs)
        # A real tensor is set to a deferred one: it must show memory that both share.
        if deferred and real and info.name == "aten::set_.source_Tensor" and args[1].is_meta:
            return info.func(args[0], self.expose(args[1]))
        set_storage = info.name.startswith("aten::set_.source_Storage")
        if deferred and set_storage and args[1].device != META:
            return self._set_storage(info, args, kwargs)
        if kwargs.get("device") == META or (on_meta and not deferred):
            return self._on_meta(info.func(*args, **kwargs))
        # Here a meta tensor and a deferred one meet; eagerly the latter has a real device.
        if on_meta:
            raise RecordingError(
                f"{info.name} mixes a deferred tensor with one that the constructor put on meta: "
                "eager construction would fail here too"
            )
        if not deferred and real:
            return self._on_real(info, args, kwargs, real)
        # The result is no tensor: Python code wants a value now.
        if not info.returns_tensor and not info.mutates:
            return self._answer(info, args, kwargs)
        if deferred and self._writes_real(info, args, kwargs):
            return self._leave(info, args, kwargs)
        return self.record(info, args, kwargs, deferred)

    def _meant_by_meta(self) -> torch.device:
        """The device that a factory called with ``device=meta`` should use.

        Composite kernels pass on the device of a deferred argument, which is ``meta`` to them: so
        ``x[0] = 1`` makes a tensor of the number 1 on meta. The deferred tensor's recorded device
        is meant. Only if the Python call itself asked for ``meta`` is ``meta`` meant.
        """
        args, kwargs = self.call
        asked = (kwargs or {}).get("device")
        if asked is None or torch.device(asked) != META:
            for tensor in tensors_in(args, kwargs or {}):
                if is_deferred_tensor(tensor):
                    return self.device_of(tensor)
        return META

    def _sort(self, args: Args, kwargs: Kwargs) -> tuple[list[Tensor], list[Tensor], bool]:
        """The deferred and the real tensors of a call; whether any is on meta by request."""
        deferred: list[Tensor] = []
        real: list[Tensor] = []
        on_meta = False
        for tensor in tensors_in(args, kwargs):
            slot = slot_of(tensor)
            if slot is None or slot is ON_META:
                if tensor.is_meta:
                    on_meta = True
                else:
                    real.append(tensor)
            else:
                deferred.append(tensor)
        return deferred, real, on_meta

    def _filled(self, info: OpInfo, args: Args, kwargs: Kwargs) -> bool:
        """Record a fill, the most frequent kind of op, without running its meta kernel."""
        if has_tensor(args[1:]):
            return False
        values = tuple(a for a in args[1:] if not isinstance(a, torch.Generator))
        generator = kwargs.get("generator")
        if generator is None and len(values) < len(args) - 1:
            generator = next(a for a in args[1:] if isinstance(a, torch.Generator))
        return self.overwrite(info, args[0], values, generator)

    def _fill(self, info: OpInfo, args: Args, kwargs: Kwargs) -> Tensor:
        """Record a random factory as an empty tensor and an in-place fill.

        Only in-place fills can be drawn in parts (see ``_replay.chunks``).
        """
        fill = info.fill_for(args)
        assert fill is not None
        given = {k: v for k, v in kwargs.items() if k != "generator"}
        if info.from_sizes:
            empty, shape = "aten::empty_like", args[0]
        else:
            empty, shape = "aten::empty.memory_format", args[info.arguments.index("size")]
            if fill[0] == INTEGERS and given.get("dtype") is None:
                given["dtype"] = torch.int64
        tensor: Tensor = self.dispatch(operators.by_name(empty), (shape,), given)
        generator = {"generator": kwargs["generator"]} if kwargs.get("generator") else {}
        # On meta by request: eager construction draws nothing there either.
        if tensor.is_meta and slot_of(tensor) is ON_META:
            return tensor
        filled: Tensor = self.dispatch(operators.by_name(fill[0]), (tensor, *fill[1]), generator)
        return filled

    # -- real data that enters, values that leave ----------------------------------------------

    def _on_real(self, info: OpInfo, args: Args, kwargs: Kwargs, real: list[Tensor]) -> Any:
        """Run an op on real tensors, unless it makes new random or uninitialised data.

        New data would be memory and draws of the construction: it is recorded instead.
        """
        # torch.tensor and torch.as_tensor end in lift_fresh. torch allocated the memory of a
        # resizable storage, just now; the memory of any other (as_tensor of an array) is shared.
        if info.name == "aten::lift_fresh":
            data = args[0]
            return self._lift(data) if data.untyped_storage().resizable() else data
        written = [t for i in info.mutates for t in tensors_in((args[i],), {})]
        written += tensors_in((), {k: kwargs.get(k) for k in info.mutates_kw})
        if not written and not info.foreign and (info.random or info.from_sizes):
            return self.record(info, args, kwargs, [])
        for tensor in written:
            self.data.before_write(tensor)
        if info.random:
            # It draws into real memory now, so the generator must have its eager state.
            self.settle()
        # The schema of an op that is not torch's does not say whether it draws: compare states.
        before = torch.default_generator.get_state() if info.foreign else None
        result = info.func(*args, **kwargs)
        if info.random and (
            before is None or not before.equal(torch.default_generator.get_state())
        ):
            self.program.seed_bound = f"{info.name} drew into a real tensor"
        # The written tensor may be a view of exposed memory.
        if written and self.shared:
            self.shared.take_back(every=True)
        return result

    def _lift(self, data: Tensor) -> Tensor:
        """A deferred constant of data that no one else can write to; the data is not copied."""
        tensor: Tensor = self._mirror(data, data.device)
        constant, outs = self.data.own(data), (self.ref(tensor),)
        op = Op(operators.CONSTANT, (constant,), {}, outs, None, self._ambient(), "constant")
        self.program.ops.append(op)
        return tensor

    def lift(self, data: Tensor) -> Tensor:
        """A deferred copy of real data."""
        return self._lift(data.detach().clone())

    def _writes_real(self, info: OpInfo, args: Args, kwargs: Kwargs) -> bool:
        written = [args[i] for i in info.mutates if i < len(args)]
        written += [kwargs.get(k) for k in info.mutates_kw]
        return any(not t.is_meta for t in tensors_in(tuple(written), {}))

    def _leave(self, info: OpInfo, args: Args, kwargs: Kwargs) -> Any:
        """Run an op that writes deferred values into a real tensor: compute them now."""
        for tensor in tensors_in(args, kwargs):
            if not tensor.is_meta:
                self.data.before_write(tensor)
        return info.func(*self._evaluated(args), **self._evaluated(kwargs))

    def _answer(self, info: OpInfo, args: Args, kwargs: Kwargs) -> Any:
        """Answer an op that returns no tensor, such as ``item`` or ``equal``, with real values."""
        if info.name == "aten::_local_scalar_dense":
            certain = value_bounds.certain_value(self.program, self.ref(args[0]))
            if certain is not None:
                return certain
        return info.func(*self._evaluated(args), **kwargs)

    def _evaluated(self, arguments: Any) -> Any:
        return map_tensors(arguments, lambda t: self.read(t) if t.is_meta else t)

    def read(self, tensor: Tensor) -> Tensor:
        """The current values of a deferred tensor; notes that they were read if random."""
        if self.shared:
            self.shared.take_back()
        return self.values.read(self.ref(tensor))

    def expose(self, tensor: Tensor) -> Tensor:
        """A real tensor kept equal to a deferred one: writes to either show in the other."""
        return self.shared.expose(tensor, self.ref(tensor))

    def _set_storage(self, info: OpInfo, args: Args, kwargs: Kwargs) -> Any:
        """``deferred.set_(real storage)``: set a deferred twin of the real storage instead."""
        target, storage, *rest = args
        # One twin for each real storage, so that two tensors set to it share memory here too.
        twin = self.shared.twin_of(storage)
        if twin is None:
            with without_modes():
                real = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
            twin = self.lift(real)
            self.shared.add_twin(twin, self.ref(twin), real)
        return info.func(target, twin.untyped_storage(), *rest, **kwargs)

    # -- the end of a block --------------------------------------------------------------------

    def finish(self) -> None:
        """Close the storages of the block, and record the last writes to shared memory."""
        for storage in self.program.storages:
            storage.closed = True
        if self.shared:
            with without_modes():
                self.shared.finish()

    def settle(self) -> None:
        """Put the generators into the states that eager construction would have left by now."""
        # An open hole is taken to draw nothing: how much it draws is not known yet.
        with without_modes():
            execution = execution_of(self.program, past_holes=None in self.program.holes)
            self.generators.settle(execution.state)

    def _on_meta(self, result: Any) -> Any:
        """Mark tensors that the constructor itself put on meta: they are never materialised."""
        for leaf in flat(result):
            if isinstance(leaf, Tensor) and leaf.is_meta and slot_of(leaf) is None:
                attach(leaf.untyped_storage(), ON_META)
        return result


@contextlib.contextmanager
def in_force(
    recorder: Recorder, mode: contextlib.AbstractContextManager[Any] | None = None
) -> Iterator[Recorder]:
    """Put a recorder, and its function mode if it has one, in force for a block."""
    outer = current()
    try:
        here.recorder = recorder
        with recorder, mode or contextlib.nullcontext():
            yield recorder
    finally:
        here.recorder = outer
        recorder.end()


def _run(info: OpInfo, args: Args, kwargs: Kwargs) -> Any:
    return info.func(*args, **kwargs)
