"""``deferred()``, the block in which the construction of a model is recorded instead of run."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedTensorMixin  # type: ignore[attr-defined]

from lateinit._identity import IdentityMap
from lateinit._program import Program
from lateinit._recording.function_mode import Masquerade
from lateinit._recording.holes import Hole, reserve
from lateinit._recording.patches import Patches
from lateinit._recording.recorder import Recorder, current, in_force
from lateinit._tensors import ON_META, DeferredTensor, is_deferred_tensor, own_tensors, slot_of
from lateinit._tensors.guard import guard
from lateinit._torch import REGISTRATION_HOOKS, as_subclass, swap_with_hooks, without_modes

T = TypeVar("T")
# A block keeps its place in the random stream as a token in the default generator (see
# ``generators``). All threads share that generator, so only one thread records at a time.
_one_thread = threading.RLock()
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
        self._recorder: Recorder | None = None
        self._block: contextlib.AbstractContextManager[None] | None = None

    def __enter__(self) -> Program:
        recorder = current()
        if recorder is None:
            _one_thread.acquire()
            try:
                recorder = Recorder()
                # From the start, drawn from or not: settle() must know where the block began.
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
        # Only the outermost ``with`` of this object, in no other block, has a recorder to end.
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
    """Record the ops of a block; at its end, guard the deferred tensors that it made."""
    modules = _Modules()
    try:
        with Patches(), modules, in_force(recorder, Masquerade(recorder)):
            yield
    finally:
        # After an error too: tensors that outlive a failed block must still refuse to be read.
        _guard_all(recorder, modules)
    recorder.finish()


@contextlib.contextmanager
def fill(hole: Hole) -> Iterator[Recorder]:
    """Record the initialisation that belongs in a hole.

    Afterwards the global generators are in the state that they had before.
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
    # Deep copies of a lazy module share its hole, and eager construction drew once for all of
    # them: the first filling determines how far the hole moves the generator.
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
    """The modules that a block registers parameters, buffers or children on."""

    def __init__(self) -> None:
        self._found: IdentityMap[nn.Module, None] = IdentityMap()
        self._parents: IdentityMap[nn.Module, tuple[nn.Module, str]] = IdentityMap()
        self._paths: IdentityMap[nn.Module, str] = IdentityMap()

    def __enter__(self) -> _Modules:
        # torch/nn/modules/module.py: register_module_parameter_registration_hook and its like do
        # this and return a handle; the key here is an id of ours, so no handle is needed.
        for registered in REGISTRATION_HOOKS:
            registered[id(self)] = self._note
        return self

    def _note(self, module: nn.Module, name: str, value: Any) -> None:
        self._found[module] = None
        if type(value) is nn.Parameter:
            return
        # The placeholders of pytorch-pfn-extras do not derive from torch's mixin.
        ppe = type(value).__name__ == "UninitializedParameter"
        if ppe or isinstance(value, UninitializedTensorMixin):
            reserve(module)
        if isinstance(value, nn.Module):
            self._found[value] = None
            self._parents[value] = (module, name)

    def __exit__(self, *_: object) -> None:
        for registered in REGISTRATION_HOOKS:
            del registered[id(self)]

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


def _guard_all(recorder: Recorder, modules: _Modules) -> None:
    """Guard all deferred tensors on the block's modules, and all others that are still alive.

    ``recorder.born`` holds the tensor objects that were seen when they were made. The walk over
    the modules finds all others, and gives slots the names that error messages show.
    """
    seen: set[int] = set()
    for module in modules.all():
        path = None
        for name, tensor in own_tensors(module, seen):
            slot = slot_of(tensor)
            if slot is not None and slot is not ON_META:
                if isinstance(tensor, UninitializedTensorMixin):
                    _leave_meta(tensor, recorder.device_of(tensor))
                guard(tensor)
                if slot.name is None:
                    path = modules.path(module) if path is None else path
                    slot.name = path + name
    for reference in recorder.born:
        made = reference()
        if made is not None and type(made) is not DeferredTensor and is_deferred_tensor(made):
            guard(made)
    recorder.born.clear()
