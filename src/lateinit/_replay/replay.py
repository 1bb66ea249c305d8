"""Running recorded ops, for real, each random one at its own place in its stream."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from lateinit._program.plan import Step, plan_storages
from lateinit._program.program import NUMBERS, Const, Draw, Op, Program, TensorRef
from lateinit._replay.chunks import after_redrawing, fill_of
from lateinit._replay.streams import Streams
from lateinit._rng.mt19937 import set_state, state_of
from lateinit._torch import operators
from lateinit._torch.arguments import flat
from lateinit._torch.messages import is_out_of_memory
from lateinit._torch.modes import without_modes
from lateinit._torch.storage import LARGE, allocate, checksum
from lateinit.errors import ConstantChangedError, LateinitError, MaterializeError, SeedError

Storages = dict[int, torch.UntypedStorage]
# Calling an overload takes as long again as a small fill: these are the same ops.
_METHODS: dict[str, Callable[..., Any]] = {
    "aten::uniform_": Tensor.uniform_,
    "aten::normal_": Tensor.normal_,
    "aten::zero_": Tensor.zero_,
    "aten::fill_.Scalar": Tensor.fill_,
}


class Replay:
    """Runs the ops of one program, as from one seed, or along streams that are known.

    Generators of its own are used throughout: the global ones are neither read nor moved.
    ``past_holes`` says that holes which are not filled yet are taken to draw nothing.
    """

    def __init__(
        self,
        program: Program,
        seed: int | None = None,
        streams: Streams | None = None,
        *,
        past_holes: bool = False,
    ) -> None:
        self.program = program
        self.streams: Streams = streams or streams_of(program, seed, past_holes=past_holes)
        # Kernels and their meta twins disagree on the strides of dims of length one: eager's hold.
        self.strides: dict[TensorRef, tuple[int, ...]] = {}
        # What the small storages of the last step were allocated as: no other window is needed.
        self.windows: dict[int, tuple[TensorRef, Tensor]] = {}
        self.cursor: dict[int, tuple[int, torch.Generator]] = {}
        self._unchanged: set[int] = set()  # constants whose checksum was found to hold
        self._settings: contextlib.ExitStack | None = None
        self._step = Step((), ())
        self._ambient = -1

    def values(self, storages: Iterable[int], before: int | None = None) -> Storages:
        """The wanted storages as they are before op number ``before`` (by default: at the end)."""
        found: Storages = {}
        for step in plan_storages(self.program, storages, before):
            found.update(self.run(step))
        return found

    def value(self, ref: TensorRef, before: int | None = None) -> Tensor:
        """One tensor as it is before op number ``before``."""
        return ref.on(self.values([ref.storage], before)[ref.storage])

    def run(self, step: Step, begun: Storages | None = None) -> Storages:
        """Run one step; gives the storages that it is for, and frees all others.

        ``begun`` are storages that what came before this step has filled.
        """
        if self._settings is None:
            with self.session():
                return self.run(step, begun)
        storages: Storages = dict(begun or {})
        self._step = step
        self.windows.clear()
        if len(step.ops) == 1:
            self._set_ambient(self.program.ops[step.ops[0]].ambient)
            self.execute(step.ops[0], storages)
        else:
            self._run_all(step, storages)
        for number in step.gives:
            self._provide(number, storages)
        return {number: storages[number] for number in step.gives}

    def _run_all(self, step: Step, storages: Storages) -> None:
        """Run ops in order; frees each storage after the op that is the last to use it."""
        last_use = self._last_uses(step)
        for place, number in enumerate(step.ops):
            self._set_ambient(self.program.ops[number].ambient)
            self.execute(number, storages)
            for done in last_use.get(place, ()):
                storages.pop(done, None)
                self.windows.pop(done, None)

    @contextlib.contextmanager
    def session(self) -> Iterator[None]:
        """A block in which many steps run, without modes and with settings kept between them."""
        if self._settings is not None:
            yield
            return
        with without_modes(), contextlib.ExitStack() as settings:
            self._settings, self._ambient = settings, -1
            try:
                yield
            finally:
                self._settings = None

    def _set_ambient(self, ambient: int) -> None:
        if ambient != self._ambient and self._settings is not None:
            self._settings.close()
            wanted = self.program.ambients[ambient]
            if not wanted.holds():
                self._settings.enter_context(wanted.in_force())
            self._ambient = ambient

    def execute(self, number: int, storages: Storages) -> None:
        """Run one op on real storages, which it adds its new ones to."""
        op = self.program.ops[number]
        try:
            results = self.call(op, storages)
        except LateinitError:
            raise
        except Exception as error:
            if is_out_of_memory(error):
                raise
            raise MaterializeError(
                f"op {number} failed when it was replayed: {op}: {error}"
            ) from error
        for ref, result in zip(op.outs, results, strict=False):
            if ref is None:
                continue
            as_recorded = tuple(result.size()) == ref.size and result.dtype == ref.dtype
            if ref.storage in storages:
                if not as_recorded:
                    raise MaterializeError(_differs(ref, result))
            # Some kernels give another thing than their meta twins, which nobody asks for.
            elif as_recorded or self._is_used(ref.storage, number):
                storages[ref.storage] = self._laid_out(ref, result)

    def _is_used(self, storage: int, number: int) -> bool:
        """Whether a storage is wanted of the step that runs, or by an op after this one."""
        later = (self.program.ops[n] for n in self._step.ops if n > number)
        refs = (ref for op in later for ref in (*op.read(), *op.written()))
        return storage in self._step.gives or any(ref.storage == storage for ref in refs)

    def call(self, op: Op, storages: Storages) -> tuple[Any, ...]:
        """Call an op with real arguments; gives what it returns, as a flat tuple."""
        args = [a if type(a) in NUMBERS else self._real(a, storages) for a in op.args]
        if op.name == operators.CONSTANT:
            return (args[0].clone(memory_format=torch.preserve_format),)
        kwargs = {key: self._real(value, storages) for key, value in op.kwargs.items()}
        info = operators.by_name(op.name)
        func = _METHODS.get(op.name, info.func)
        if op.draw is None:
            if info.foreign:
                return flat(_drawing_nothing(lambda: func(*args, **kwargs)))
            return flat(func(*args, **kwargs))
        generator = self._generator(op.draw)
        if info.takes_generator:
            result = func(*args, **kwargs, generator=generator)
        else:
            result = _drawing_globally(generator, lambda: info.func(*args, **kwargs))
        self.cursor[op.draw.stream] = (op.draw.number + 1, generator)
        return flat(result)

    def _generator(self, draw: Draw) -> torch.Generator:
        index, generator = self.cursor.pop(draw.stream, (-1, None))
        if generator is not None and index == draw.number:
            return generator
        return self.streams.generator(draw)

    def _real(self, value: Any, storages: Storages) -> Any:
        kind = type(value)
        if kind is TensorRef:
            storage = storages.get(value.storage)
            return self._window(value, storages) if storage is None else value.on(storage)
        if kind is Const:
            return self.constant(value.number)
        if kind is tuple:
            return [self._real(item, storages) for item in value]
        return value

    def constant(self, index: int) -> Tensor:
        """Real data that the program reads; raises if they have changed."""
        constant = self.program.constants[index]
        if constant.checksum is not None and index not in self._unchanged:
            if checksum(constant.tensor) != constant.checksum:
                raise ConstantChangedError(
                    f"a real tensor of shape {tuple(constant.tensor.shape)} that the recorded "
                    "construction reads was changed in place afterwards: materialise before "
                    "changing it, or pass a copy to the constructor"
                )
            self._unchanged.add(index)
        return constant.tensor

    def _provide(self, number: int, storages: Storages) -> None:
        """Allocate a storage that nothing has written to, or that is to be written first."""
        if number not in storages:
            known = self.program.storages[number]
            storages[number] = allocate(known.nbytes, known.device)

    def _window(self, ref: TensorRef, storages: Storages) -> Tensor:
        """A window on a storage that has to be allocated for it."""
        known = self.program.storages[ref.storage]
        if known.nbytes < LARGE and not ref.bits:
            tensor = torch.empty(ref.size, dtype=ref.dtype, device=known.device)
            storage = tensor.untyped_storage()
            whole = ref.offset == 0 and storage.nbytes() == known.nbytes
            if whole and tensor.stride() == ref.stride:
                storages[ref.storage] = storage
                self.windows[ref.storage] = ref, tensor
                return tensor
        self._provide(ref.storage, storages)
        return ref.on(storages[ref.storage])

    def _laid_out(self, ref: TensorRef, result: Tensor) -> torch.UntypedStorage:
        """The storage of a result, copied to the recorded layout where the kernel's differs."""
        if result.dtype != ref.dtype:
            raise MaterializeError(_differs(ref, result))
        if tuple(result.size()) != ref.size:
            raise SeedError(
                "the constructor made a tensor whose shape depends on random values, or is another "
                f"one without values: {_differs(ref, result)}, or record again under the seed that "
                "you want"
            )
        nbytes = self.program.storages[ref.storage].nbytes
        found = TensorRef.of(result, ref.storage)
        if found != ref and found == ref._replace(stride=_where_long(ref, found.stride)):
            self.strides[ref] = found.stride
            found = ref
        if found == ref and result.untyped_storage().nbytes() >= nbytes:
            return result.untyped_storage()
        storages: Storages = {}
        self._provide(ref.storage, storages)
        ref.on(storages[ref.storage]).copy_(result)
        return storages[ref.storage]

    def _last_uses(self, step: Step) -> dict[int, list[int]]:
        last: dict[int, int] = {}
        for place, number in enumerate(step.ops):
            op = self.program.ops[number]
            for refs in (op.written(), op.read()):
                for ref in refs:
                    last[ref.storage] = place
        for number in step.gives:
            last.pop(number, None)
        uses: dict[int, list[int]] = {}
        for storage, place in last.items():
            uses.setdefault(place, []).append(storage)
        return uses


def streams_of(program: Program, seed: int | None = None, *, past_holes: bool = False) -> Streams:
    """The streams of a program; those from its own seed are kept, so that all is found once.

    Positions after a hole depend on what fills it. Streams that pass over open holes are
    therefore kept apart, and only for as long as the same holes are filled.
    """
    if seed is not None:
        return Streams(program, draw_only, seed, past_holes)
    key = f"streams past holes {program.holes}" if past_holes else "streams"
    kept: Streams | None = program.cache.get(key)
    return kept or program.cache.setdefault(key, Streams(program, draw_only, None, past_holes))


def _differs(ref: TensorRef, result: Tensor) -> str:
    return (
        f"recorded as {ref.dtype} {ref.size}, it is {result.dtype} {tuple(result.size())} with "
        "values: compute it after materialising"
    )


def draw_only(streams: Streams, number: int, generator: torch.Generator) -> None:
    """Make the draw of one op, for the sake of where it leaves the generator.

    How far that is may depend on what was drawn before, along the same streams.
    """
    program = streams.program
    op = program.ops[number]
    assert op.draw is not None
    fill = fill_of(program, Step((number,), ())) if op.name == operators.TRUNCATED else None
    if fill is not None:
        with without_modes():
            set_state(generator, after_redrawing(program, fill, state_of(generator)))
        return
    replay = Replay(program, streams=streams)
    with replay.session():
        storages = replay.values((ref.storage for ref in op.read()), number)
        replay.cursor[op.draw.stream] = (op.draw.number, generator)
        with program.ambients[op.ambient].in_force():
            replay.call(op, storages)


def _drawing_globally(generator: torch.Generator, call: Callable[[], Any]) -> Any:
    """Run a call that can only draw from the default generator as if from another one."""
    if generator.device.type == "cpu":
        default = torch.default_generator
    else:
        default = torch.cuda.default_generators[generator.device.index or 0]
    before = default.get_state()
    default.set_state(generator.get_state())
    try:
        result = call()
        generator.set_state(default.get_state())
    finally:
        default.set_state(before)
    return result


def _drawing_nothing(call: Callable[[], Any]) -> Any:
    before = torch.get_rng_state()
    result = call()
    if not torch.equal(before, torch.get_rng_state()):
        torch.set_rng_state(before)
        raise RuntimeError(
            "it drew random numbers after the block that recorded its arguments: call it in the "
            "block, or after materialising them"
        )
    return result


def _where_long(ref: TensorRef, strides: tuple[int, ...]) -> tuple[int, ...]:
    """The strides of ``ref``, but others where they mean nothing: in dims of length one."""
    if ref.numel == 0:
        return strides
    triples = zip(ref.size, ref.stride, strides, strict=True)
    return tuple(other if length == 1 else stride for length, stride, other in triples)
