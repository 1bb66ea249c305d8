"""Contexts: out of every mode that is in force, and recordings that nobody keeps."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch._C import _len_torch_function_stack
from torch.overrides import _get_current_function_mode_stack, _pop_mode, _push_mode
from torch.utils._python_dispatch import _disable_current_modes

from lateinit._recording.block import block
from lateinit._recording.recorder import Recorder


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


@contextlib.contextmanager
def aside() -> Iterator[Recorder]:
    """Record a block into a program that nobody keeps; the generators stay where they are.

    What is warned of is ignored: it is about trial sizes, or comes again when it is done truly.
    """
    recorder = Recorder()
    with outside(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        recorder.generators.watch(torch.default_generator)
        try:
            with block(recorder):
                yield recorder
        finally:
            recorder.generators.restore()


@dataclass(frozen=True, slots=True)
class Settings:
    """The settings that a constructor reads: those of its call hold when it is run later."""

    dtype: torch.dtype
    device: torch.device | None

    @classmethod
    def now(cls) -> Settings:
        """Those in force now."""
        return cls(torch.get_default_dtype(), _default_device())

    @contextlib.contextmanager
    def in_force(self) -> Iterator[None]:
        """Have them in force for a block."""
        dtype = torch.get_default_dtype()
        torch.set_default_dtype(self.dtype)
        try:
            with self.device if self.device is not None else contextlib.nullcontext():
                yield
        finally:
            torch.set_default_dtype(dtype)


def _default_device() -> torch.device | None:
    """The device of the innermost ``with torch.device(...)``, if there is one."""
    for mode in reversed(_get_current_function_mode_stack()):
        device = getattr(mode, "device", None)
        if isinstance(device, torch.device):
            return device
    return None
