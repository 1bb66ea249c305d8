"""``deferred()``, the block in which the construction of a model is recorded instead of run."""

from __future__ import annotations

import contextlib
import gc
import threading
import weakref
from collections.abc import Callable
from types import TracebackType
from typing import ParamSpec, TypeVar

import torch

from lateinit._log import log
from lateinit._program import Program
from lateinit._recording.recording import Recording, one_at_a_time
from lateinit._recording.writer import ProgramWriter, current
from lateinit._torch import (
    Caller,
    Noted,
    are_functions_disabled,
    caller,
    here,
    is_frame_of,
    is_of_legacy_type,
    is_on_stack,
    mend,
    noted,
)
from lateinit.errors import RecordingError

T = TypeVar("T")
P = ParamSpec("P")


class deferred(contextlib.AbstractContextManager[Program]):  # noqa: N801 - reads as a statement
    """A block in which models are built without memory, arithmetic or random draws.

    Every tensor that is made in the block is deferred: it has a shape, a dtype and a recorded
    construction, but no memory. When the block ends, the random generators are in the state that
    eager construction would have left. If the block raises, they are in the state that they had
    before it. An inner block is part of the outer one.

    ``with deferred() as program`` also gives the recorded construction, which can be printed.

    Args:
        advance_rng: False leaves the random generators in the state that they had before the
            block. Later random numbers then differ from those after eager construction.

    Raises:
        RecordingError: the construction did something that cannot be recorded faithfully.

    Example:
        >>> with lateinit.deferred():
        ...     layer = torch.nn.Linear(1_000_000, 1_000_000)  # 4 TB
        >>> lateinit.is_deferred(layer)
        True
    """

    def __init__(self, *, advance_rng: bool = True) -> None:
        self._advance = advance_rng
        self._depth = 0
        self._recording: Recording | None = None
        self._entered: Caller | None = None
        self._before: Noted | None = None

    def __enter__(self) -> Program:
        mend()
        outer, depth = current(), self._depth
        try:
            self._depth += 1
            return self._begin() if outer is None else outer.program
        except BaseException as error:
            self._depth = depth
            if outer is None:
                self.abandon(error.__traceback__)
            raise

    def _begin(self) -> Program:
        before = noted()
        if are_functions_disabled(before.functions):
            raise RecordingError(
                "torch functions are disabled in this thread (DisableTorchFunction), so that a "
                "block would not see the construction: leave that block of torch first"
            )
        self._entered, self._before = caller(2), before
        one_at_a_time.acquire()
        recording = self._recording = Recording(ProgramWriter(Program()), self._before)
        # From the start, even if no number is drawn: settle() must know where the block began.
        recording.writer.generators.watch(torch.default_generator)
        recording.begin()
        here.block = weakref.ref(self)
        return recording.writer.program

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        recording, before = self._recording, self._before
        try:
            # Only the outermost ``with`` of this object, outside any other block, has a recording.
            self._depth -= 1
            if self._depth == 0 and self._recording is not None:
                self._end(self._recording, error)
        except BaseException as failed:
            if recording is not None and self._depth == 0:
                # Even if only the return was interrupted: the caller of an interrupted method calls
                # it again.
                self._recording, self._before = recording, before
            self.abandon(failed.__traceback__)
            raise

    def _end(self, recording: Recording, error: BaseException | None) -> None:
        if error is not None and is_of_legacy_type(error):
            raise RecordingError(
                "a legacy tensor type, such as torch.FloatTensor, was called with a deferred "
                "tensor: call tensor.type(...) or tensor.detach() there instead"
            ) from error
        if error is not None and not isinstance(error, Exception):
            self.abandon(error.__traceback__)
            return
        recording.end()
        if error is None:
            recording.finish()
        if error is None and self._advance:
            recording.writer.settle()
        else:
            recording.writer.generators.restore()
        recording.rest()
        one_at_a_time.release()
        self._release()
        program = recording.writer.program
        done = "recorded" if error is None else "gave up after"
        log.info("%s %d ops on %d storages", done, len(program.ops), len(program.storages))

    def abandon(self, trace: TracebackType | None = None) -> None:
        """End the block at whatever line it was interrupted, as if it had not been entered.

        Args:
            trace: the traceback of the interrupt.
        """
        if self._before is not None:
            self._before.restore(trace)
        if self._recording is not None:
            self._recording.close()
            self._recording.writer.generators.restore()
            self._recording.rest()
        self._release()

    def _release(self) -> None:
        here.block = self._entered = None
        self._depth = 0
        # Last: if an interrupt comes before, `abandon` still has everything to put back.
        self._before = self._recording = None

    def is_abandoned(self) -> bool:
        """Whether no code will end this block: its ``__exit__`` was interrupted before it began.

        Then the frame that entered it is gone, and only the frames of its own methods refer to it,
        which the traceback of the interrupt keeps.
        """
        if self._entered is None or is_on_stack(self._entered):
            return False
        return all(is_frame_of(holder, __file__, mend) for holder in gc.get_referrers(self))

    def __del__(self) -> None:
        # Abandoned as above, and the traceback is gone. Only the thread that entered can end it.
        entered = getattr(self, "_entered", None)
        if entered is not None and entered.thread == threading.get_ident():
            self.abandon()


def deferred_init(make: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
    """Call ``make(*args, **kwargs)`` in a ``deferred()`` block.

    Args:
        make: a module class, or any other function that builds a model.
        *args: its positional arguments.
        **kwargs: its keyword arguments.

    Returns:
        The result of the call; its tensors are deferred.

    Raises:
        RecordingError: the construction did something that cannot be recorded faithfully.

    Example:
        >>> layer = lateinit.deferred_init(torch.nn.Linear, 4, 2, bias=False)
        >>> lateinit.materialize(layer).weight.shape
        torch.Size([2, 4])
    """
    block = deferred()
    try:
        with block:
            return make(*args, **kwargs)
    except BaseException as error:
        block.abandon(error.__traceback__)
        raise
