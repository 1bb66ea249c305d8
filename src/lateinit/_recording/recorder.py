"""Record a construction at torch's dispatcher, without memory or arithmetic.

``Recorder`` is a dispatch mode. It sends every factory to ``meta``, records every op that writes to
a deferred storage, and computes a real answer when Python code reads a value. ``kinds`` classifies
a call, and ``Recorder`` has a method for each kind.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor

from lateinit._recording import value_bounds
from lateinit._recording.kinds import Call, Kind, classify, written
from lateinit._recording.writer import ProgramWriter, current
from lateinit._tensors import ON_META, attach, is_deferred_tensor, slot_of
from lateinit._torch import (
    INTEGERS,
    META,
    Args,
    DispatchMode,
    Kwargs,
    OpInfo,
    OpOverload,
    WeakTensor,
    flat,
    has_own_dispatch,
    here,
    is_wrapper,
    map_tensors,
    op_info,
    operators,
    tensors_in,
    untraced,
    unwrapped,
    without_modes,
)
from lateinit.errors import RecordingError


class RecordingMode(DispatchMode):
    """A dispatch mode that owns a writer, and has it record the ops of the thread."""

    def __init__(self, writer: ProgramWriter) -> None:
        super().__init__()
        self.writer = writer

    @untraced  # torch.compile looks for modes on the stack, but this one is off the stack here
    def __torch_dispatch__(
        self, func: OpOverload, types: Any, args: Args = (), kwargs: Kwargs | None = None
    ) -> Any:
        if self.ended:  # an interrupt has left it on a stack
            return func(*args, **(kwargs or {}))
        if types and self.leaves_to_class(args, kwargs or {}):
            return NotImplemented
        writer = self.writer
        busy, writer.busy = writer.busy, True
        try:
            return self.dispatch(op_info(func), args, kwargs or {})
        finally:
            writer.busy = busy

    def leaves_to_class(self, args: Args, kwargs: Kwargs) -> bool:
        """Whether the class of an argument gets the op first; the ops that it calls come here."""
        return False

    def dispatch(self, info: OpInfo, args: Args, kwargs: Kwargs) -> Any:
        """Treat one op."""
        raise NotImplementedError


class Recorder(RecordingMode):
    """Dispatch mode of a block: classifies each op, and treats it by its kind."""

    def leaves_to_class(self, args: Args, kwargs: Kwargs) -> bool:
        """Whether the class of an argument may wrap other tensors, deferred ones included.

        If such a tensor reports ``meta`` and deferred tensors take part, it is refused, like any
        tensor on meta.
        """
        given = tensors_in(args, kwargs)
        wrappers = [t for t in given if has_own_dispatch(t) and slot_of(t) is None]
        refused = any(t.is_meta for t in wrappers) and any(map(is_deferred_tensor, given))
        return bool(wrappers) and not refused

    def dispatch(self, info: OpInfo, args: Args, kwargs: Kwargs) -> Any:
        """Treat one op by its kind."""
        # Writes to exposed memory (numpy) are recorded before the op that uses it.
        if self.writer.shared:
            self.writer.take_back(tensors_in(args, kwargs))
        if kwargs.get("device") == META:
            kwargs = kwargs | {"device": self._meant_by_meta()}
        call = classify(info, args, kwargs)
        return self._TREAT[call.kind](self, info, args, kwargs, call)

    def _meant_by_meta(self) -> torch.device:
        """The device that a factory called with ``device=meta`` should use.

        Composite kernels pass on the device of a deferred argument, which is ``meta`` to them: so
        ``x[0] = 1`` makes a tensor of the number 1 on meta. Then the right device is the recorded
        device of the deferred tensor. Only if the Python call itself has ``meta`` as an argument,
        ``meta`` is right.
        """
        args, kwargs = self.writer.call
        asked = (kwargs or {}).get("device")
        if asked is None or torch.device(asked) != META:
            for tensor in map(unwrapped, tensors_in(args, kwargs or {})):
                if is_deferred_tensor(tensor):
                    return self.writer.device_of(tensor)
        return META

    # -- the kinds -----------------------------------------------------------------------------

    def _fill(self, info: OpInfo, args: Args, kwargs: Kwargs, call: Call) -> Any:
        """Record a fill, the most frequent kind of op, without running its meta kernel."""
        del call
        values = tuple(a for a in args[1:] if not isinstance(a, torch.Generator))
        generator = kwargs.get("generator")
        if generator is None and len(values) < len(args) - 1:
            generator = next(a for a in args[1:] if isinstance(a, torch.Generator))
        self.writer.overwrite(info, args[0], values, generator)
        return args[0]

    def _drawn(self, info: OpInfo, args: Args, kwargs: Kwargs, call: Call) -> Tensor:
        """Record a random factory as an empty tensor and an in-place fill.

        Only in-place fills can be drawn in parts (see ``_replay.chunks``).
        """
        del call
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

    def _show(self, info: OpInfo, args: Args, kwargs: Kwargs, call: Call) -> Any:
        """``real.set_(deferred)``: show memory that is kept equal to the deferred tensor."""
        del kwargs, call
        return info.func(args[0], self.writer.expose(args[1]))

    def _set_storage(self, info: OpInfo, args: Args, kwargs: Kwargs, call: Call) -> Any:
        """``deferred.set_(real)``: set a deferred twin of the real storage instead."""
        del call
        target, storage, *rest = args
        if isinstance(storage, Tensor):
            info = operators.by_name("aten::set_.source_Storage_storage_offset")
            rest = [storage.storage_offset(), storage.size(), storage.stride()]
            storage = storage.untyped_storage()
        shared = self.writer.shared
        # One twin for each real storage, so that two tensors set to it share memory here too.
        twin = shared.twin_of(storage)
        if twin is None:
            with without_modes():
                real = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
                copy = real.clone()
            twin = self.writer.keep(copy)
            shared.add_twin(twin, self.writer.ref(twin).storage, real, copy)
        return info.func(target, twin.untyped_storage(), *rest, **kwargs)

    def _on_meta(self, info: OpInfo, args: Args, kwargs: Kwargs, call: Call) -> Any:
        """Mark tensors that the constructor itself put on meta: they are never materialised.

        But a tensor that was set to the storage of a deferred one, as by ``copy.copy``, is
        deferred.
        """
        del call
        result = info.func(*args, **kwargs)
        for leaf in flat(result):
            if isinstance(leaf, Tensor) and leaf.is_meta:
                slot = slot_of(leaf)
                if slot is None:
                    attach(leaf.untyped_storage(), ON_META)
                elif slot is not ON_META:
                    self.writer.born.append(WeakTensor(leaf))
        return result

    def _mixed(self, info: OpInfo, args: Args, kwargs: Kwargs, call: Call) -> Any:
        if info.name.startswith("prims::"):
            # Inside a kernel that uses meta to find a shape, such as mul_zerotensor of
            # aten/src/ATen/native/BinaryOps.cpp. Python code that mixes devices calls an aten op.
            return self._on_meta(info, args, kwargs, call)
        wrapper = next(filter(is_wrapper, tensors_in(args, kwargs)), None)
        if wrapper is not None:
            raise RecordingError(
                f"{info.name} takes a deferred tensor and a {type(wrapper).__name__}, which "
                "consists of other tensors and cannot be recorded: make it after "
                "lateinit.materialize()"
            )
        raise RecordingError(
            f"{info.name} mixes a deferred tensor with one that the constructor put on meta: "
            "eager construction would fail here too"
        )

    def _real(self, info: OpInfo, args: Args, kwargs: Kwargs, call: Call) -> Any:
        """Run an op on real tensors, unless it makes new random or uninitialised data.

        New data would cost memory and draws of the construction, so it is recorded instead.
        """
        del call
        writer = self.writer
        # torch.tensor and torch.as_tensor end in lift_fresh. If the storage is resizable, torch has
        # just allocated it; otherwise (as_tensor of an array) its memory is shared.
        if info.name == "aten::lift_fresh":
            data = args[0]
            return writer.keep(data) if data.untyped_storage().resizable() else data
        changed = written(info, args, kwargs)
        if not changed and not info.foreign and (info.random or info.from_sizes):
            return writer.record(info, args, kwargs, [])
        for tensor in changed:
            writer.data.before_write(tensor)
        result = self._run_now(info, args, kwargs)
        # The written tensor may be a view of exposed memory.
        if changed and writer.shared:
            writer.shared.take_back_real(changed)
        return result

    def _read(self, info: OpInfo, args: Args, kwargs: Kwargs, call: Call) -> Any:
        """Answer an op that returns no tensor, such as ``item`` or ``equal``, with real values."""
        del call
        if info.name == "aten::_local_scalar_dense":
            program, ref = self.writer.program, self.writer.ref(args[0])
            certain = value_bounds.certain_value(program, ref)
            if certain is not None:
                return certain
        return info.func(*self._evaluated(args), **kwargs)

    def _leave(self, info: OpInfo, args: Args, kwargs: Kwargs, call: Call) -> Any:
        """Run an op that writes deferred values into a real tensor: compute them now.

        An op that takes lists, such as ``_foreach_mul_``, may write deferred tensors too.
        """
        for tensor in call.real:
            self.writer.data.before_write(tensor)
        late = [t for t in written(info, args, kwargs) if t.is_meta]
        values = [self.writer.read(t).clone() for t in late]
        copies = {id(t): value for t, value in zip(late, values, strict=True)}

        def value(tensor: Tensor) -> Tensor:
            copy = copies.get(id(tensor))
            return self._value(tensor) if copy is None else copy

        result = self._run_now(info, map_tensors(args, value), map_tensors(kwargs, value))
        for tensor, changed in zip(late, values, strict=True):
            self.writer.assign(tensor, changed)
        if self.writer.shared:
            self.writer.shared.take_back_real(call.real)
        originals = {id(copies[id(t)]): t for t in late}
        return map_tensors(result, lambda t: originals.get(id(t), t)) if late else result

    def _run_now(self, info: OpInfo, args: Args, kwargs: Kwargs) -> Any:
        """Run an op that writes to a real tensor; generators are in their eager states."""
        if not info.random:
            return info.func(*args, **kwargs)
        with self.writer.settled():
            # The schema of a foreign op does not state whether it draws: compare states.
            before = torch.default_generator.get_state() if info.foreign else None
            result = info.func(*args, **kwargs)
            if before is None or not before.equal(torch.default_generator.get_state()):
                self.writer.program.seed_bound = f"{info.name} drew into a real tensor"
        return result

    def _record(self, info: OpInfo, args: Args, kwargs: Kwargs, call: Call) -> Any:
        return self.writer.record(info, args, kwargs, call.deferred)

    def _evaluated(self, arguments: Any) -> Any:
        return map_tensors(arguments, self._value)

    def _value(self, tensor: Tensor) -> Tensor:
        return self.writer.read(tensor) if tensor.is_meta else tensor

    _TREAT: ClassVar[dict[Kind, Callable[..., Any]]] = {
        Kind.FILL: _fill,
        Kind.DRAWN: _drawn,
        Kind.SHOW: _show,
        Kind.SET_STORAGE: _set_storage,
        Kind.ON_META: _on_meta,
        Kind.MIXED: _mixed,
        Kind.REAL: _real,
        Kind.READ: _read,
        Kind.LEAVE: _leave,
        Kind.RECORD: _record,
    }


@contextlib.contextmanager
def in_force(mode: RecordingMode) -> Iterator[None]:
    """A block in which a dispatch mode records ops."""
    outer = current()
    try:
        here.writer = mode.writer
        with mode:
            yield
    finally:
        here.writer = outer
        mode.ended = True
