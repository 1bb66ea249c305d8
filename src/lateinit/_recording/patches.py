"""Replace the functions of torch that no mode intercepts, while a block runs.

- ``torch.get_rng_state`` must return the state of eager construction, not a token, and
  ``torch.manual_seed`` and ``torch.set_rng_state`` may give the generator the very state that it
  had. All functions of torch.random, wherever they were imported, ask one global name.
- ``Parameter.__new__`` makes tensors below the dispatcher.
- Modules of TorchScript register no tensors or children in Python.
- ``trunc_normal_`` is a Python loop that is recorded as one op (``trunc_normal``).
- ``FakeTensorMode`` and ``torch.export`` make tensors that no recording could hold.
- ``to_dlpack`` reads memory, and comes to no mode.
- Some functions of torch call others with function modes off (``composite_ops``).
- Initialisers are fills under ``no_grad``, which are recorded at once (``fast_paths``).
- What initialises tensors without a shape is remembered for later (``postponed``).

The replacements are process-wide while any thread is in a block. Each asks ``current()`` and acts
only in a thread that is recording.
"""

from __future__ import annotations

import weakref
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lateinit._recording import composite_ops, fast_paths, postponed, trunc_normal
from lateinit._recording.writer import current
from lateinit._tensors import is_deferred_tensor, is_placeholder, slot_of
from lateinit._torch import (
    FakeMode,
    RecursiveScriptModule,
    construct_script_module,
    enter_fake_mode,
    to_dlpack,
    turn,
    without_modes,
)
from lateinit.errors import RecordingError

_default = torch.default_generator
_new_parameter = nn.Parameter.__dict__["__new__"]


class _Heard:
    """Stands for the default generator in ``torch.random``, and tells the writer what is asked."""

    def get_state(self) -> Tensor:
        writer = current()
        if writer is None:
            return _default.get_state()
        with writer.settled(told=True), without_modes():
            return _default.get_state()

    def set_state(self, state: Tensor) -> None:
        writer = current()
        if writer is not None and is_deferred_tensor(state):
            with without_modes():  # one that was saved and loaded
                state = writer.read(state).clone()
        _default.set_state(state)
        if writer is not None:
            writer.generators.restored(_default)

    def manual_seed(self, seed: int) -> torch.Generator:
        _default.manual_seed(seed)
        writer = current()
        if writer is not None:
            writer.generators.reseeded(_default)
        return _default

    def __getattr__(self, name: str) -> Any:
        return getattr(_default, name)


def _noted_parameter(cls: type[nn.Parameter], *args: Any, **kwargs: Any) -> Tensor:
    parameter: Tensor = _new_parameter.__func__(cls, *args, **kwargs)
    writer = current()
    if writer is not None:
        writer.born.append(weakref.ref(parameter))
        if cls is not nn.Parameter and is_placeholder(parameter):
            slot = slot_of(parameter)
            if slot is not None:
                slot.lazy = cls.__name__
    return parameter


def _noted_script(module: Any, *args: Any, **kwargs: Any) -> None:
    construct_script_module(module, *args, **kwargs)
    writer = current()
    if writer is not None:
        writer.scripts.append(weakref.ref(module))


def _refused_fake_mode(mode: Any) -> Any:
    writer = current()
    if writer is not None and not writer.busy:
        # Later is too late: an error in an op that torch.export traces aborts the process.
        raise RecordingError(
            "FakeTensorMode was entered in a deferred constructor, perhaps by torch.export: fake "
            "tensors have no values that could be recorded, and would stand for deferred tensors "
            "that say another device; do it after lateinit.materialize()"
        )
    return enter_fake_mode(mode)


def _shared_by_dlpack(tensor: Tensor) -> Any:
    writer = current()
    if writer is None or writer.busy or not is_deferred_tensor(tensor):
        return to_dlpack(tensor)
    with without_modes():
        return to_dlpack(writer.expose(tensor))


_PATCHES: tuple[tuple[Any, str, Any], ...] = (
    (torch.random, "default_generator", _Heard()),
    (nn.init, "_no_grad_trunc_normal_", trunc_normal.recorded),
    (nn.Parameter, "__new__", staticmethod(_noted_parameter)),
    (RecursiveScriptModule, "__init__", _noted_script),
    (FakeMode, "__enter__", _refused_fake_mode),
    (torch, "to_dlpack", _shared_by_dlpack),
    (torch.utils.dlpack, "to_dlpack", _shared_by_dlpack),
    *composite_ops.PATCHES,
    *fast_paths.PATCHES,
    *postponed.PATCHES,
)


class Patches:
    """The replacements, for as long as at least one block of any thread asks for them.

    ``enter`` and ``leave`` can be called again after an interrupt: they set everything, and count
    nothing.
    """

    _lock = turn()
    _users: ClassVar[set[int]] = set()
    # What was there, and what a block has put in its place. Libraries replace functions too (as
    # transformers does with those of nn.init while it loads), so that it may not be torch's.
    _replaced: ClassVar[dict[tuple[Any, str], tuple[Any, Any]]] = {}

    def __init__(self, more: tuple[tuple[Any, str, Any], ...] = ()) -> None:
        self._all = (*_PATCHES, *more)

    def enter(self) -> None:
        with self._lock:
            first = not self._users
            self._users.add(id(self))
            if first:
                for owner, name, replacement in self._all:
                    self.replace(owner, name, replacement)
                for initialiser in postponed.INITIALISERS:
                    initialiser.begin()

    def leave(self) -> None:
        with self._lock:
            if self._users <= {id(self)}:
                for (owner, name), (found, ours) in self._replaced.items():
                    if vars(owner)[name] is ours:
                        setattr(owner, name, found)
                for initialiser in postponed.INITIALISERS:
                    initialiser.end()
            self._users.discard(id(self))

    def replace(self, owner: Any, name: str, ours: Any) -> None:
        """Replace an attribute of a class or module until the last block ends."""
        found = vars(owner)[name]
        if self._replaced.get((owner, name), (None, None))[1] is not found:
            self._replaced[owner, name] = found, ours
            setattr(owner, name, ours)
