"""torch's function modes and dispatch modes: define one, query the stacks, leave them.

A block runs under a function mode (intercepts Python calls) and a dispatch mode (intercepts
operators). lateinit's own computations must be seen by neither, nor by other libraries' modes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch._C import _len_torch_function_stack
from torch._ops import _len_torch_dispatch_stack_pre_dispatch
from torch.overrides import _get_current_function_mode_stack, _pop_mode, _push_mode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

without_functions = torch._C.DisableTorchFunction
"""A block in which neither function modes nor ``__torch_function__`` of classes are called."""

without_subclass_functions = torch._C.DisableTorchFunctionSubclass
"""A block in which function modes are called, but not ``__torch_function__`` of classes."""

is_function_mode_in_force = torch._C._is_torch_function_mode_enabled
is_any_autocast_enabled = torch._C._is_any_autocast_enabled
is_deterministic = torch._C._get_deterministic_algorithms
set_grad_enabled = torch._C._set_grad_enabled
"""The function behind ``torch.no_grad`` and its like; function modes see each call of it."""

# The dispatch keys of modes and of subclasses with ``__torch_dispatch__``.
_PYTHON_KEYS = torch._C.DispatchKeySet(torch._C.DispatchKey.Python).add(
    torch._C.DispatchKey.PythonTLSSnapshot
)


class DispatchMode(TorchDispatchMode):
    """A dispatch mode that does not import the compiler.

    torch/utils/_python_dispatch.py: __init_subclass__ wraps ``__torch_dispatch__`` in
    ``torch._disable_dynamo``, which imports ``torch._dynamo`` at the first call (measured: 1.2 s)
    and slows each call down. It does not if ``_should_skip_dynamo`` returns False.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False


class without_modes:  # noqa: N801 - reads as a statement
    """A block without recording, other modes, ``__torch_function__`` and gradients.

    A class, since a generator takes longer to enter, and this is entered often.
    """

    __slots__ = ("_functions", "_grad", "_modes")

    def __enter__(self) -> None:
        self._functions = torch._C.DisableTorchFunction()
        self._functions.__enter__()
        self._modes: contextlib.AbstractContextManager[Any] | None = None
        # Disabling an empty stack takes time too.
        if torch._C._len_torch_dispatch_stack() or _len_torch_dispatch_stack_pre_dispatch():
            self._modes = _disable_current_modes()
            self._modes.__enter__()
        self._grad = torch.is_grad_enabled()
        torch._C._set_grad_enabled(False)

    def __exit__(self, *error: object) -> None:
        torch._C._set_grad_enabled(self._grad)
        if self._modes is not None:
            self._modes.__exit__(None, None, None)
        self._functions.__exit__(None, None, None)


@contextlib.contextmanager
def outside() -> Iterator[None]:
    """Run a block as if no mode were in force, default devices and inference mode included.

    Unlike ``without_modes`` it leaves gradients on and subclasses at work: for users' code.
    """
    # torch has no public way to leave function modes: take them off, and put them back in order.
    modes = []
    while _len_torch_function_stack():
        modes.append(_pop_mode())
    try:
        with _disable_current_modes(), torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        for mode in reversed(modes):
            _push_mode(mode)


@contextlib.contextmanager
def settings_kept() -> Iterator[None]:
    """A block after which process-wide settings are what they were."""
    before = [setting() for setting, _ in _SETTINGS]
    try:
        yield
    finally:
        for value, (setting, put) in zip(before, _SETTINGS, strict=True):
            if setting() != value:
                put(value)


def _determinism() -> tuple[bool, bool]:
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    return torch.are_deterministic_algorithms_enabled(), warn_only


def _put_determinism(flags: tuple[bool, bool]) -> None:
    torch.use_deterministic_algorithms(flags[0], warn_only=flags[1])


# How each setting is read and put back; cudnn's are switched by many a training script.
_SETTINGS: tuple[tuple[Callable[[], Any], Callable[[Any], Any]], ...] = (
    (torch.get_default_dtype, torch.set_default_dtype),
    (_determinism, _put_determinism),
    (torch.get_num_threads, torch.set_num_threads),
    *(
        (partial(getattr, torch.backends.cudnn, name), partial(setattr, torch.backends.cudnn, name))
        for name in ("enabled", "benchmark", "deterministic")
    ),
)


def below_python() -> Any:
    """A block whose ops skip dispatch modes and ``__torch_dispatch__`` on the way to kernels."""
    return torch._C._ExcludeDispatchKeyGuard(_PYTHON_KEYS)


def is_recording_alone() -> bool:
    """Whether one recording is the only mode, with the usual default device and determinism.

    To be called from the recording's function mode, which torch takes off its stack meanwhile.
    """
    return (
        torch._C._len_torch_dispatch_stack() == 1
        and torch._C._len_torch_function_stack() == 0
        and torch._C._get_default_device() == "cpu"
        and not torch._C._get_deterministic_algorithms()
    )


def default_device_in_force() -> torch.device | None:
    """The device of the innermost ``with torch.device(...)``, or None.

    torch/utils/_device.py: DeviceContext is a function mode with an attribute ``device``.
    """
    for mode in reversed(_get_current_function_mode_stack()):
        device = getattr(mode, "device", None)
        if isinstance(device, torch.device):
            return device
    return None
