"""Recordings that are discarded, and the settings that a later construction needs.

``aside`` runs trial constructions: they allocate nothing, and move no generator.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from lateinit._program import Program
from lateinit._recording import ProgramWriter, recording_block
from lateinit._torch import default_device_in_force, outside


@contextlib.contextmanager
def aside() -> Iterator[ProgramWriter]:
    """Record a block into a program that is discarded; no generator moves.

    Warnings are ignored: they are about trial sizes, or the final construction repeats them.
    """
    writer = ProgramWriter(Program())
    with outside(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            writer.generators.watch(torch.default_generator)
            with recording_block(writer):
                yield writer
            writer.generators.restore()
        except BaseException:
            writer.generators.restore()
            raise


@dataclass(frozen=True, slots=True)
class Settings:
    """The settings that a constructor reads, kept from its declaration until it runs."""

    dtype: torch.dtype
    device: torch.device | None

    @classmethod
    def now(cls) -> Settings:
        """The settings in force now."""
        return cls(torch.get_default_dtype(), default_device_in_force())

    @contextlib.contextmanager
    def in_force(self) -> Iterator[None]:
        """A block in which these settings are in force."""
        dtype = torch.get_default_dtype()
        torch.set_default_dtype(self.dtype)
        try:
            with self.device if self.device is not None else contextlib.nullcontext():
                yield
        finally:
            torch.set_default_dtype(dtype)
