"""Writing the program of a construction that runs without memory or arithmetic.

``Recorder`` sits in torch's dispatcher: it sends every factory to ``meta``, notes every op that
writes to a deferred storage, and answers with real values where values leave. Ops that only make
views need no note (see ``program``).
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode

from lateinit import bounds, ops
from lateinit.arguments import META, has_tensor, kwargs_to_meta, tensors_in, to_meta
from lateinit.errors import RecordingError
from lateinit.generators import Generators, default_generator
from lateinit.labels import initializer
from lateinit.ops import OpInfo, describe
from lateinit.program import Ambient, Draw, Op, Program, Read, Storage, TensorRef
from lateinit.realdata import RealData, is_plain
from lateinit.replay import Replay, Storages, flat, without_modes
from lateinit.sharing import SharedMemory
from lateinit.streams import Streams
from lateinit.tensors import ON_META, Slot, attach, is_deferred_tensor, slot_of
from lateinit.values import Values

_CPU = torch.device("cpu")
_active = threading.local()


def current() -> Recorder | None:
    """The recorder of the block that this thread is in."""
    recorder: Recorder | None = getattr(_active, "recorder", None)
    return recorder


class Recorder(TorchDispatchMode):
    """Writes what a thread does in torch into a program."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # True would import torch._dynamo (1.2 s) and wrap every call.
        return False

    def __init__(self, program: Program | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.program = program or Program()
        self.generators = Generators(self.program)
        self.born: list[weakref.ref[Tensor]] = []
        self.busy = False
        self.autocasting = False
        self.call: tuple[tuple[Any, ...], dict[str, Any] | None] = ((), None)
        self._ambient_key: tuple[Any, ...] = ()
        self.values = Values(self.program)
        self.data = RealData(self.program)
        self.shared = SharedMemory(self.values, self.data, self._overwrite)

    def __torch_dispatch__(
        self,
        func: OpOverload,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        busy, self.busy = self.busy, True
        try:
            return self.dispatch(describe(func), args, kwargs or {})
        finally:
            self.busy = busy

    def dispatch(self, info: OpInfo, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Decide what an op is to a recording, by what it is given."""
        if self.shared:
            self.shared.take_back()
        if kwargs.get("device") == META:
            kwargs = kwargs | {"device": self._meant_by_meta()}
        if info.overwrites and self._filled(info, args, kwargs):
            return args[0]
        fill = _FILLS.get(info.name)
        if fill is not None:
            return self._fill(fill, info, args, kwargs)
        deferred, real, on_meta = self._sort(args, kwargs)
        if deferred and real and info.name == "aten::set_.source_Tensor" and args[1].is_meta:
            return info.func(args[0], self.expose(args[1]))
        set_storage = info.name.startswith("aten::set_.source_Storage")
        if deferred and set_storage and args[1].device != META:
            return self._set_storage(info, args, kwargs)
        if kwargs.get("device") == META or (on_meta and not deferred):
            return self._on_meta(info.func(*args, **kwargs))
        if on_meta:
            raise RecordingError(
                f"{info.name} mixes a deferred tensor with one that the constructor put on meta: "
                "eager construction would fail here too"
            )
        if not deferred and real:
            return self._on_real(info, args, kwargs, real)
        if not info.returns_tensor and not info.mutates:
            return self._answer(info, args, kwargs)
        if deferred and self._writes_real(info, args, kwargs):
            return self._leave(info, args, kwargs)
        return self.record(info, args, kwargs, deferred)

    def _meant_by_meta(self) -> torch.device:
        """The device that a factory is to use: kernels ask for that of a deferred argument.

        A scalar that is assigned to a slice becomes a tensor on the device of the other one; only
        where the caller himself asked for meta is meta meant.
        """
        args, kwargs = self.call
        asked = (kwargs or {}).get("device")
        if asked is None or torch.device(asked) != META:
            for tensor in tensors_in(args, kwargs or {}):
                if is_deferred_tensor(tensor):
                    return self.device_of(tensor)
        return META

    # -- what an op is given -------------------------------------------------------------------

    def _sort(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[list[Tensor], list[Tensor], bool]:
        """The deferred and the real tensors among arguments; whether one is on meta by request."""
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

    def ref(self, tensor: Tensor) -> TensorRef:
        """The window that a deferred tensor is on its storage."""
        slot = slot_of(tensor)
        assert slot is not None
        return self._ref(slot, tensor)

    def _ref(self, slot: Slot, tensor: Tensor) -> TensorRef:
        program, number = slot.resolve()
        if program is not self.program:
            self.program.absorb(program)
            _, number = slot.resolve()
        return TensorRef.of(tensor, number)

    def _referred(self, value: Any) -> Any:
        """An argument as it is written into the program."""
        if isinstance(value, Tensor):
            return self.ref(value) if value.is_meta else self.data.refer(value)
        if isinstance(value, (list, tuple)):
            return tuple(self._referred(item) for item in value)
        if isinstance(value, torch.UntypedStorage):
            raise RecordingError(
                "an untyped storage was written to while recording: write to a tensor instead"
            )
        return value

    # -- recording -----------------------------------------------------------------------------

    def record(
        self,
        info: OpInfo,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        deferred: list[Tensor],
    ) -> Any:
        """Note an op, and give the deferred tensors that it would return."""
        alone = info.scalar_inplace and len(deferred) == 1 and args[0] is deferred[0]
        if alone and args[0].is_floating_point() and not has_tensor(args[1:]):
            self._append(info, args, kwargs, ())
            return args[0]
        if not self.autocasting or info.mutates:
            try:
                result = info.func(*to_meta(args), **kwargs_to_meta(info, kwargs))
            except Exception:  # noqa: BLE001 - what eager would raise, the run raises
                return self._by_running(info, args, kwargs, deferred)
        else:
            return self._by_running(info, args, kwargs, deferred)
        self._note(info, args, kwargs, deferred, result)
        return result

    def made(self, tensor: Tensor, device: torch.device, fill: Fill | None) -> Tensor:
        """Note a new tensor and what it is filled with; its memory needs no op."""
        number = len(self.program.storages)
        storage = tensor.untyped_storage()
        attach(storage, Slot(self.program, number))
        self.program.storages.append(Storage(storage.nbytes(), device))
        self.born.append(weakref.ref(tensor))
        if fill is not None:
            name, values = fill
            args = (TensorRef.of(tensor, number), *values)
            self.program.ops.append(Op(name, args, {}, (), None, self._ambient(), None))
        return tensor

    def _filled(self, info: OpInfo, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """``record`` for the most frequent ops, without what they do not need."""
        if has_tensor(args[1:]):
            return False
        values = tuple(a for a in args[1:] if not isinstance(a, torch.Generator))
        generator = kwargs.get("generator")
        if generator is None and len(values) < len(args) - 1:
            generator = next(a for a in args[1:] if isinstance(a, torch.Generator))
        return self.overwrite(info, args[0], values, generator)

    def overwrite(
        self,
        info: OpInfo,
        tensor: Tensor,
        values: tuple[Any, ...],
        generator: Any,
        label: str | None = None,
    ) -> bool:
        """Note an op that fills a tensor with numbers in place, if it is deferred.

        ``label`` says which initialiser does so, where that is known. Only of floating-point
        tensors it is known without a kernel that it can be done.
        """
        slot = slot_of(tensor)
        if slot is None or slot is ON_META or not tensor.is_floating_point():
            return False
        if self.shared:
            self.shared.take_back()
        ref = self._ref(slot, tensor)  # may bring in another program, and its ops
        draw = None
        if info.random:
            drawn = generator or default_generator(self.program.storages[ref.storage].device)
            number = len(self.program.ops)
            draw = self.generators.draw(drawn, number, root=generator is None)
        label = label or initializer()
        op = Op(info.name, (ref, *values), {}, (), draw, self._ambient(), label)
        self.program.ops.append(op)
        if self.shared:
            self.shared.show()
        return True

    def _note(
        self,
        info: OpInfo,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        deferred: list[Tensor],
        result: Any,
    ) -> None:
        device = self._device(kwargs, deferred)
        factory = FACTORIES.get(info.name)
        if factory is not None and _is_usual(args, kwargs):
            self.made(result, device, factory(args))
            return
        results = flat(result)
        new = [self._adopt(leaf, device) for leaf in results if isinstance(leaf, Tensor)]
        if (any(new) or info.mutates or info.mutates_kw) and not info.metadata_only:
            self._append(info, args, kwargs, results)

    def _device(self, kwargs: dict[str, Any], deferred: list[Tensor]) -> torch.device:
        asked = kwargs.get("device")
        if asked is not None:
            return torch.device(asked)
        for tensor in sorted(deferred, key=lambda t: t.dim() == 0):
            return self.device_of(tensor)
        return _CPU

    def device_of(self, tensor: Tensor) -> torch.device:
        """The device that a deferred tensor was asked for."""
        return self.storage_of(tensor).device

    def storage_of(self, tensor: Tensor) -> Storage:
        """What the program knows of a deferred tensor's storage."""
        slot = slot_of(tensor)
        assert slot is not None
        program, number = slot.resolve()
        return program.storages[number]

    def _adopt(self, tensor: Tensor, device: torch.device) -> bool:
        """Give a new meta storage its number; keep the size of a known one up to date."""
        storage = tensor.untyped_storage()
        slot = slot_of(tensor)
        if slot is None:
            attach(storage, Slot(self.program, len(self.program.storages)))
            self.program.storages.append(Storage(storage.nbytes(), device))
            self.born.append(weakref.ref(tensor))
            return True
        program, number = slot.resolve()
        program.storages[number].nbytes = storage.nbytes()
        self.born.append(weakref.ref(tensor))
        return False

    def _append(
        self, info: OpInfo, args: tuple[Any, ...], kwargs: dict[str, Any], results: tuple[Any, ...]
    ) -> None:
        written = {k: self._referred(v) for k, v in kwargs.items() if k != "generator"}
        referred = tuple(self._referred(value) for value in args)
        draw = self._draw(info, args, kwargs) if info.random else None
        outs = tuple(
            self.ref(leaf) if isinstance(leaf, Tensor) and leaf.is_meta else None
            for leaf in results
        )
        label = initializer() if info.mutates or info.mutates_kw else None
        self.program.ops.append(
            Op(info.name, referred, written, outs, draw, self._ambient(), label)
        )
        if self.shared:
            self.shared.show()

    def _draw(self, info: OpInfo, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Draw | None:
        generator = kwargs.get("generator")
        if generator is None:
            generator = next((a for a in args if isinstance(a, torch.Generator)), None)
        explicit = generator is not None
        if generator is None:
            tensors = [t for t in tensors_in(args, kwargs) if t.is_meta]
            generator = default_generator(self._device(kwargs, tensors))
        return self.generators.draw(generator, len(self.program.ops), root=not explicit)

    def ambient(self) -> Ambient:
        """The settings in force now."""
        # Below the autocast key, where this runs, autocast seems to be off: whether it is on was
        # seen above it, and the device is that of the deferred tensors, which pass for cpu there.
        device = "cuda" if self.autocasting and torch.is_autocast_enabled("cuda") else "cpu"
        autocast = (device, torch.get_autocast_dtype(device)) if self.autocasting else None
        return Ambient(
            torch.get_default_dtype(), torch.are_deterministic_algorithms_enabled(), autocast
        )

    def _ambient(self) -> int:
        key = (
            torch.get_default_dtype(),
            torch._C._get_deterministic_algorithms(),
            self.autocasting,
        )
        if key != self._ambient_key:
            self._ambient_key = key
            self.program.ambients.append(self.ambient())
        return len(self.program.ambients) - 1

    def _fill(
        self, fill: str, info: OpInfo, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Tensor:
        """A random factory as what it is: an empty tensor, filled in place."""
        like = "_like" in info.name
        shape_at = 0 if like else next(i for i, a in enumerate(args) if not isinstance(a, int))
        bounds_ = tuple(args[1:]) if like else tuple(args[:shape_at])
        given = {k: v for k, v in kwargs.items() if k != "generator"}
        if fill == "random_" and not like and given.get("dtype") is None:
            given["dtype"] = torch.int64
        name = "aten::empty_like" if like else "aten::empty.memory_format"
        tensor: Tensor = self.dispatch(ops.by_name(name), (args[shape_at],), given)
        if fill == "random_":
            bounds_ = bounds_ if len(bounds_) == 2 else (0, *bounds_)
            fill = "random_.from"
        generator = {"generator": kwargs["generator"]} if kwargs.get("generator") else {}
        if tensor.is_meta and slot_of(tensor) is ON_META:
            return tensor
        filled: Tensor = self.dispatch(ops.by_name(f"aten::{fill}"), (tensor, *bounds_), generator)
        return filled

    def _by_running(
        self,
        info: OpInfo,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        deferred: list[Tensor],
    ) -> Any:
        """Note an op whose result's shape only a run can tell; what it raises, eager raises."""
        referred = tuple(self._referred(value) for value in args)
        written = {k: self._referred(v) for k, v in kwargs.items() if k != "generator"}
        ambient = self._ambient()
        probe = Op(info.name, referred, written, (), None, ambient, None)
        if info.random:
            probe = probe._replace(draw=self._draw(info, args, kwargs))
        replay = Replay(self.program)
        storages = self._inputs(replay, probe)
        with without_modes(), self.program.ambients[ambient].in_force():
            results = replay.call(probe, storages)
        if not all(is_plain(leaf) for leaf in results if isinstance(leaf, Tensor)):
            if info.random or self.values.are_random(probe.read()):
                self.program.seed_bound = f"{info.name} made a tensor without a plain layout"
            return results[0] if len(results) == 1 else results
        if info.mutates:
            made: list[Any] = [args[info.mutates[0]]]
        else:
            device = self._device(kwargs, deferred)
            made = [self._mirror(leaf, device) for leaf in results]
        outs = tuple(self.ref(leaf) if isinstance(leaf, Tensor) else None for leaf in made)
        self.program.ops.append(probe._replace(outs=outs))
        if info.random or self.values.are_random(probe.read()):
            # Python sees the shapes: another seed must give the same.
            reads = [Read(ref, len(self.program.ops), b"") for ref in outs if ref is not None]
            self.program.reads.extend(reads)
        return made[0] if len(made) == 1 else tuple(made)

    def _mirror(self, real: Any, device: torch.device) -> Any:
        """A deferred tensor with the layout of a real one."""
        if not isinstance(real, Tensor):
            return real
        tensor = torch.empty_strided(real.size(), real.stride(), dtype=real.dtype, device=META)
        self._adopt(tensor, device)
        return tensor

    # -- real data and values that leave -------------------------------------------------------

    def _on_real(
        self, info: OpInfo, args: tuple[Any, ...], kwargs: dict[str, Any], real: list[Tensor]
    ) -> Any:
        """An op on real tensors alone runs, unless it makes new random or unwritten data."""
        if info.name == "aten::lift_fresh":
            data = args[0]
            return self._lift(data) if data.untyped_storage().resizable() else data
        written = [t for i in info.mutates for t in tensors_in((args[i],), {})]
        written += tensors_in((), {k: kwargs.get(k) for k in info.mutates_kw})
        if not written and (info.random or info.from_sizes):
            return self.record(info, args, kwargs, [])
        for tensor in written:
            self.data.before_write(tensor)
        if info.random:
            self.settle()
            self.program.seed_bound = f"{info.name} drew into a real tensor"
        result = info.func(*args, **kwargs)
        if written and self.shared:
            self.shared.take_back(every=True)
        return result

    def _lift(self, data: Tensor) -> Tensor:
        """``torch.tensor(...)``: data that nobody else can see becomes a deferred constant."""
        tensor: Tensor = self._mirror(data, data.device)
        constant, outs = self.data.own(data), (self.ref(tensor),)
        op = Op(ops.CONSTANT, (constant,), {}, outs, None, self._ambient(), "constant")
        self.program.ops.append(op)
        return tensor

    def _overwrite(self, tensor: Tensor, data: Tensor) -> None:
        self._append(ops.by_name("aten::copy_"), (tensor, data), {}, ())

    def lift(self, data: Tensor) -> Tensor:
        """A deferred copy of real data."""
        return self._lift(data.detach().clone())

    def _writes_real(self, info: OpInfo, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        written = [args[i] for i in info.mutates if i < len(args)]
        written += [kwargs.get(k) for k in info.mutates_kw]
        return any(not t.is_meta for t in tensors_in(tuple(written), {}))

    def _leave(self, info: OpInfo, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Write deferred values into a real tensor: they must be computed now."""
        for tensor in tensors_in(args, kwargs):
            if not tensor.is_meta:
                self.data.before_write(tensor)
        real = [self._evaluated(value) for value in args]
        return info.func(*real, **{k: self._evaluated(v) for k, v in kwargs.items()})

    def _answer(self, info: OpInfo, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Give a value that leaves: ``item``, ``equal`` and the like."""
        if info.name == "aten::_local_scalar_dense":
            certain = bounds.certain_value(self.program, self.ref(args[0]))
            if certain is not None:
                return certain
        return info.func(*(self._evaluated(item) for item in args), **kwargs)

    def _evaluated(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self.read(value) if value.is_meta else value
        if isinstance(value, (list, tuple)):
            return type(value)(self._evaluated(item) for item in value)
        return value

    def _inputs(self, replay: Replay, op: Op) -> Storages:
        needed = dict.fromkeys(ref.storage for ref in op.read())
        needed |= dict.fromkeys(ref.storage for ref in op.written())
        return replay.values(needed)

    def read(self, tensor: Tensor) -> Tensor:
        """The values that a deferred tensor has now; that random ones were read is noted."""
        return self.values.read(self.ref(tensor))

    def expose(self, tensor: Tensor) -> Tensor:
        """A real tensor that shares its life with a deferred one: writes show on either side."""
        return self.shared.expose(tensor, self.ref(tensor))

    def _set_storage(self, info: OpInfo, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """``set_`` of a real storage: the tensor shows a deferred twin of it."""
        target, storage, *rest = args
        twin = self.shared.twin_of(storage)
        if twin is None:
            with without_modes():
                real = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
            twin = self.lift(real)
            self.shared.add_twin(twin, self.ref(twin), real)
        return info.func(target, twin.untyped_storage(), *rest, **kwargs)

    def finish(self) -> None:
        """Note what is still to be noted when the block ends."""
        for storage in self.program.storages:
            storage.closed = True
        with without_modes():
            self.shared.finish()

    def _on_meta(self, result: Any) -> Any:
        """What the constructor itself put on meta stays there."""
        for leaf in flat(result):
            if isinstance(leaf, Tensor) and leaf.is_meta and slot_of(leaf) is None:
                attach(leaf.untyped_storage(), ON_META)
        return result

    def settle(self) -> None:
        """Put the generators where eager construction would have them now."""
        with without_modes():
            streams = Replay(self.program).streams
            if None in self.program.holes:
                streams = Streams(self.program, streams.make, past_holes=True)
            self.generators.settle(streams.state)


Fill = tuple[str, tuple[Any, ...]]
"""The in-place op that a factory ends in, and its numbers."""


def _empty(args: tuple[Any, ...]) -> None:
    return None


def _zeros(args: tuple[Any, ...]) -> Fill:
    return "aten::zero_", ()


def _ones(args: tuple[Any, ...]) -> Fill:
    return "aten::fill_.Scalar", (1,)


def _full(value_at: int) -> Callable[[tuple[Any, ...]], Fill]:
    return lambda args: ("aten::fill_.Scalar", (args[value_at],))


FACTORIES: dict[str, Callable[[tuple[Any, ...]], Fill | None]] = {
    "aten::empty.memory_format": _empty,
    "aten::empty_strided": _empty,
    "aten::empty_like": _empty,
    "aten::new_empty": _empty,
    "aten::new_empty_strided": _empty,
    "aten::zeros": _zeros,
    "aten::zeros_like": _zeros,
    "aten::new_zeros": _zeros,
    "aten::ones": _ones,
    "aten::ones_like": _ones,
    "aten::new_ones": _ones,
    "aten::full": _full(1),
    "aten::full_like": _full(1),
    "aten::new_full": _full(2),
}
"""Factories that are recorded as what they are: memory, and an op that fills it.

Of a tensor that they are given they use the sizes alone, which need no values.
"""


def _is_usual(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether what a factory gives is known without its kernel, and is plain memory."""
    if torch._C._get_deterministic_algorithms():  # fills what is empty
        return False
    if kwargs.get("pin_memory") or kwargs.get("layout") not in (None, torch.strided):
        return False
    # Kernels and their meta twins disagree on the strides of dims of length one.
    like = args[0]
    return not isinstance(like, Tensor) or 1 not in like.size()


_FILLS = {
    f"aten::{name}{overload}": fill
    for name, fill in (("rand", "uniform_"), ("randn", "normal_"), ("randint", "random_"))
    for overload in ("", ".generator", "_like", "_like.generator", ".low", ".low_generator")
} | {"aten::randint_like.low_dtype": "random_"}
"""The in-place ops that random factories end in."""


@contextlib.contextmanager
def in_force(recorder: Recorder, mode: Callable[[Recorder], Any]) -> Iterator[Recorder]:
    """Have a recorder, and the function mode that goes with it, in force for a block."""
    outer = current()
    _active.recorder = recorder
    try:
        with recorder, mode(recorder):
            yield recorder
    finally:
        _active.recorder = outer
