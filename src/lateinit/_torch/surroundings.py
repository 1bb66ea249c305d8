"""Put the modes and settings of torch back as they were before a call that was interrupted.

``KeyboardInterrupt`` can be raised between any two lines: also as the first thing of an
``__exit__`` or of a ``finally``, which then does not run. No context manager written in Python is
safe from that, torch's own included. So each public call notes everything that it may change in its
thread (``noted``), and if it is interrupted puts all of it back (``Noted.restore``), whatever the
context managers below it have done. A ``deferred()`` block is not a call: if even its ``__exit__``
was interrupted, the next public call ends it (``here.block``).

State is put back at the end of a ``try`` and again in its ``except BaseException``, not in a
``finally``: if an interrupt hits the first, the second still runs. The line of a nested ``try`` is
covered by neither (CPython 3.11 compiles it to an instruction of its own), so such functions nest
no ``try``.
"""

from __future__ import annotations

import functools
import gc
import threading
import warnings
from collections.abc import Callable
from types import TracebackType
from typing import Any, NamedTuple, ParamSpec, Protocol, TypeVar

import torch
import torch.utils._device
import torch.utils._python_dispatch

from lateinit._torch.frames import close_contexts
from lateinit._torch.modes import (
    DispatchMode,
    FunctionMode,
    dispatch_modes,
    function_modes,
    functions_state,
    put_autocast,
    put_determinism,
    put_dispatch_modes,
    put_function_modes,
    read_autocast,
    read_determinism,
    set_functions_state,
)

_P = ParamSpec("_P")
_R = TypeVar("_R")


class _Block(Protocol):
    """A recording that stays in force from one call to another."""

    def is_abandoned(self) -> bool: ...

    def abandon(self) -> None: ...


class _Here(threading.local):
    """lateinit's own state in a thread.

    Attributes:
        writer: the writer of the recording in force (``_recording.writer``).
        trial: how lazy modules are initialised during a trial (``_lazy.mixin``).
        initialising: whether a lazy module is called to be initialised (``_lazy.protocols``).
        block: a weak reference to the outermost open block (``_recording.block``).
    """

    writer: Any = None
    trial: Any = None
    initialising: bool = False
    block: Callable[[], _Block | None] | None = None


here = _Here()
Kept = tuple[tuple[Callable[[], Any], Callable[[Any], Any]], ...]


_turns: list[Any] = []


def turn() -> Any:
    """A lock for one thread at a time, which a thread that is interrupted does not keep."""
    _turns.append(threading.RLock())
    return _turns[-1]


def is_turn_taken() -> bool:
    """Whether this thread holds any turn."""
    return any(_turns_taken())


# The users for whom full collections wait, each with its thread. They wait while the threshold of
# the oldest generation is one that no count reaches.
_unhurried: set[tuple[int, Any]] = set()
_one_user = turn()
_NEVER = 1 << 30
_usual = gc.get_threshold()[2]


def let_full_collections_wait(user: Any) -> None:
    """Have no full garbage collection begin by itself; the younger generations are collected.

    Recording and materialising make many objects that stay, so that Python looks through all the
    objects of the process again and again: it took 40% of the time for 4,200 small tensors.

    Args:
        user: identifies the caller in ``let_full_collections_begin``.
    """
    global _usual  # noqa: PLW0603 - the process has one threshold
    with _one_user:
        young, middle, full = gc.get_threshold()
        if full != _NEVER:
            _usual = full
            gc.set_threshold(young, middle, _NEVER)
        _unhurried.add((threading.get_ident(), user))


def let_full_collections_begin(user: Any) -> None:
    """Undo ``let_full_collections_wait`` for one user. It can be called again."""
    _put_unhurried(_unhurried_here() - {user})


def _unhurried_here() -> set[Any]:
    thread = threading.get_ident()
    return {user for by, user in _unhurried.copy() if by == thread}


def _put_unhurried(users: set[Any]) -> None:
    with _one_user:
        for user in _unhurried_here() - users:
            _unhurried.discard((threading.get_ident(), user))
        young, middle, full = gc.get_threshold()
        if full == _NEVER and not _unhurried:
            gc.set_threshold(young, middle, _usual)


def _turns_taken() -> list[bool]:
    return [lock._is_owned() for lock in _turns]


def _give_up_turns(before: list[bool]) -> None:
    for lock, owned in zip(_turns, before, strict=True):
        while not owned and lock._is_owned():
            lock.release()


class Noted(NamedTuple):
    """The state of a thread at some moment; ``kept`` has each value with how to put it back."""

    functions: Any
    values: list[Any]
    kept: Kept

    def restore(self, trace: TracebackType | None) -> None:
        """Put everything back.

        Args:
            trace: the traceback of the interrupt.
        """
        close_contexts(trace)
        # No function mode may intercept these calls.
        with torch._C.DisableTorchFunction():
            for value, (read, put) in zip(self.values, self.kept, strict=True):
                if read() != value:
                    put(value)
        set_functions_state(self.functions)


def noted() -> Noted:
    """The present state of this thread: modes, settings and lateinit's own."""
    return _noted(_KEPT)


def noted_modes() -> Noted:
    """The modes in force in this thread now, for a call that changes nothing else."""
    return _noted(_MODES)


def _noted(kept: Kept) -> Noted:
    return Noted(functions_state(), [read() for read, _ in kept], kept)


def restoring(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Decorator of public functions: an interrupted call puts the state of its thread back."""

    @functools.wraps(function)
    def called(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        mend()
        before = noted()
        try:
            return function(*args, **kwargs)
        except BaseException as error:
            before.restore(error.__traceback__)
            raise

    return called


def unhurried(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Decorator: full garbage collections wait during a call."""

    @functools.wraps(function)
    def called(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        user = object()
        let_full_collections_wait(user)
        try:
            return function(*args, **kwargs)
        finally:
            let_full_collections_begin(user)

    return called


def mend() -> None:
    """End what interrupts have left in force in this thread.

    A block is left if its ``__exit__`` was interrupted before it began. Modes of lateinit are left
    if a context manager of torch puts them back late: when the traceback that held it is dropped.
    """
    block = here.block() if here.block is not None else None
    if block is not None and block.is_abandoned():
        block.abandon()
    if torch._C._len_torch_function_stack() or torch._C._len_torch_dispatch_stack():
        _take_off_ended()


def _take_off_ended() -> None:
    functions, operators = function_modes(), dispatch_modes()
    live = [m for m in functions if not (isinstance(m, FunctionMode) and m.ended)]
    if len(live) < len(functions):
        put_function_modes(live)
    left = [m for m in operators if not (isinstance(m, DispatchMode) and m.ended)]
    if len(left) < len(operators):
        put_dispatch_modes(left)


def _put_function_modes(modes: list[Any]) -> None:
    # The default device of the process (torch/__init__.py: set_default_device) is a mode too, which
    # a constructor may have set for good.
    default = getattr(torch._GLOBAL_DEVICE_CONTEXT, "device_context", None)
    new = [mode for mode in function_modes() if mode is default and mode not in modes]
    put_function_modes([*new, *modes])


# Flags in modules of torch that its modes set, next to the stacks; some torch versions lack some.
_FLAGS = tuple(
    (vars(module), name)
    for module, names in (
        (
            torch.utils._python_dispatch,
            (
                "_is_in_torch_dispatch_mode",
                "_is_in_non_infra_torch_dispatch_mode",
                "_is_in_any_mode_without_ignore_compile_internals",
            ),
        ),
        (torch.utils._device, ("CURRENT_DEVICE",)),
    )
    for name in names
    if name in vars(module)
)
# torch/utils/_python_dispatch.py: C++ has a copy of the last of the flags, set by this function.
_TELL = vars(torch.utils._python_dispatch).get("set_is_in_mode_without_ignore_compile_internals")


def _flags() -> list[Any]:
    return [names[name] for names, name in _FLAGS]


def _put_flags(values: list[Any]) -> None:
    for value, (names, name) in zip(values, _FLAGS, strict=True):
        names[name] = value
        if _TELL is not None and name == "_is_in_any_mode_without_ignore_compile_internals":
            _TELL(value)


def _warnings() -> list[Any]:
    # warnings.py: catch_warnings replaces these three.
    return [warnings.filters, warnings.showwarning, warnings._showwarnmsg_impl]  # type: ignore[attr-defined]


def _put_warnings(values: list[Any]) -> None:
    warnings.filters, warnings.showwarning, warnings._showwarnmsg_impl = values  # type: ignore[attr-defined]
    warnings._filters_mutated()  # type: ignore[attr-defined]


def _own() -> dict[str, Any]:
    return dict(vars(here))


def _put_own(values: dict[str, Any]) -> None:
    vars(here).clear()
    vars(here).update(values)


_future = torch.__future__
_MODES: Kept = (
    (function_modes, _put_function_modes),
    (dispatch_modes, put_dispatch_modes),
    (_flags, _put_flags),
    (torch.is_grad_enabled, torch._C._set_grad_enabled),
    (_own, _put_own),
)
_KEPT: Kept = (
    *_MODES,
    (torch.get_default_dtype, torch.set_default_dtype),
    (read_determinism, put_determinism),
    (read_autocast, put_autocast),
    (_warnings, _put_warnings),
    (
        _future.get_swap_module_params_on_conversion,
        _future.set_swap_module_params_on_conversion,
    ),
    (_unhurried_here, _put_unhurried),
    (_turns_taken, _give_up_turns),
)
