"""``Replay``: run the ops of a plan on real memory, each draw at its place in its stream."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from lateinit._program import NUMBERS, Const, Draw, Op, Program, Step, TensorRef, plan_storages
from lateinit._replay.chunks import after_redrawing, fill_of
from lateinit._replay.streams import Streams
from lateinit._rng import set_state, state_of
from lateinit._torch import (
    LARGE,
    allocate,
    checksum,
    flat,
    is_out_of_memory,
    operators,
    without_modes,
)
from lateinit.errors import ConstantChangedError, LateinitError, MaterializeError, SeedError

Storages = dict[int, torch.UntypedStorage]
# The same ops as methods: calling an ``OpOverload`` from Python takes as long as a small fill.
_METHODS: dict[str, Callable[..., Any]] = {
    "aten::uniform_": Tensor.uniform_,
    "aten::normal_": Tensor.normal_,
    "aten::zero_": Tensor.zero_,
    "aten::fill_.Scalar": Tensor.fill_,
}


class Replay:
    """Runs ops of one program. It leaves the global random generators as they are.

    Args:
        program: the program.
        seed: replaces the recorded state of the default generator; None keeps it.
        streams: generator states to draw from, in place of those that follow from ``seed``.
        past_holes: assume that open holes draw nothing, instead of raising at draws after them.
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
        # Real and meta kernels disagree on the strides of dims of length one. The real ones, which
        # eager construction shows, are kept here for whoever makes tensors of the results.
        self.strides: dict[TensorRef, tuple[int, ...]] = {}
        # Small storages of the last step were allocated by making a tensor. It can be swapped into
        # the deferred tensor directly.
        self.windows: dict[int, tuple[TensorRef, Tensor]] = {}
        self.cursor: dict[int, tuple[int, torch.Generator]] = {}
        self._unchanged: set[int] = set()  # constants whose checksum was compared and holds
        self._settings: contextlib.ExitStack | None = None
        self._step = Step((), ())
        self._ambient = -1

    def values(self, storages: Iterable[int], before: int | None = None) -> Storages:
        """The storages as they are before op number ``before`` (by default: at the end)."""
        found: Storages = {}
        for step in plan_storages(self.program, storages, before):
            found.update(self.run(step))
        return found

    def value(self, ref: TensorRef, before: int | None = None) -> Tensor:
        """One tensor as it is before op number ``before``."""
        return ref.on(self.values([ref.storage], before)[ref.storage])

    def run(self, step: Step, begun: Storages | None = None) -> Storages:
        """Run one step; returns its target storages and frees all others.

        Args:
            step: the step.
            begun: storages that are filled already, as by the first ops of the step.
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
        """Run ops in order, and free each storage after the last op that uses it."""
        last_use = self._last_uses(step)
        for place, number in enumerate(step.ops):
            self._set_ambient(self.program.ops[number].ambient)
            self.execute(number, storages)
            for done in last_use.get(place, ()):
                storages.pop(done, None)
                self.windows.pop(done, None)

    @contextlib.contextmanager
    def session(self) -> Iterator[None]:
        """A block for running many steps: modes are left once, settings change only when needed."""
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
        """Run one op on real storages, and add the storages of its results to them.

        Raises:
            MaterializeError: the kernel fails, or gives another layout than was recorded.
        """
        op = self.program.ops[number]
        try:
            results = self.call(op, storages)
        except LateinitError:
            raise
        except Exception as error:
            if is_out_of_memory(error):
                raise  # materialize() makes an OutOfMemoryError of it
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
            # Some kernels return an auxiliary result of another shape than their meta kernel does.
            # It matters only if it is used.
            elif as_recorded or self._is_used(ref.storage, number):
                storages[ref.storage] = self._laid_out(ref, result)

    def _is_used(self, storage: int, number: int) -> bool:
        """Whether a storage is a target of the running step, or used by a later op of it."""
        later = (self.program.ops[n] for n in self._step.ops if n > number)
        refs = (ref for op in later for ref in (*op.read(), *op.written()))
        return storage in self._step.gives or any(ref.storage == storage for ref in refs)

    def call(self, op: Op, storages: Storages) -> tuple[Any, ...]:
        """Call an op with real arguments; returns its results as a flat tuple."""
        args = [a if type(a) in NUMBERS else self._real(a, storages) for a in op.args]
        if op.name == operators.CONSTANT:
            # The program keeps its constant, so each replay gets memory of its own.
            return (args[0].clone(memory_format=torch.preserve_format),)
        kwargs = {key: self._real(value, storages) for key, value in op.kwargs.items()}
        info = operators.by_name(op.name)
        func = _METHODS.get(op.name, info.func)
        if op.draw is None:
            if info.foreign:
                return flat(_drawing_nothing(lambda: func(*args, **kwargs)))
            return flat(func(*args, **kwargs))
        generator = self._generator(op.draw)
        # An op without an argument for a generator, such as dropout, draws from the default one.
        if info.takes_generator:
            result = func(*args, **kwargs, generator=generator)
        else:
            result = _drawing_globally(generator, lambda: info.func(*args, **kwargs))
        self.cursor[op.draw.stream] = (op.draw.number + 1, generator)
        return flat(result)

    def _generator(self, draw: Draw) -> torch.Generator:
        """A generator before a draw: left by the draw just before it, if this replay made that."""
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
        """Real data that the program reads.

        Raises:
            ConstantChangedError: the data was written to after it was recorded.
        """
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
        """Allocate a storage, uninitialised, unless it exists."""
        if number not in storages:
            known = self.program.storages[number]
            storages[number] = allocate(known.nbytes, known.device)

    def _window(self, ref: TensorRef, storages: Storages) -> Tensor:
        """The tensor of a window whose storage does not exist yet: allocate it."""
        known = self.program.storages[ref.storage]
        # One call makes storage and tensor, if the window shows the whole storage in the layout
        # that torch.empty gives. Large storages are allocated apart, for huge pages.
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
        """The storage of a result, copied into the recorded layout if the kernel's differs."""
        if result.dtype != ref.dtype:
            raise MaterializeError(_differs(ref, result))
        # Python code saw the recorded shape: only the recorded seed gives the rest of the program.
        if tuple(result.size()) != ref.size:
            raise SeedError(
                "the constructor made a tensor whose shape depends on random values, or is another "
                f"one without values: {_differs(ref, result)}, or record again under the seed that "
                "you want"
            )
        nbytes = self.program.storages[ref.storage].nbytes
        found = TensorRef.of(result, ref.storage)
        # Strides that differ in dims of length one alone are the same layout.
        if found != ref and found == ref._replace(stride=_where_long(ref, found.stride)):
            self.strides[ref] = found.stride
            found = ref
        # The kernel's storage may be smaller than the recorded one, which later windows look at.
        if found == ref and result.untyped_storage().nbytes() >= nbytes:
            return result.untyped_storage()
        storages: Storages = {}
        self._provide(ref.storage, storages)
        ref.on(storages[ref.storage]).copy_(result)
        return storages[ref.storage]

    def _last_uses(self, step: Step) -> dict[int, list[int]]:
        """For each place in a step, the storages that no later op of it uses; not its targets."""
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
    """The streams of a program. Those from its own seed are cached in it, so states are found once.

    States after a hole depend on its filling. So streams that pass over open holes are cached under
    a key that says which holes are filled.

    Args:
        program: the program.
        seed: replaces the recorded state of the default generator.
        past_holes: assume that open holes draw nothing.
    """
    if seed is not None:
        return Streams(program, draw_only, seed, past_holes)
    key = f"streams past holes {program.holes}" if past_holes else "streams"
    kept: Streams | None = program.cache.get(key)
    # setdefault is atomic: threads that come here at the same time end up with the same streams.
    return kept or program.cache.setdefault(key, Streams(program, draw_only, None, past_holes))


def _differs(ref: TensorRef, result: Tensor) -> str:
    return (
        f"recorded as {ref.dtype} {ref.size}, it is {result.dtype} {tuple(result.size())} with "
        "values: compute it after materialising"
    )


def draw_only(streams: Streams, number: int, generator: torch.Generator) -> None:
    """Run one op to find how far it moves the generator; its values are discarded.

    That may depend on earlier draws, which are replayed along the same streams.

    Args:
        streams: the streams of the program.
        number: the number of the op.
        generator: is before the draw, and is left after it.
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
    """Run a call that takes no generator so that it draws from ``generator``.

    The default generator is lent its state and restored afterwards.
    """
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
    """Run a foreign op that was recorded without a draw; raises if it draws."""
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
    """The strides of ``ref``, with ``strides`` in dims of length one, where they mean nothing."""
    if ref.numel == 0:
        return strides
    triples = zip(ref.size, ref.stride, strides, strict=True)
    return tuple(other if length == 1 else stride for length, stride, other in triples)
