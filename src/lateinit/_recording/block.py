"""``deferred()``, the block in which the construction of a model is recorded instead of run."""

from __future__ import annotations

import contextlib
import functools
import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.parameter import UninitializedTensorMixin  # type: ignore[attr-defined]

from lateinit._identity import IdentityMap
from lateinit._program import Program
from lateinit._recording.function_mode import Masquerade
from lateinit._recording.guard import guard, watch_sharding
from lateinit._recording.holes import Hole, close, hole_of, reserve
from lateinit._recording.patches import Patches
from lateinit._recording.recorder import Recorder
from lateinit._recording.unheard import watch
from lateinit._recording.writer import ProgramWriter, current
from lateinit._replay import one_thread
from lateinit._tensors import (
    ON_META,
    PLAIN_CLASSES,
    Guarded,
    attach,
    bind,
    is_deferred_tensor,
    own_tensors,
    slot_of,
)
from lateinit._torch import (
    REGISTRATION_HOOKS,
    Caller,
    Noted,
    are_functions_disabled,
    as_subclass,
    caller,
    held_by_script,
    here,
    is_frame_of,
    is_on_stack,
    let_full_collections_begin,
    let_full_collections_wait,
    mend,
    noted,
    outside,
    swap_with_hooks,
    turn,
    without_modes,
)
from lateinit.errors import RecordingError

T = TypeVar("T")
# A block keeps its place in the random stream as a token in the default generator (see
# ``generators``). All threads share that generator, so only one thread records at a time.
_one_thread = turn()
_DEEPEST = 64  # levels of a module's path: bounds the recursion if a module contains itself


class deferred(contextlib.AbstractContextManager[Program]):  # noqa: N801 - reads as a statement
    """A block in which models are built without memory, arithmetic or random draws.

    Every tensor that is made in the block is deferred: it has a shape, a dtype and a recorded
    construction, but no memory. When the block ends, the random generators are in the state that
    eager construction would have left. If the block raises, they are in the state that they had
    before it. An inner block is part of the outer one.

    Args:
        advance_rng: False leaves the random generators in the state that they had before the
            block. Later random numbers then differ from those after eager construction.

    Raises:
        RecordingError: the construction did something that cannot be recorded faithfully.

    Example:
        >>> with lateinit.deferred():
        ...     layer = torch.nn.Linear(1_000_000, 1_000_000)  # 4 TB
        >>> lateinit.is_deferred(layer)
        True
    """

    def __init__(self, *, advance_rng: bool = True) -> None:
        self._advance = advance_rng
        self._depth = 0
        self._recording: Recording | None = None
        self._entered: Caller | None = None
        self._before: Noted | None = None

    def __enter__(self) -> Program:
        mend()
        outer, depth = current(), self._depth
        try:
            self._depth += 1
            return self._begin() if outer is None else outer.program
        except BaseException as error:
            self._depth = depth
            if outer is None:
                self.abandon(error.__traceback__)
            raise

    def _begin(self) -> Program:
        before = noted()
        if are_functions_disabled(before.functions):
            raise RecordingError(
                "torch functions are disabled in this thread (DisableTorchFunction), so that a "
                "block would not see the construction: leave that block of torch first"
            )
        self._entered, self._before = caller(2), before
        _one_thread.acquire()
        recording = self._recording = Recording(ProgramWriter(Program()), self._before)
        # From the start, drawn from or not: settle() must know where the block began.
        recording.writer.generators.watch(torch.default_generator)
        recording.begin()
        here.block = weakref.ref(self)
        return recording.writer.program

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        recording, before = self._recording, self._before
        try:
            # Only the outermost ``with`` of this object, in no other block, has one to end.
            self._depth -= 1
            if self._depth == 0 and self._recording is not None:
                self._end(self._recording, error)
        except BaseException as failed:
            if recording is not None and self._depth == 0:
                # Also if nothing was left to do but to return: whoever is interrupted calls again.
                self._recording, self._before = recording, before
            self.abandon(failed.__traceback__)
            raise

    def _end(self, recording: Recording, error: BaseException | None) -> None:
        if error is not None and not isinstance(error, Exception):
            self.abandon(error.__traceback__)
            return
        recording.end()
        if error is None:
            recording.finish()
        if error is None and self._advance:
            recording.writer.settle()
        else:
            recording.writer.generators.restore()
        recording.rest()
        _one_thread.release()
        self._release()

    def abandon(self, trace: TracebackType | None = None) -> None:
        """End the block wherever it was interrupted, as if it had not been entered.

        Args:
            trace: the traceback of the interrupt.
        """
        if self._before is not None:
            self._before.restore(trace)
        if self._recording is not None:
            self._recording.close()
            self._recording.writer.generators.restore()
            self._recording.rest()
        self._release()

    def _release(self) -> None:
        here.block = self._entered = None
        self._depth = 0
        # Last: if an interrupt comes before, `abandon` still has everything to put back.
        self._before = self._recording = None

    def is_abandoned(self) -> bool:
        """Whether nobody will end this block: its ``__exit__`` was interrupted before it began.

        Then the frame that entered it is gone, and nothing refers to it but the frames of its own
        methods, which the traceback of the interrupt keeps.
        """
        if self._entered is None or is_on_stack(self._entered):
            return False
        return all(is_frame_of(holder, __file__, mend) for holder in gc.get_referrers(self))

    def __del__(self) -> None:
        # Interrupted as above, and the traceback is gone. Another thread cannot help.
        entered = getattr(self, "_entered", None)
        if entered is not None and entered.thread == threading.get_ident():
            self.abandon()


class Recording:
    """What a block has in force: the modes that have its ops recorded, hooks and patches."""

    def __init__(self, writer: ProgramWriter, before: Noted | None = None) -> None:
        self.writer = writer
        self._recorder = Recorder(writer)
        self._before = before or noted()
        self._outer = current()
        self._mode = Masquerade(writer)
        self._modules = _Modules()
        self._patches = Patches(_PATCHES)

    def begin(self) -> None:
        with one_thread:  # not while another thread drops ops
            self.writer.program.recording = True
        let_full_collections_wait(self)
        watch_sharding(self.writer.program)
        self._patches.enter()
        self._modules.enter()
        here.writer = self.writer
        self._recorder.__enter__()  # type: ignore[no-untyped-call]
        self._mode.__enter__()  # type: ignore[no-untyped-call]

    def end(self) -> None:
        self._mode.__exit__(None, None, None)
        self._recorder.__exit__(None, None, None)
        here.writer = self._outer
        self.close()

    def finish(self) -> None:
        """Note what is known only when the block has ended without an error."""
        self.writer.finish()
        bind(self._modules.all(), self.writer.program)

    def abandon(self, trace: TracebackType | None) -> None:
        """End at any moment between the lines of ``begin`` and ``end``, or after an interrupt."""
        self._before.restore(trace)
        self.close()

    def close(self) -> None:
        # Nothing is recorded any more, even if an interrupt has left a mode on a stack.
        self._mode.ended = self._recorder.ended = True
        self._modules.leave()
        self._patches.leave()
        # After an error too: tensors that outlive a failed block must still refuse to be read.
        watch(self.writer.program)
        watch_sharding(self.writer.program)  # also if the block has imported it
        _guard_all(self.writer, self._modules)
        let_full_collections_begin(self)

    def rest(self) -> None:
        """Let what nobody needs be dropped, now that all is recorded."""
        program = self.writer.program
        program.recording = self._outer is not None and self._outer.program is program
        program.rest()


@contextlib.contextmanager
def recording_block(writer: ProgramWriter) -> Iterator[None]:
    """Record the ops of a block; at its end, guard the deferred tensors that it made."""
    recording = Recording(writer)
    try:
        recording.begin()
        yield
        recording.end()
    except BaseException as error:
        recording.abandon(error.__traceback__)
        recording.rest()
        raise
    recording.finish()
    recording.rest()


@contextlib.contextmanager
def fill(hole: Hole) -> Iterator[ProgramWriter]:
    """Record the initialisation that belongs in a hole.

    Afterwards the global generators are in the state that they had before.
    """
    program, number, place = hole.resolve()
    with _one_thread:
        writer = ProgramWriter(program)
        try:
            stream = writer.generators.watch_from(torch.default_generator, place)
            with recording_block(writer):
                yield writer
            writer.generators.restore()
        except BaseException:
            writer.generators.restore()
            raise
    # Deep copies of a lazy module share its hole, and eager construction drew once for all of
    # them: the first filling determines how far the hole moves the generator.
    if program.holes[number] is None:
        program.holes[number] = stream


_infer = LazyModuleMixin.__dict__["_infer_parameters"]


@functools.wraps(_infer)  # pickle knows it by its name: modules keep it as a hook
def _inferred(self: Any, module: Any, args: Any, kwargs: Any = None) -> Any:
    """Torch's hook of lazy modules: one that is run in the block is initialised in its hole."""
    hole = hole_of(module)
    if current() is None or hole is None:
        return _infer(self, module, args, kwargs)
    with outside(), fill(hole):
        result = _infer(self, module, args, kwargs)
    close(module)
    return result


_PATCHES = ((LazyModuleMixin, "_infer_parameters", _inferred),)


def deferred_init(make: Callable[..., T], /, *args: Any, **kwargs: Any) -> T:
    """Call ``make(*args, **kwargs)`` in a ``deferred()`` block.

    Example:
        >>> layer = lateinit.deferred_init(torch.nn.Linear, 4, 2, bias=False)
        >>> lateinit.materialize(layer).weight.shape
        torch.Size([2, 4])
    """
    block = deferred()
    try:
        with block:
            return make(*args, **kwargs)
    except BaseException as error:
        block.abandon(error.__traceback__)
        raise


class _Modules:
    """The modules that a block registers parameters, buffers or children on."""

    def __init__(self) -> None:
        self._found: IdentityMap[nn.Module, None] = IdentityMap()
        self._last: nn.Module | None = None
        self._parents: IdentityMap[nn.Module, tuple[nn.Module, str]] = IdentityMap()
        self._paths: IdentityMap[nn.Module, str] = IdentityMap()

    def enter(self) -> None:
        # torch/nn/modules/module.py: register_module_parameter_registration_hook and its like do
        # this and return a handle; the key here is an id of ours, so no handle is needed.
        for registered in REGISTRATION_HOOKS:
            registered[id(self)] = self._note

    def _note(self, module: nn.Module, name: str, value: Any) -> None:
        # Most calls follow one for the same module.
        if module is not self._last:
            self._found[module], self._last = None, module
        if type(value) in PLAIN_CLASSES:
            return
        # The placeholders of pytorch-pfn-extras do not derive from torch's mixin.
        ppe = type(value).__name__ == "UninitializedParameter"
        if ppe or isinstance(value, UninitializedTensorMixin):
            reserve(module)
        if isinstance(value, nn.Module):
            self._found[value] = None
            self._parents[value] = (module, name)

    def leave(self) -> None:
        for registered in REGISTRATION_HOOKS:
            registered.pop(id(self), None)

    def all(self) -> list[nn.Module]:
        return list(self._found)

    def path(self, module: nn.Module, depth: int = 0) -> str:
        """The fqn of a module in the outermost module that contains it, with a final dot."""
        known = self._paths.get(module)
        if known is None:
            parent = self._parents.get(module)
            inner = parent is not None and depth < _DEEPEST
            known = f"{self.path(parent[0], depth + 1)}{parent[1]}." if parent and inner else ""
            self._paths[module] = known
        return known


def _leave_meta(placeholder: Tensor, device: torch.device) -> None:
    """Give torch's own placeholder its empty data on the device that it was made for.

    Its copies and casts are made anew on the device of its data (torch/nn/parameter.py), and
    ``meta`` would then be taken for what the user asked for.
    """
    if device.type == "cpu" or torch.get_device_module(device.type).is_available():
        with without_modes():
            data = torch.empty(0, dtype=placeholder.dtype, device=device)
            made = as_subclass(type(placeholder), data, placeholder.requires_grad)
            swap_with_hooks(placeholder, made)


def _guard_all(writer: ProgramWriter, modules: _Modules) -> None:
    """Guard all deferred tensors on the block's modules, and all others that are still alive.

    ``writer.born`` holds the tensor objects that were seen when they were made. The walk over
    the modules finds all others, and gives slots the names that error messages show.
    """
    seen: set[int] = set()
    # First of all, since the tensor objects that the guards exchange must be those that a C++
    # module answers with.
    scripts = [module for found in writer.scripts if (module := found()) is not None]
    held = held_by_script(scripts)
    for module in modules.all():
        path = None
        for name, tensor in own_tensors(module, seen):
            slot = slot_of(tensor)
            if slot is None and tensor.dtype is torch.uint8 and not tensor.is_meta:
                writer.kept.append((name, tensor))
            elif slot is None and tensor.is_meta:
                # The caller made it there and handed it over: eager construction leaves it so.
                attach(tensor.untyped_storage(), ON_META)
            elif slot is not None and slot is not ON_META:
                if isinstance(tensor, UninitializedTensorMixin):
                    _leave_meta(tensor, writer.device_of(tensor))
                guard(tensor)
                if slot.name is None:
                    path = modules.path(module) if path is None else path
                    slot.name = path + name
    for reference in writer.born:
        made = reference()
        if made is not None and not isinstance(made, Guarded) and is_deferred_tensor(made):
            guard(made)
    for script in held:
        for tensor in filter(is_deferred_tensor, script.tensors()):
            guard(tensor)
            named = slot_of(tensor)
            if named is not None and named.name is None:
                named.name = script.name
        script.put_back()
    writer.born.clear()
    writer.scripts.clear()
