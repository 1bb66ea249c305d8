"""Contexts: out of every mode that is in force, and recordings that nobody keeps."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from lateinit._recording.block import recording_block
from lateinit._recording.recorder import Recorder
from lateinit._torch.modes import default_device_in_force, outside


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
            with recording_block(recorder):
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
        return cls(torch.get_default_dtype(), default_device_in_force())

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
