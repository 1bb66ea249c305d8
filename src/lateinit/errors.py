"""The exceptions that lateinit raises, and helpers for their messages.

Every exception is a ``LateinitError`` and also one of Python's own, given in parentheses.

    LateinitError
     +-- RecordingError        (RuntimeError)             the construction cannot be recorded
     +-- DeferredTensorError   (RuntimeError)             a deferred tensor was used for its values
     +-- NotRecordedError      (RuntimeError)             a meta tensor that was never recorded
     +-- ConstantChangedError  (RuntimeError)             real data that a program reads has changed
     +-- SeedError             (ValueError)               another seed would build another model
     +-- PatternError          (ValueError)               a pattern matches nothing, or two disagree
     +-- InitError             (ValueError)               an initialiser of `init=` does not fit
     +-- DeviceError           (RuntimeError)             `device=` names a device that is missing
     +-- MaterializeError      (RuntimeError)             a recorded op failed when it was replayed
     +-- ShardingError         (RuntimeError)             shards cannot be computed, or do not fit
     +-- OutOfMemoryError      (MemoryError)              materialising ran out of memory
     +-- SpecError             (ValueError)               a model specification names no model
     +-- OutputExistsError     (FileExistsError)          an output would be overwritten
     +-- OutputError           (OSError)                  an output cannot be written
     +-- CheckpointError       (ValueError)               a model cannot be saved, or cannot load
     |    +-- MismatchError         (ValueError, RuntimeError) a checkpoint does not fit the model
     |    +-- CorruptCheckpointError (ValueError)         a file is no complete, safe checkpoint
     +-- ShapeError            (ValueError, RuntimeError) a shape disagrees with a known one
     +-- RuleError             (TypeError)                a rule does not fit its class
     +-- UninitializedError    (RuntimeError, ValueError) a placeholder was used as a tensor
     +-- UnreachedError        (RuntimeError)             the forward never called some lazy modules
     +-- NeedsValuesError      (RuntimeError)             the forward depends on values, not shapes
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class LateinitError(Exception):
    """The root of every exception that lateinit raises."""


class RecordingError(LateinitError, RuntimeError):
    """The construction did something that cannot be recorded faithfully."""


class DeferredTensorError(LateinitError, RuntimeError):
    """A deferred tensor was read, written or computed with before it was materialised."""


class NotRecordedError(LateinitError, RuntimeError):
    """A tensor is on ``meta`` and its construction was never recorded."""


class ConstantChangedError(LateinitError, RuntimeError):
    """Real data that a recorded op reads was changed after it was recorded."""


class SeedError(LateinitError, ValueError):
    """The construction depended on random values, so another seed builds another model."""


class PatternError(LateinitError, ValueError):
    """A pattern matches no tensor, or two patterns contradict each other on one tensor."""


class InitError(LateinitError, ValueError):
    """A value of ``init=`` is no initialiser, or it does not fit the tensor."""


class DeviceError(LateinitError, RuntimeError):
    """``device=`` names a device that this machine does not have."""


class MaterializeError(LateinitError, RuntimeError):
    """A recorded op failed when it was replayed."""


class ShardingError(LateinitError, RuntimeError):
    """A shard cannot be computed on its own, or the ranks would fill shards of different models."""


class OutOfMemoryError(LateinitError, MemoryError):
    """Memory ran out while materialising. Finished tensors stay, and the call can be repeated."""


class SpecError(LateinitError, ValueError):
    """A model specification that names no model."""


class OutputExistsError(LateinitError, FileExistsError):
    """An output exists already and would be overwritten."""


class OutputError(LateinitError, OSError):
    """An output cannot be written: no room, no permission, no such place."""

    def __str__(self) -> str:
        # OSError would put the number of the error and the file name around the message.
        return self.strerror or super().__str__()


class CheckpointError(LateinitError, ValueError):
    """A model that a checkpoint cannot hold, or that fails while it loads one."""


class MismatchError(CheckpointError, RuntimeError):
    """A checkpoint whose names, shapes or dtypes are not those of the model."""


class CorruptCheckpointError(CheckpointError):
    """A file that is no checkpoint, or a truncated or corrupt one, or one that could run code."""


class ShapeError(LateinitError, ValueError, RuntimeError):
    """The shape of an input or a checkpoint disagrees with a known shape."""


class RuleError(LateinitError, TypeError):
    """A rule names no argument of its class, or its class cannot be constructed with it."""


class UninitializedError(LateinitError, RuntimeError, ValueError):
    """A lazy tensor, whose shape is not known yet, was used as a tensor."""


class UnreachedError(LateinitError, RuntimeError):
    """A forward pass ended without calling some lazy modules."""


class NeedsValuesError(LateinitError, RuntimeError):
    """A forward pass needs the values of a tensor, and only its shape is known."""


def listing(names: Iterable[str], limit: int = 8) -> str:
    """``a, b, c and 4 more``: names for an error message."""
    every = list(names)
    shown = ", ".join(every[:limit])
    return f"{shown} and {len(every) - limit} more" if len(every) > limit else shown


def candidates(name: str, names: Iterable[str]) -> str:
    """The names nearest to an unknown name, or else the first few, for an error message."""
    every = sorted(set(names))
    near = difflib.get_close_matches(name, every, n=5, cutoff=0.4)
    return listing(near or every)
