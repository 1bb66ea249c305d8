"""Put modes, hooks and patches in force to record a construction; fill the holes of lazy modules.

Users do so by ``deferred`` (``block``). Initialisers of lazy modules and rules of ``init=`` are
recorded here, without a block of the user.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin

from lateinit._identity import IdentityMap
from lateinit._integrations import is_pfn_layer
from lateinit._program import Program, Ruled
from lateinit._recording.function_mode import Masquerade
from lateinit._recording.guard import watch_sharding
from lateinit._recording.holes import Hole, close, hole_of, reserve
from lateinit._recording.init_rules import RuleRecorder
from lateinit._recording.patches import Patches
from lateinit._recording.postponed import (
    check_not_postponed,
    first_of_hooks,
    has_placeholders,
    resets_of,
    waits_for_shape,
)
from lateinit._recording.recorder import Recorder
from lateinit._recording.redraw import draw_again
from lateinit._recording.registered import Registered, guard_all
from lateinit._recording.unheard import watch
from lateinit._recording.writer import ProgramWriter, current
from lateinit._replay import one_thread
from lateinit._tensors import bind, slot_of
from lateinit._torch import (
    Noted,
    here,
    let_full_collections_begin,
    let_full_collections_wait,
    map_tensors,
    name_of_class,
    noted,
    outside,
    own_buffers,
    own_parameters,
    replace_forward_pre_hook,
    turn,
)
from lateinit.errors import UninitializedError

# A block keeps its place in the random stream as a token in the default generator (see
# ``generators``). All threads share that generator, so only one thread records at a time.
one_at_a_time = turn()


class Recording:
    """The state of an open block: the modes that record its ops, hooks and patches."""

    def __init__(self, writer: ProgramWriter, before: Noted | None = None) -> None:
        self.writer = writer
        self._recorder = Recorder(writer)
        self._before = before or noted()
        self._outer = current()
        self._mode = Masquerade(writer)
        self._modules = Registered(self._declare)
        self._lazy: IdentityMap[nn.Module, None] = IdentityMap()
        self._patches = Patches(_PATCHES)

    def begin(self) -> None:
        with one_thread:  # not while another thread drops ops
            self.writer.program.recording = True
        self.writer.program.record_rules = record_rules
        let_full_collections_wait(self)
        watch(self.writer.program)
        watch_sharding(self.writer.program)
        self.writer.lazy_buffer_of = self._modules.lazy_buffer_of
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
        """Record the facts that are known only after a block without an error."""
        self.writer.finish()
        self._hear_first_calls()
        bind(self._modules.all(), self.writer.program)

    def _declare(self, module: nn.Module, name: str, placeholder: Tensor) -> None:
        """Reserve the hole of a module with a placeholder of another library or a user."""
        reserve(module)
        self._lazy[module] = None
        slot = slot_of(placeholder)
        if slot is not None:
            slot.lazy = f"{name_of_class(module)}.{name}"
        if not isinstance(module, LazyModuleMixin):
            first_of_hooks(module, _first_called)
        for cls, reset in resets_of(type(module)):
            self._patches.replace(cls, "reset_parameters", reset)

    def _hear_first_calls(self) -> None:
        """Let lazy modules of torch be initialised in their holes after the block too."""
        for module in self._lazy:
            handle: Any = module.__dict__.get("_initialize_hook")
            hole = hole_of(module)
            if hole is None:
                continue
            if not waits_for_shape(module):  # the constructor itself has initialised it
                with fill(hole):
                    pass
                close(module)
            elif getattr(type(module), "_infer_parameters", None) in (_infer, _inferred):
                replace_forward_pre_hook(module, handle.id, _inferred_later)

    def abandon(self, trace: TracebackType | None) -> None:
        """End the recording after an interrupt at any line of ``begin``, the block or ``end``."""
        self._before.restore(trace)
        self.close()

    def close(self) -> None:
        # From here on no op is recorded, even if an interrupt has left a mode on a stack.
        self._mode.ended = self._recorder.ended = True
        self._modules.leave()
        self._patches.leave()
        watch_sharding(self.writer.program)  # again: the block may have imported torch's sharding
        # After an error too: tensors that outlive a failed block must still refuse to be read.
        guard_all(self.writer, self._modules)
        let_full_collections_begin(self)

    def rest(self) -> None:
        """Allow unneeded ops to be dropped, now that everything is recorded."""
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
    with one_at_a_time:
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


def record_rules(program: Program, ruled: list[Ruled]) -> Program:
    """An extension of a program in which rules of ``init=`` act on finished values.

    Afterwards the global generators are in the state that they had before.
    """
    rules = RuleRecorder(program, ruled)
    with outside(), one_at_a_time:
        try:
            with recording_block(rules.writer):
                rules.run()
        except BaseException:
            rules.writer.generators.restore()
            raise
        return rules.finish()


_infer = LazyModuleMixin.__dict__["_infer_parameters"]


@functools.wraps(_infer)  # with torch's name, since modules that have it as a hook are pickled
def _inferred(self: Any, module: Any, args: Any, kwargs: Any = None) -> Any:
    """Torch's hook of lazy modules, changed so that a first call on data fills the hole."""
    hole = hole_of(module)
    if hole is None or here.trial or here.initialising:
        return _infer(self, module, args, kwargs)
    check_not_postponed(module)
    with outside(), fill(hole):
        if not has_placeholders(module):  # it got its shape from a checkpoint
            draw_again(module)
        result = _infer(self, module, args, kwargs)
    close(module)
    if current() is None:  # in a block, the end of the block guards them
        for name, tensor in (*own_parameters(module).items(), *own_buffers(module).items()):
            slot = slot_of(tensor) if tensor is not None else None
            if slot is not None and slot.name is None:
                slot.name = name
    return result


def _inferred_later(module: Any, args: Any, kwargs: Any) -> Any:
    """The same, as the hook of a module after its block."""
    return _inferred(module, module, args, kwargs)


def _first_called(module: nn.Module, args: Any, kwargs: Any) -> None:
    """Forward pre-hook of a module of a block that initialises itself in its first call.

    The draws of the initialisation belong in the hole. Layers of pytorch-pfn-extras are known to
    make no other draws in ``forward``.
    """
    hole = hole_of(module)
    if hole is None or here.trial or here.initialising or not has_placeholders(module):
        return
    check_not_postponed(module)
    if not is_pfn_layer(module):
        raise UninitializedError(
            f"{name_of_class(module)} was made in a deferred() block and initialises itself in its "
            "first call: call lateinit.infer_shapes(model, ...) before it, so that this is "
            "recorded at its place in the random stream"
        )
    training, held = module.training, (own_parameters(module), own_buffers(module))
    before = [dict(tensors) for tensors in held]
    try:
        with outside(), fill(hole):
            module.training = False  # a batch norm would count this call
            module.forward(*map_tensors(args, _like), **map_tensors(kwargs, _like))
    except BaseException:
        for tensors, found in zip(held, before, strict=True):
            tensors.update(found)
        raise
    finally:
        module.training = training
    close(module)


def _like(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)


_PATCHES = ((LazyModuleMixin, "_infer_parameters", _inferred),)
