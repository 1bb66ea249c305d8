"""Writing the program of a construction that runs without memory or arithmetic.

``Recorder`` sits in torch's dispatcher: it sends every factory to ``meta``, notes every op that
writes to a deferred storage, and answers with real values where values leave. Ops that only make
views need no note (see ``program``).
"""

from __future__ import annotations

import contextlib
import hashlib
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode

from lateinit import bounds, ops
from lateinit.arguments import META, has_tensor, kwargs_to_meta, tensors_in, to_meta
from lateinit.errors import RecordingError
from lateinit.generators import Generators
from lateinit.labels import initializer
from lateinit.ops import OpInfo, describe
from lateinit.plan import needed_ops
from lateinit.program import (
    Ambient,
    Const,
    Constant,
    Draw,
    Op,
    Program,
    Read,
    Storage,
    TensorRef,
)
from lateinit.replay import Replay, Storages, flat, without_modes
from lateinit.streams import Streams
from lateinit.tensors import ON_META, Slot, attach, is_deferred_tensor, slot_of

_CPU = torch.device("cpu")
_SMALL = 1 << 16  # real data up to this many bytes is copied into the program
_KEPT = 1 << 26  # bytes of replayed values kept for the next read
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
        super().__init__()
        self.program = program or Program()
        self.generators = Generators(self.program)
        self.born: list[weakref.ref[Tensor]] = []
        self.busy = False
        self.autocasting = False
        self.call: tuple[tuple[Any, ...], dict[str, Any] | None] = ((), None)
        self._ambient_key: tuple[Any, ...] = ()
        self._constants: dict[int, list[int]] = {}
        self._known: dict[int, tuple[int, torch.UntypedStorage]] = {}
        self.exposed: list[Exposure] = []
        self._twins: list[tuple[Tensor, Tensor]] = []

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
        if self.exposed:
            self._take_back()
        if kwargs.get("device") == META:
            kwargs = kwargs | {"device": self._meant_by_meta()}
        split = _split_random(info)
        if split is not None:
            return self._fill(split, info, args, kwargs)
        deferred, real, on_meta = self._sort(args, kwargs)
        if info.name.startswith("aten::set_.source_Storage") and args[1].device != META:
            if deferred:
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
        program, number = slot.resolve()
        if program is not self.program:
            self.program.absorb(program)
            _, number = slot.resolve()
        return TensorRef.of(tensor, number)

    def _referred(self, value: Any) -> Any:
        """An argument as it is written into the program."""
        if isinstance(value, Tensor):
            return self.ref(value) if value.is_meta else self._constant(value)
        if isinstance(value, (list, tuple)):
            return tuple(self._referred(item) for item in value)
        if isinstance(value, torch.UntypedStorage):
            raise RecordingError(
                "an untyped storage was written to while recording: write to a tensor instead"
            )
        return value

    def _constant(self, tensor: Tensor) -> Const:
        """Keep real data: small data and data that numpy can change behind our back by copy."""
        if not _is_plain(tensor):
            self.program.constants.append(Constant(tensor.clone(), None))
            return Const(len(self.program.constants) - 1)
        storage = tensor.untyped_storage()
        size = tensor.numel() * tensor.element_size()
        owned = size <= _SMALL or not storage.resizable() or tensor.is_inference()
        self.program.constants.append(
            Constant(_copied(tensor), None) if owned else Constant(tensor, tensor._version)
        )
        index = len(self.program.constants) - 1
        if not owned:
            self._constants.setdefault(storage._cdata, []).append(index)
        return Const(index)

    def _before_write(self, tensor: Tensor) -> None:
        """Copy the real data that the program refers to before it is written in place."""
        for index in self._constants.pop(tensor.untyped_storage()._cdata, ()):
            constant = self.program.constants[index]
            self.program.constants[index] = Constant(_copied(constant.tensor), None)

    # -- recording -----------------------------------------------------------------------------

    def record(
        self,
        info: OpInfo,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        deferred: list[Tensor],
    ) -> Any:
        """Note an op, and give the deferred tensors that it would return."""
        if info.scalar_inplace and len(deferred) == 1 and args[0] is deferred[0]:
            if args[0].is_floating_point() and not has_tensor(args[1:]):
                self._append(info, args, kwargs, ())
                return args[0]
        if not self.autocasting or info.mutates:
            try:
                result = info.func(*to_meta(args), **kwargs_to_meta(info, kwargs))
            except Exception:
                return self._by_running(info, args, kwargs, deferred)
        else:
            return self._by_running(info, args, kwargs, deferred)
        self._note(info, args, kwargs, deferred, result)
        return result

    def _note(
        self,
        info: OpInfo,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        deferred: list[Tensor],
        result: Any,
    ) -> None:
        results = flat(result)
        device = self._device(kwargs, deferred)
        new = [self._adopt(leaf, device) for leaf in results if isinstance(leaf, Tensor)]
        if any(new) or info.mutates or info.mutates_kw:
            if not info.metadata_only:
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
        return self.program.storages[self.ref(tensor).storage].device

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
        label = initializer() if info.overwrites else None
        self.program.ops.append(
            Op(info.name, referred, written, outs, draw, self._ambient(), label)
        )
        if self.exposed:
            self._hand_out()

    def _draw(self, info: OpInfo, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Draw | None:
        generator = kwargs.get("generator")
        generator = generator or next((a for a in args if isinstance(a, torch.Generator)), None)
        explicit = generator is not None
        if generator is None:
            tensors = [t for t in tensors_in(args, kwargs) if t.is_meta]
            generator = _default_generator(self._device(kwargs, tensors))
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
            torch.are_deterministic_algorithms_enabled(),
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
        if not all(_is_plain(leaf) for leaf in results if isinstance(leaf, Tensor)):
            if info.random or self._is_random(probe.read()):
                self.program.seed_bound = f"{info.name} made a tensor without a plain layout"
            return results[0] if len(results) == 1 else results
        if info.mutates:
            made: list[Any] = [args[info.mutates[0]]]
        else:
            device = self._device(kwargs, deferred)
            made = [self._mirror(leaf, device) for leaf in results]
        outs = tuple(self.ref(leaf) if isinstance(leaf, Tensor) else None for leaf in made)
        self.program.ops.append(probe._replace(outs=outs))
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
            self._before_write(tensor)
        if info.random:
            self.settle()
            self.program.seed_bound = f"{info.name} drew into a real tensor"
        result = info.func(*args, **kwargs)
        if written and self.exposed:
            self._take_back(every=True)
        return result

    def _lift(self, data: Tensor) -> Tensor:
        """``torch.tensor(...)``: data that nobody else can see becomes a deferred constant."""
        tensor: Tensor = self._mirror(data, data.device)
        self.program.constants.append(Constant(data, None))
        constant = Const(len(self.program.constants) - 1)
        outs = (self.ref(tensor),)
        self.program.ops.append(
            Op(ops.CONSTANT, (constant,), {}, outs, None, self._ambient(), "constant")
        )
        return tensor

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
                self._before_write(tensor)
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

    def read(self, tensor: Tensor) -> Tensor:
        """The values that a deferred tensor has now; that random ones were read is noted."""
        value, ref = self.evaluate(tensor), self.ref(tensor)
        if self._is_random([ref]):
            self.program.reads.append(Read(ref, len(self.program.ops), digest(value)))
        return value

    def _is_random(self, refs: Iterable[TensorRef]) -> bool:
        numbers = needed_ops(self.program, [ref.storage for ref in refs])
        return any(self.program.ops[number].draw is not None for number in numbers)

    def evaluate(self, tensor: Tensor) -> Tensor:
        """A real tensor with the values that a deferred one has now."""
        ref = self.ref(tensor)
        writes = len(self.program.writers(ref.storage))
        known = self._known.get(ref.storage)
        if known is None or known[0] != writes:
            storage = Replay(self.program).values([ref.storage])[ref.storage]
            known = (writes, storage)
            self._keep(ref.storage, known)
        with without_modes():
            return ref.on(known[1])

    def _keep(self, number: int, known: tuple[int, torch.UntypedStorage]) -> None:
        """Keep replayed values for the next read: constructors read in loops."""
        kept = sum(storage.nbytes() for _, storage in self._known.values())
        if kept + known[1].nbytes() > _KEPT:
            self._known.clear()
        if known[1].nbytes() <= _KEPT:
            self._known[number] = known

    def _inputs(self, replay: Replay, op: Op) -> Storages:
        needed = dict.fromkeys(ref.storage for ref in op.read())
        needed |= dict.fromkeys(ref.storage for ref in op.written())
        return replay.values(needed)

    def _on_meta(self, result: Any) -> Any:
        """What the constructor itself put on meta stays there."""
        for leaf in flat(result):
            if isinstance(leaf, Tensor) and leaf.is_meta and slot_of(leaf) is None:
                attach(leaf.untyped_storage(), ON_META)
        return result

    def settle(self) -> None:
        """Put the generators where eager construction would have them now."""
        with without_modes():
            run = Replay(self.program).streams.make
            self.generators.settle(Streams(self.program, run, past_holes=True).state)

    # -- values handed out as memory -----------------------------------------------------------

    def expose(self, tensor: Tensor) -> Tensor:
        """A real tensor that shares its life with a deferred one: writes show on either side."""
        real = self.read(tensor).clone()
        self._share(tensor, real, watched=True)
        return real

    def _share(self, tensor: Tensor, real: Tensor, watched: bool) -> None:
        self.exposed.append(Exposure(tensor, real, real.clone(), self._writes(tensor), watched))

    def _set_storage(self, info: OpInfo, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """``set_`` of a real storage: the tensor shows a deferred twin of it, kept equal."""
        target, storage, *rest = args
        with without_modes():
            real = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
        shared = next((e for e in self.exposed if e.shows(storage)), None)
        if shared is None:
            twin = self.lift(real)
            self._twins.append((twin, real))
            self._share(twin, real, watched=not storage.resizable())
        else:
            twin = shared.tensor
        return info.func(target, twin.untyped_storage(), *rest, **kwargs)

    def _writes(self, tensor: Tensor) -> int:
        return len(self.program.writers(self.ref(tensor).storage))

    def _take_back(self, every: bool = False) -> None:
        """Note what was written through memory that is shared: ``watched`` where unseen."""
        for exposure in self.exposed:
            if (every or exposure.watched) and not _same_bits(exposure.real, exposure.seen):
                exposure.seen = exposure.real.clone()
                exposed, self.exposed = self.exposed, []
                copy = ops.by_name("aten::copy_")
                self._append(copy, (exposure.tensor, exposure.seen), {}, ())
                self.exposed = exposed
                exposure.writes = self._writes(exposure.tensor)

    def _hand_out(self) -> None:
        """Show what was recorded in memory that was handed out."""
        for exposure in self.exposed:
            writes = self._writes(exposure.tensor)
            if writes != exposure.writes:
                if exposure.real.untyped_storage()._cdata in self._constants:
                    self._before_write(exposure.real)
                with without_modes():
                    exposure.real.copy_(self.evaluate(exposure.tensor))
                exposure.seen = exposure.real.clone()
                exposure.writes = writes

    def finish(self) -> None:
        """Note what is still to be noted when the block ends."""
        self.program.closed = len(self.program.storages)
        with without_modes():
            self._take_back(every=True)
            for twin, real in self._twins:
                slot = slot_of(twin)
                assert slot is not None
                slot.real = real.untyped_storage()


def digest(value: Tensor) -> bytes:
    """A digest of the bits of a tensor, to compare what another seed would have shown."""
    data = value.resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(data.cpu().numpy().tobytes()).digest()


class Exposure:
    """Memory handed out for a deferred tensor, and what it held when last looked at."""

    __slots__ = ("real", "seen", "tensor", "watched", "writes")

    def __init__(
        self, tensor: Tensor, real: Tensor, seen: Tensor, writes: int, watched: bool
    ) -> None:
        self.tensor = tensor
        self.real = real
        self.seen = seen
        self.writes = writes
        self.watched = watched

    def shows(self, storage: torch.UntypedStorage) -> bool:
        """Whether this is about the whole of a real storage."""
        return self.real.untyped_storage()._cdata == storage._cdata


def _split_random(info: OpInfo) -> str | None:
    """The in-place op that a random factory ends in."""
    return _FILLS.get(info.name)


_FILLS = {
    f"aten::{name}{overload}": fill
    for name, fill in (("rand", "uniform_"), ("randn", "normal_"), ("randint", "random_"))
    for overload in ("", ".generator", "_like", "_like.generator", ".low", ".low_generator")
} | {"aten::randint_like.low_dtype": "random_"}


def _default_generator(device: torch.device) -> torch.Generator:
    if device.type == "cpu":
        return torch.default_generator
    if device.type == "cuda" and torch.cuda.is_available():
        torch.cuda.init()
        index = torch.cuda.current_device() if device.index is None else device.index
        return torch.cuda.default_generators[index]
    raise RecordingError(
        f"the constructor draws random numbers on {device}, whose generator is not available "
        "here: build the model on a machine that has this device, or on the CPU"
    )


def _copied(tensor: Tensor) -> Tensor:
    """A copy with the very strides of the original: results are laid out after their arguments."""
    if tensor.numel() == 0:
        return torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype)
    span = 1 + sum((n - 1) * s for n, s in zip(tensor.size(), tensor.stride(), strict=True))
    tensor = tensor.detach().resolve_conj().resolve_neg()
    window = tensor.as_strided((span,), (1,), tensor.storage_offset()).clone()
    return window.as_strided(tensor.size(), tensor.stride())


def _is_plain(tensor: Tensor) -> bool:
    return tensor.layout is torch.strided and not tensor.is_quantized and not tensor.is_nested


def _same_bits(a: Tensor, b: Tensor) -> bool:
    return a.numpy().tobytes() == b.numpy().tobytes()


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
