"""Look at Python frames: which function is calling, from which library and line.

Frames are counted from the function that calls a helper of this file, here the *asking* function (a
property, a hook), so it must call the helper directly. No other file looks at frames; ``callers``
interprets the frames of torch.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import traceback
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from types import CodeType, FrameType, TracebackType
from typing import Any, NamedTuple

import torch

_LIBRARIES = (f"{Path(torch.__file__).parent}{os.sep}", f"{Path(__file__).parents[1]}{os.sep}")
_NO_FILES = ("<frozen", "<eval_with_key")  # code of importlib and of torch/fx/graph_module.py
# contextlib.py: the methods of a context manager that is written as a generator.
_ENTERING = {
    contextlib._GeneratorContextManager.__enter__.__code__,
    contextlib._GeneratorContextManager.__exit__.__code__,
}


def frame_above(above: int) -> FrameType:
    """The frame that is ``above`` calls above the function that called the caller of this one."""
    return sys._getframe(above + 2)


def upwards(frame: FrameType | None) -> Iterator[FrameType]:
    """A frame and those that called it, innermost first."""
    while frame is not None:
        yield frame
        frame = frame.f_back


def calling_modules() -> Iterator[str]:
    """The names of the modules whose functions are running, innermost first."""
    return (str(frame.f_globals.get("__name__")) for frame in upwards(frame_above(0)))


def is_running(code: CodeType, within: int) -> bool:
    """Whether ``code`` runs in one of the ``within`` frames above the asking function's caller."""
    return any(frame.f_code is code for frame in islice(upwards(frame_above(2)), within))


class Caller(NamedTuple):
    """Identifies a frame and its thread without keeping the frame alive."""

    frame: int
    code: CodeType
    thread: int


def caller(above: int) -> Caller:
    """The frame that is ``above`` calls above the asking function."""
    found = frame_above(above)
    return Caller(id(found), found.f_code, threading.get_ident())


def is_on_stack(caller: Caller) -> bool:
    """Whether a frame of this thread is still running."""
    return any(id(f) == caller.frame and f.f_code is caller.code for f in upwards(frame_above(0)))


def is_frame_of(value: Any, file: str, function: Any) -> bool:
    """Whether a value is a frame of a function in a file, or of one function."""
    code = getattr(value, "f_code", None)
    return code is not None and (code.co_filename == file or code is function.__code__)


def close_contexts(trace: TracebackType | None) -> None:
    """Close the generators that were left suspended when an interrupt hit ``contextlib`` itself.

    A generator that is left suspended runs its ``finally`` when the traceback is dropped, and would
    put modes back at any later time (torch/overrides.py: _pop_mode_temporarily).
    """
    for frame in reversed([frame for frame, _ in traceback.walk_tb(trace)]):
        if frame.f_code in _ENTERING:
            with contextlib.suppress(Exception):
                frame.f_locals["self"].gen.close()


CallPath = tuple[tuple[CodeType, int], ...]


def stack_depth() -> int:
    """The number of frames from the asking function to the outermost one."""
    return sum(1 for _ in upwards(frame_above(0)))


def call_path(base: int) -> CallPath:
    """The lines outside torch and lateinit through which the asking function was called.

    Args:
        base: how many of the outermost frames to leave out.
    """
    frames = list(upwards(frame_above(0)))
    own = frames[: len(frames) - base]
    return tuple((f.f_code, f.f_lasti) for f in own if not is_library(f.f_code.co_filename))


def is_library(file: str) -> bool:
    """Whether a file belongs to torch or lateinit."""
    return file.startswith(_LIBRARIES)


def innermost_foreign_line() -> str | None:
    """``file.py:12 in forward``: the innermost running line outside torch and lateinit."""
    for frame in upwards(frame_above(0)):
        code = frame.f_code
        if not is_library(code.co_filename) and not code.co_filename.startswith(_NO_FILES):
            return f"{code.co_filename}:{frame.f_lineno} in {code.co_name}"
    return None
