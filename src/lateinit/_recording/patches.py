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
from lateinit._tensors import is_deferred_tensor
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


_PATCHES: tuple[tuple[Any, str, Any, Any], ...] = (
    (torch.random, "default_generator", _default, _Heard()),
    (nn.init, "_no_grad_trunc_normal_", trunc_normal.original, trunc_normal.recorded),
    (nn.Parameter, "__new__", _new_parameter, staticmethod(_noted_parameter)),
    (RecursiveScriptModule, "__init__", construct_script_module, _noted_script),
    (FakeMode, "__enter__", enter_fake_mode, _refused_fake_mode),
    (torch, "to_dlpack", to_dlpack, _shared_by_dlpack),
    (torch.utils.dlpack, "to_dlpack", to_dlpack, _shared_by_dlpack),
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
    # By name: the initialisers that were there, and what hears of them now. Libraries replace some
    # (as transformers does while it loads), so that these are not those of torch.
    _initialisers: ClassVar[dict[str, tuple[Any, Any]]] = {}

    def __init__(self, more: tuple[tuple[Any, str, Any, Any], ...] = ()) -> None:
        self._all = (*_PATCHES, *more)

    def enter(self) -> None:
        with self._lock:
            first = not self._users
            self._users.add(id(self))
            if first:
                for owner, name, _, replacement in self._all:
                    setattr(owner, name, replacement)
                self._hear()

    def leave(self) -> None:
        with self._lock:
            if self._users <= {id(self)}:
                for owner, name, original, _ in self._all:
                    setattr(owner, name, original)
                self._hear_no_more()
            self._users.discard(id(self))

    def _hear(self) -> None:
        for name in postponed.INITIALISERS:
            found = getattr(nn.init, name)
            if self._initialisers.get(name, (None, None))[1] is not found:
                self._initialisers[name] = found, postponed.heard(found)
                setattr(nn.init, name, self._initialisers[name][1])

    def _hear_no_more(self) -> None:
        for name, (original, hearing) in self._initialisers.items():
            if getattr(nn.init, name) is hearing:
                setattr(nn.init, name, original)
