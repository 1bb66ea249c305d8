"""``deferred()``: the block in which models are declared and not built."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn.parameter import UninitializedTensorMixin  # type: ignore[attr-defined]

from lateinit._program.program import Program
from lateinit._recording.function_mode import Masquerade
from lateinit._recording.holes import Hole, reserve
from lateinit._recording.patches import Patches
from lateinit._recording.recorder import Recorder, current, in_force
from lateinit._tensors.guard import DeferredTensor, guard
from lateinit._tensors.slots import ON_META, is_deferred_tensor, slot_of
from lateinit._tensors.walk import own_tensors
from lateinit._torch.modules import REGISTRATION_HOOKS

T = TypeVar("T")
# Blocks leave tokens in the default generator, which all threads share: one thread at a time.
_one_thread = threading.RLock()
_DEEPEST = 64  # modules in modules, in case a module is put into itself


class deferred(contextlib.AbstractContextManager[Program]):  # noqa: N801 - reads as a statement
    """A block in which models are built without memory, arithmetic or random draws.

    Every tensor that is made in the block is deferred: it has a shape, a dtype and a recorded
    construction, and no storage. On leaving the block the random generators stand where eager
    construction would have left them. Blocks nest: an inner one is part of the outer one. If the
    block raises, the generators stand where they stood before it.

    Args:
        advance_rng: False leaves the random generators where they were, for those who do not need
            what follows to draw as it would after eager construction.

    Raises:
        RecordingError: the construction did what cannot be recorded honestly.

    Example:
        >>> with lateinit.deferred():
        ...     layer = torch.nn.Linear(1_000_000, 1_000_000)  # 4 TB
        >>> lateinit.is_deferred(layer)
        True
    """

    def __init__(self, *, advance_rng: bool = True) -> None:
        self._advance = advance_rng
        self._depth = 0
        self._recorder: Recorder | None = None
        self._block: contextlib.AbstractContextManager[None] | None = None

    def __enter__(self) -> Program:
        recorder = current()
        if recorder is None:
            _one_thread.acquire()
            try:
                recorder = Recorder()
                recorder.generators.watch(torch.default_generator)
                block_ = recording_block(recorder)
                block_.__enter__()
            except BaseException:
                _one_thread.release()
                raise
            self._recorder, self._block = recorder, block_
        self._depth += 1
        return recorder.program

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._depth -= 1
        if self._depth or self._recorder is None or self._block is None:
            return
        recorder, block_ = self._recorder, self._block
        self._recorder = self._block = None
        done = False
        try:
            block_.__exit__(kind, error, trace)
            if kind is None and self._advance:
                recorder.settle()
                done = True
        finally:
            if not done:
                recorder.generators.restore()
            _one_thread.release()


@contextlib.contextmanager
def recording_block(recorder: Recorder) -> Iterator[None]:
    """Record what a block does, and guard what it made."""
    modules = _Modules()
    try:
        with Patches(), modules, in_force(recorder, Masquerade(recorder)):
            yield
    finally:
        _guard_all(recorder, modules)
    recorder.finish()


@contextlib.contextmanager
def fill(hole: Hole) -> Iterator[Recorder]:
    """Record the initialisation that a hole was reserved for.

    The global generators stand afterwards where they stood before.
    """
    program, number, place = hole.resolve()
    _one_thread.acquire()
    recorder = Recorder(program)
    stream = recorder.generators.watch_from(torch.default_generator, place)
    try:
        with recording_block(recorder):
            yield recorder
    finally:
        recorder.generators.restore()
        _one_thread.release()
    if program.holes[number] is None:
        program.holes[number] = stream


def deferred_init(make: Callable[..., T], /, *args: Any, **kwargs: Any) -> T:
    """Call ``make(*args, **kwargs)`` in a ``deferred()`` block.

    Example:
        >>> layer = lateinit.deferred_init(torch.nn.Linear, 4, 2, bias=False)
        >>> lateinit.materialize(layer).weight.shape
        torch.Size([2, 4])
    """
    with deferred():
        return make(*args, **kwargs)


class _Modules:
    """The modules that something is registered on while a block runs."""

    def __init__(self) -> None:
        self._found: dict[int, nn.Module] = {}
        self._parents: dict[int, tuple[nn.Module, str]] = {}
        self._paths: dict[int, str] = {}

    def __enter__(self) -> _Modules:
        # What register_module_parameter_registration_hook and its like do, without handles.
        for registered in REGISTRATION_HOOKS:
            registered[id(self)] = self._note
        return self

    def _note(self, module: nn.Module, name: str, value: Any) -> None:
        self._found[id(module)] = module
        if type(value) is nn.Parameter:
            return
        # PPE's placeholders are no subclasses of torch's.
        ppe = type(value).__name__ == "UninitializedParameter"
        if ppe or isinstance(value, UninitializedTensorMixin):
            reserve(module)
        if isinstance(value, nn.Module):
            self._found[id(value)] = value
            self._parents[id(value)] = (module, name)

    def __exit__(self, *_: object) -> None:
        for registered in REGISTRATION_HOOKS:
            del registered[id(self)]

    def all(self) -> list[nn.Module]:
        return list(self._found.values())

    def path(self, module: nn.Module, depth: int = 0) -> str:
        """The dotted name of a module below the outermost one that it was put in."""
        known = self._paths.get(id(module))
        if known is None:
            parent = self._parents.get(id(module))
            inner = parent is not None and depth < _DEEPEST
            known = f"{self.path(parent[0], depth + 1)}{parent[1]}." if parent and inner else ""
            self._paths[id(module)] = known
        return known


def _guard_all(recorder: Recorder, modules: _Modules) -> None:
    """Guard what the block made: all tensors on its modules, and those made that still live."""
    seen: set[int] = set()
    for module in modules.all():
        path = None
        for name, tensor in own_tensors(module, seen):
            slot = slot_of(tensor)
            if slot is not None and slot is not ON_META:
                guard(tensor)
                if slot.name is None:
                    path = modules.path(module) if path is None else path
                    slot.name = path + name
    for reference in recorder.born:
        made = reference()
        if made is not None and type(made) is not DeferredTensor and is_deferred_tensor(made):
            guard(made)
    recorder.born.clear()
