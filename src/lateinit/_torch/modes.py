"""torch's modes: leave them, ask for them, and be one.

A block runs under a function mode (Python calls) and a dispatch mode (operators). What lateinit
computes for itself must be heard by neither, nor by anybody else's.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch._C import _len_torch_function_stack
from torch._ops import _len_torch_dispatch_stack_pre_dispatch
from torch.overrides import _get_current_function_mode_stack, _pop_mode, _push_mode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

without_functions = torch._C.DisableTorchFunction
"""A block in which neither function modes nor ``__torch_function__`` of classes are asked."""

without_subclass_functions = torch._C.DisableTorchFunctionSubclass
"""A block in which ``__torch_function__`` of classes is not asked, and function modes are."""

is_function_mode_in_force = torch._C._is_torch_function_mode_enabled
is_any_autocast_enabled = torch._C._is_any_autocast_enabled
is_deterministic = torch._C._get_deterministic_algorithms
set_grad_enabled = torch._C._set_grad_enabled
"""What ``torch.no_grad`` and its like call; modes hear it at every use of them."""

_PYTHON_KEYS = torch._C.DispatchKeySet(torch._C.DispatchKey.Python).add(
    torch._C.DispatchKey.PythonTLSSnapshot
)


class DispatchMode(TorchDispatchMode):
    """A dispatch mode that does not import the compiler.

    ``torch.utils._python_dispatch`` wraps ``__torch_dispatch__`` in a function that imports
    ``torch._dynamo`` (1.2 s) at its first call and costs a little at each, unless a class says
    that it need not be skipped by it.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False


class without_modes:  # noqa: N801 - reads as a statement
    """A block that runs as if no recording, no other mode and no tensor subclass were there."""

    __slots__ = ("_functions", "_grad", "_modes")

    def __enter__(self) -> None:
        self._functions = torch._C.DisableTorchFunction()
        self._functions.__enter__()
        self._modes: contextlib.AbstractContextManager[Any] | None = None
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
    """Run a block as if no mode were in force: no recording, no default device, no inference."""
    modes = []
    while _len_torch_function_stack():
        modes.append(_pop_mode())
    try:
        with _disable_current_modes(), torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        for mode in reversed(modes):
            _push_mode(mode)


def below_python() -> Any:
    """A block whose ops go straight to their kernels, past dispatch modes and tensor subclasses."""
    return torch._C._ExcludeDispatchKeyGuard(_PYTHON_KEYS)


def is_recording_alone() -> bool:
    """Whether none but one recording sees what is done: no other mode, no other default.

    Asked in a function mode, which torch has taken off its stack for that time.
    """
    return (
        torch._C._len_torch_dispatch_stack() == 1
        and torch._C._len_torch_function_stack() == 0
        and torch._C._get_default_device() == "cpu"
        and not torch._C._get_deterministic_algorithms()
    )


def default_device_in_force() -> torch.device | None:
    """The device of the innermost ``with torch.device(...)``, if there is one."""
    for mode in reversed(_get_current_function_mode_stack()):
        device = getattr(mode, "device", None)
        if isinstance(device, torch.device):
            return device
    return None
