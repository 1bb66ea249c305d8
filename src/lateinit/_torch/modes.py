"""Running past torch's modes: as if no recording were there."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch._C import _len_torch_function_stack
from torch._ops import _len_torch_dispatch_stack_pre_dispatch
from torch.overrides import _get_current_function_mode_stack, _pop_mode, _push_mode
from torch.utils._python_dispatch import _disable_current_modes


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


def default_device_in_force() -> torch.device | None:
    """The device of the innermost ``with torch.device(...)``, if there is one."""
    for mode in reversed(_get_current_function_mode_stack()):
        device = getattr(mode, "device", None)
        if isinstance(device, torch.device):
            return device
    return None
