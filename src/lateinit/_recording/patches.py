"""Replace the functions of torch that no mode intercepts, while a block runs.

- ``torch.get_rng_state`` must return the state of eager construction, not a token, and
  ``torch.manual_seed`` and ``torch.set_rng_state`` may give the generator the same state as before.
  What is made of ``torch.initial_seed()`` differs under another seed.
  All functions of torch.random, wherever they were imported, look up one global name.
- ``Tensor._make_subclass``, which makes every parameter, and ``Tensor.as_subclass`` turn all modes
  off (torch/csrc/autograd/python_variable.cpp).
- ``Tensor.__new__`` cannot make a tensor of a subclass under a dispatch mode: the mode returns a
  tensor that has a Python object already (python_variable.cpp: THPVariable_NewWithVar).
- ``swap_tensors`` refuses tensors that the writer holds weakly, and no mode intercepts it.
- ``Generator.__setstate__`` and ``set_state`` read a state's memory (torch/csrc/Generator.cpp).
- Modules of TorchScript register no tensors or children in Python.
- ``trunc_normal_`` is a Python loop that is recorded as one op (``trunc_normal``).
- ``FakeTensorMode`` and ``torch.export`` make tensors that no recording could hold.
- ``to_dlpack`` reads memory, and no mode intercepts it.
- ``clip_grad_norm_`` and optimizers group tensors by device below Python.
- Some functions of torch call others with function modes off (``composite_ops``).
- Initialisers are fills under ``no_grad``, which are recorded at once (``fast_paths``).
- Calls that initialise tensors without a shape are postponed (``postponed``).

The replacements are process-wide while any thread is in a block. Each checks ``current()``, and
acts only in a thread that is recording.
"""

from __future__ import annotations

import weakref
from types import FunctionType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lateinit._recording import composite_ops, fast_paths, postponed, trunc_normal
from lateinit._recording.writer import ProgramWriter, current
from lateinit._rng import STATE_BYTES
from lateinit._tensors import is_deferred_tensor, is_placeholder, slot_of
from lateinit._torch import (
    ASKING_FOR_REFERENCES,
    GROUPING,
    REBUILDING,
    SWAPPING,
    FakeMode,
    OthersReferences,
    RecursiveScriptModule,
    WeakTensor,
    bytes_loaded,
    construct_script_module,
    enter_fake_mode,
    group_tensors,
    make_subclass,
    new_tensor,
    rebuild_tensor,
    swap_implementation,
    tensors_in,
    to_dlpack,
    turn,
    untraced,
    view_as_subclass,
    without_modes,
)
from lateinit.errors import RecordingError

_default = torch.default_generator
_INHERITED = object()
# Bytes of a state: of the CPU's generator, and of generators with a seed and an offset.
_STATES = (STATE_BYTES, 16)


class _Heard:
    """Stands in for the default generator in ``torch.random``, and reports calls to the writer."""

    @untraced
    def get_state(self) -> Tensor:
        writer = current()
        if writer is None:
            return _default.get_state()
        with writer.settled(told=True), without_modes():
            return _default.get_state()

    @untraced
    def set_state(self, state: Tensor) -> None:
        writer = current()
        if writer is not None and is_deferred_tensor(state):
            with without_modes():  # a state that was saved and loaded
                state = writer.read(state).clone()
        _default.set_state(state)
        if writer is not None:
            writer.generators.restored(_default)

    @untraced
    def manual_seed(self, seed: int) -> torch.Generator:
        _default.manual_seed(seed)
        writer = current()
        if writer is not None:
            writer.generators.reseeded(_default)
        return _default

    @untraced
    def initial_seed(self) -> int:
        writer = current()
        if writer is not None:
            writer.generators.tell_seed(_default)
        return _default.initial_seed()

    def __getattr__(self, name: str) -> Any:
        return getattr(_default, name)


def _noted_subclass(*args: Any, **kwargs: Any) -> Tensor:
    return _noted(make_subclass(*args, **kwargs))


def _noted_view(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return _noted(view_as_subclass(self, *args, **kwargs))


def _made_of_class(*args: Any, **kwargs: Any) -> Tensor:
    # torch/_dynamo/polyfills/tensor.py, if it is imported now, accepts just this signature.
    writer, cls = current(), args[0]
    if writer is None or writer.busy or cls is Tensor:
        made: Tensor = new_tensor(*args, **kwargs)
        return made
    return _noted(view_as_subclass(new_tensor(Tensor, *args[1:], **kwargs), cls))


def _swapped(a: Tensor, b: Tensor) -> None:
    swap_implementation(a, b)
    writer = current()
    if writer is not None:
        writer.born += [WeakTensor(a), WeakTensor(b)]


def _rebuilt(storage: Any, *args: Any) -> Tensor:
    """A loaded tensor; it stays real if it may be the state of a generator."""
    writer = current()
    if writer is None or writer.busy or bytes_loaded(storage) not in _STATES:
        return rebuild_tensor(storage, *args)
    with without_modes():
        return rebuild_tensor(storage, *args)


def _noted(made: Tensor) -> Tensor:
    writer = current()
    if writer is not None:
        writer.born.append(WeakTensor(made))
        if type(made) is not nn.Parameter and is_placeholder(made):
            slot = slot_of(made)
            if slot is not None:
                slot.lazy = type(made).__name__
    return made


def _noted_script(module: Any, *args: Any, **kwargs: Any) -> None:
    construct_script_module(module, *args, **kwargs)
    writer = current()
    if writer is not None:
        writer.scripts.append(weakref.ref(module))


def _refused_fake_mode(mode: Any) -> Any:
    writer = current()
    if writer is not None and not writer.busy:
        # Refuse now: a later error, in an op that torch.export traces, would abort the process.
        raise RecordingError(
            "FakeTensorMode was entered in a deferred constructor, perhaps by torch.export: fake "
            "tensors have no values that could be recorded, and would stand for deferred tensors "
            "that report another device; do it after lateinit.materialize()"
        )
    return enter_fake_mode(mode)


def _grouped(lists: Any, with_indices: bool = False) -> dict[Any, Any]:
    """The groups of tensors by device and dtype, deferred ones by their recorded device."""
    writer = current()
    if writer is None or writer.busy:
        return group_tensors(lists, with_indices)
    merged: dict[Any, tuple[list[Any], list[int]]] = {}
    for (device, dtype), (columns, found) in group_tensors(lists, True).items():
        key = _device_of(writer, columns, device), dtype
        before, known = merged.get(key, ([[] for _ in columns], []))
        places = known + found
        order = sorted(range(len(places)), key=places.__getitem__)
        joined = [old + new for old, new in zip(before, columns, strict=True)]
        merged[key] = [[c[i] for i in order] for c in joined], [places[i] for i in order]
    return {key: (found, at if with_indices else []) for key, (found, at) in merged.items()}


def _device_of(writer: ProgramWriter, lists: Any, device: torch.device) -> torch.device:
    """The device that all deferred tensors of a group were recorded for."""
    deferred = [t for t in tensors_in(tuple(lists), {}) if is_deferred_tensor(t)]
    devices = set(map(writer.device_of, deferred))
    if len(devices) > 1:
        raise RecordingError(
            "a function of several tensors, as clip_grad_norm_, is given deferred tensors of "
            f"several devices ({', '.join(sorted(map(str, devices)))}), which it would have to "
            "tell apart: give it those of one device at a time, or call it after materialising"
        )
    return devices.pop() if devices else device


def _shared_by_dlpack(tensor: Tensor) -> Any:
    writer = current()
    if writer is None or writer.busy or not is_deferred_tensor(tensor):
        return to_dlpack(tensor)
    with without_modes():
        return to_dlpack(writer.expose(tensor))


_PATCHES: tuple[tuple[Any, str, Any], ...] = (
    (torch.random, "default_generator", _Heard()),
    (nn.init, "_no_grad_trunc_normal_", trunc_normal.recorded),
    (Tensor, "_make_subclass", staticmethod(_noted_subclass)),
    (Tensor, "as_subclass", _noted_view),
    (Tensor, "__new__", staticmethod(_made_of_class)),
    (*SWAPPING, _swapped),
    (*ASKING_FOR_REFERENCES, OthersReferences()),
    (*REBUILDING, _rebuilt),
    (RecursiveScriptModule, "__init__", _noted_script),
    (FakeMode, "__enter__", _refused_fake_mode),
    (*GROUPING, _grouped),
    (torch, "to_dlpack", _shared_by_dlpack),
    (torch.utils.dlpack, "to_dlpack", _shared_by_dlpack),
    *composite_ops.PATCHES,
    *fast_paths.PATCHES,
    *postponed.PATCHES,
)


class Patches:
    """The replacements, in place while at least one block of any thread needs them.

    ``enter`` and ``leave`` can be called again after an interrupt: they set everything, and keep no
    count.
    """

    _lock = turn()
    _users: ClassVar[set[int]] = set()
    # The previous function, and its replacement by a block. The previous one may not be torch's,
    # since libraries replace functions too (transformers those of nn.init while it loads).
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
                    if vars(owner).get(name) is not ours:
                        continue
                    if found is _INHERITED:
                        delattr(owner, name)
                    else:
                        setattr(owner, name, found)
                for initialiser in postponed.INITIALISERS:
                    initialiser.end()
            self._users.discard(id(self))

    def replace(self, owner: Any, name: str, ours: Any) -> None:
        """Replace an attribute of a class or module until the last block ends."""
        # torch.compile does not trace frames under a dispatch mode, but this one leaves the mode.
        function = getattr(ours, "__func__", ours)
        if isinstance(function, FunctionType):
            untraced(function)
        found = vars(owner).get(name, _INHERITED)
        if self._replaced.get((owner, name), (None, None))[1] is not found:
            self._replaced[owner, name] = found, ours
            setattr(owner, name, ours)
