"""``Session``: run the steps of a plan on real memory, each draw at its place in its stream."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lateinit._program import NUMBERS, Const, Draw, Op, Step, TensorRef
from lateinit._replay.streams import Streams
from lateinit._rng import fills
from lateinit._torch import (
    LARGE,
    OpInfo,
    allocate,
    checksum,
    flat,
    is_out_of_memory,
    operators,
    without_modes,
)
from lateinit.errors import ConstantChangedError, LateinitError, MaterializeError, SeedError

Storages = dict[int, torch.UntypedStorage]


class Computed(NamedTuple):
    """One storage with its values.

    Attributes:
        storage: the memory.
        strides: by window, the strides of the real kernel where they differ from those recorded.
            Real and meta kernels disagree on dims of length one; eager construction shows the
            strides of the real kernel.
        window: a tensor on the memory and its window, if no other code has that tensor. It can be
            swapped into a deferred tensor directly.
    """

    storage: torch.UntypedStorage
    strides: Mapping[TensorRef, tuple[int, ...]] = MappingProxyType({})
    window: tuple[TensorRef, Tensor] | None = None


class Memory(dict[int, torch.UntypedStorage]):
    """The storages of a running step by number, with the strides and window for ``Computed``."""

    __slots__ = ("strides", "windows")

    def __init__(self, storages: Mapping[int, torch.UntypedStorage] | None = None) -> None:
        super().__init__(storages or ())
        self.strides: dict[TensorRef, tuple[int, ...]] = {}
        self.windows: dict[int, tuple[TensorRef, Tensor]] = {}

    def computed(self, number: int) -> Computed:
        """One storage, with its strides and its window."""
        return Computed(self[number], self.strides, self.windows.get(number))


class Session:
    """Runs steps of one program, one after another in one thread.

    It is a context manager: inside, torch's modes are off, and settings such as the default dtype
    change only between ops that need different ones. The global random generators are left as they
    are.

    Args:
        streams: the generator states to draw from.
    """

    def __init__(self, streams: Streams) -> None:
        self.streams = streams
        self.program = streams.program
        # By stream, the number of the next draw and a generator in the state before it.
        self._cursor: dict[int, tuple[int, torch.Generator]] = {}
        self._unchanged: set[int] = set()  # constants whose checksum was compared and agreed
        self._settings = contextlib.ExitStack()
        self._ambient = -1

    def __enter__(self) -> Session:
        self._modes = without_modes()
        self._modes.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        try:
            self._settings.close()
        finally:
            self._ambient = -1
            self._modes.__exit__(*error)

    def run(self, step: Step, begun: Storages | None = None) -> dict[int, Computed]:
        """Run one step; returns its target storages and frees all others.

        Args:
            step: the step.
            begun: storages that already have values, such as from the first ops of the step.
        """
        memory = Memory(begun)
        last_use = self._last_uses(step) if len(step.ops) > 1 else {}
        for place, number in enumerate(step.ops):
            self._set_ambient(self.program.ops[number].ambient)
            self._execute(number, memory, step)
            for done in last_use.get(place, ()):
                memory.pop(done, None)
                memory.windows.pop(done, None)
        given: dict[int, Computed] = {}
        for number in step.gives:
            self._provide(number, memory)
            given[number] = memory.computed(number)
        return given

    def _set_ambient(self, ambient: int) -> None:
        if ambient != self._ambient:
            self._settings.close()
            wanted = self.program.ambients[ambient]
            if not wanted.holds():
                self._settings.enter_context(wanted.in_force())
            self._ambient = ambient

    def _execute(self, number: int, memory: Memory, step: Step) -> None:
        """Run one op on real storages, and add the storages of its results to them.

        Raises:
            MaterializeError: the kernel fails, or gives another layout than was recorded.
        """
        op = self.program.ops[number]
        try:
            results = self.call(op, memory)
        except LateinitError:
            raise
        except Exception as error:
            if is_out_of_memory(error):
                raise  # materialize() turns it into an OutOfMemoryError
            raise failed(number, op, error) from error
        for ref, result in zip(op.outs, results, strict=False):
            if ref is None:
                continue
            as_recorded = tuple(result.size()) == ref.size and result.dtype == ref.dtype
            if ref.storage in memory:
                if not as_recorded:
                    raise MaterializeError(_differs(ref, result))
            # Some kernels return an auxiliary result of another shape than their meta kernel does.
            # The shape matters only if the result is used.
            elif as_recorded or self._is_used(ref.storage, number, step):
                memory[ref.storage] = self._laid_out(ref, result, memory)

    def _is_used(self, storage: int, number: int, step: Step) -> bool:
        """Whether a storage is a target of a step, or used by an op of it after ``number``."""
        later = (self.program.ops[n] for n in step.ops if n > number)
        refs = (ref for op in later for ref in (*op.read(), *op.written()))
        return storage in step.gives or any(ref.storage == storage for ref in refs)

    def call(
        self,
        op: Op,
        memory: Memory,
        generator: torch.Generator | None = None,
        *,
        resizes: bool = False,
    ) -> tuple[Any, ...]:
        """Call an op with real arguments; returns its results as a flat tuple.

        Args:
            op: the op.
            memory: the storages that it reads and writes.
            generator: the generator to draw from; by default one at the place of the op's draw.
            resizes: whether the op may resize what it writes, as its new size is still recorded.
        """
        args = [a if type(a) in NUMBERS else self._real(a, memory) for a in op.args]
        kwargs: dict[str, Any] = {}
        if op.kwargs:
            kwargs = {key: self._real(value, memory) for key, value in op.kwargs.items()}
        info = operators.by_name(op.name)
        if op.draw is None:
            if info.foreign:
                results = flat(_drawing_nothing(lambda: info.func(*args, **kwargs)))
            else:
                results = flat(info.call(*args, **kwargs))
            if not (info.elementwise or resizes):
                _check_sizes(op, info, args, kwargs)
            return results
        generator = generator or self._generator(op.draw)
        if not kwargs and info.fills and fills.fill(op.name, args[0], tuple(args[1:]), generator):
            result = args[0]
        elif "generator" in info.arguments[: len(args)]:
            args[info.arguments.index("generator")] = generator
            result = info.call(*args, **kwargs)
        # An op without an argument for a generator, such as dropout, draws from the default one.
        elif info.takes_generator:
            result = info.call(*args, **kwargs, generator=generator)
        else:
            result = _drawing_globally(generator, lambda: info.func(*args, **kwargs))
        self._cursor[op.draw.stream] = (op.draw.number + 1, generator)
        if info.foreign and not resizes:
            _check_sizes(op, info, args, kwargs)
        return flat(result)

    def _generator(self, draw: Draw) -> torch.Generator:
        """A generator before a draw: kept from the draw before it, if this session made that."""
        index, generator = self._cursor.pop(draw.stream, (-1, None))
        if generator is not None and index == draw.number:
            return generator
        return self.streams.generator(draw)

    def _real(self, value: Any, memory: Memory) -> Any:
        kind = type(value)
        if kind is TensorRef:
            storage = memory.get(value.storage)
            return self._window(value, memory) if storage is None else value.on(storage)
        if kind is Const:
            return self.constant(value.number)
        if kind is tuple:
            return [self._real(item, memory) for item in value]
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

    def _provide(self, number: int, memory: Memory) -> None:
        """Allocate a storage, uninitialised, unless it exists."""
        if number not in memory:
            known = self.program.storages[number]
            memory[number] = allocate(known.nbytes, known.device)

    def _window(self, ref: TensorRef, memory: Memory) -> Tensor:
        """Allocate the storage of a window, and return the window's tensor."""
        known = self.program.storages[ref.storage]
        # One call makes storage and tensor, if the window shows the whole storage in the layout
        # of torch.empty. Large storages are allocated separately, for huge pages.
        if known.nbytes < LARGE and not ref.bits:
            tensor = torch.empty(ref.size, dtype=ref.dtype, device=known.device)
            storage = tensor.untyped_storage()
            whole = ref.offset == 0 and storage.nbytes() == known.nbytes
            if whole and tensor.stride() == ref.stride:
                memory[ref.storage] = storage
                memory.windows[ref.storage] = ref, tensor
                return tensor
        self._provide(ref.storage, memory)
        return ref.on(memory[ref.storage])

    def _laid_out(self, ref: TensorRef, result: Tensor, memory: Memory) -> torch.UntypedStorage:
        """The storage of a result, copied into the recorded layout if the kernel's differs."""
        if result.dtype != ref.dtype:
            raise MaterializeError(_differs(ref, result))
        # Python code saw the recorded shape, so the rest of the program is valid for it alone.
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
            memory.strides[ref] = found.stride
            found = ref
        # The kernel's storage may be smaller than the recorded one, on which later windows lie.
        if found == ref and result.untyped_storage().nbytes() >= nbytes:
            return result.untyped_storage()
        self._provide(ref.storage, memory)
        ref.on(memory[ref.storage]).copy_(result)
        return memory[ref.storage]

    def _last_uses(self, step: Step) -> dict[int, list[int]]:
        """For each place in a step, the storages that no later op uses, targets excepted."""
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


def failed(number: int, op: Op, error: Exception) -> MaterializeError:
    """The error to raise if the kernel of an op has failed."""
    return MaterializeError(f"op {number} failed when it was replayed: {op}: {error}")


def _differs(ref: TensorRef, result: Tensor) -> str:
    return (
        f"recorded as {ref.dtype} {ref.size}, it is {result.dtype} {tuple(result.size())} with "
        "values: compute it after materialising"
    )


def _check_sizes(op: Op, info: OpInfo, args: list[Any], kwargs: dict[str, Any]) -> None:
    """Raise if a kernel has resized a tensor that it writes, which was recorded at its old size."""
    if info.metadata_only:
        return
    written = [(op.args[i], args[i]) for i in info.mutates if i < len(args)]
    written += [(op.kwargs.get(key), kwargs.get(key)) for key in info.mutates_kw]
    for recorded, given in written:
        listed = isinstance(given, (list, tuple))
        for ref, tensor in zip(recorded, given, strict=True) if listed else [(recorded, given)]:
            if type(ref) is TensorRef and tuple(tensor.size()) != ref.size:
                raise MaterializeError(
                    f"{op.name} resized an argument when it was replayed: {_differs(ref, tensor)}"
                )


def _drawing_globally(generator: torch.Generator, call: Callable[[], Any]) -> Any:
    """Run a call that takes no generator so that it draws from ``generator``.

    The default generator gets the state of ``generator``, and is restored afterwards.
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
    before = torch.default_generator.get_state()
    result = call()
    if not torch.equal(before, torch.default_generator.get_state()):
        torch.default_generator.set_state(before)
        raise RuntimeError(
            "it drew random numbers after the block that recorded its arguments: call it in the "
            "block, or after materialising them"
        )
    return result


def _where_long(ref: TensorRef, strides: tuple[int, ...]) -> tuple[int, ...]:
    """The strides of ``ref``, but those of ``strides`` in dims of length one (without effect)."""
    if ref.numel == 0:
        return strides
    triples = zip(ref.size, ref.stride, strides, strict=True)
    return tuple(other if length == 1 else stride for length, stride, other in triples)
