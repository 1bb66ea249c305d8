"""All ranks of the default process group: at the end of a phase they exchange their results.

For calls that every rank makes, with shards or without. ``ranks.py`` does the same for the ranks of
a mesh.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch.distributed as dist

from lateinit.errors import LateinitError, ShardingError, listing

# The most characters of an error that are sent to other ranks.
_LONGEST = 1000


def is_running() -> bool:
    """Whether there is a default process group."""
    return dist.is_available() and dist.is_initialized()


def told(error: Exception) -> str:
    """The text of an error that is sent to other ranks."""
    return f"{type(error).__name__}: {error}"[:_LONGEST]


def reason(error: Exception) -> str:
    """Why communication failed: the first line of an error of the process group."""
    return (str(error) or type(error).__name__).splitlines()[0]


@contextlib.contextmanager
def everyone(call: str, phase: str, group: Any = None) -> Iterator[None]:
    """Run a block as a phase of a call of all ranks.

    Args:
        call: the public function that was called, for messages.
        phase: the work of the block, for messages.
        group: a group of all ranks; by default the default group.

    Raises:
        ShardingError: another rank failed in the block, or did not answer.
    """
    try:
        yield
    except Exception as error:
        # A second error would hide the first.
        with contextlib.suppress(ShardingError):
            _say(told(error), call, phase, group)
        raise
    failed = _say("", call, phase, group)
    if failed:
        raise ShardingError(
            f"{call} failed, {phase}, {listing(failed)}. What is done stands: when that is mended, "
            "call it again on every rank"
        )


def _say(error: str, call: str, phase: str, group: Any) -> list[str]:
    """Send the error of this rank, and return the errors of all ranks."""
    if not is_running():
        return []
    said: list[Any] = [None] * dist.get_world_size()
    with answered(call, phase):
        dist.all_gather_object(said, error, group=group)
    return [f"on rank {rank}: {words}" for rank, words in enumerate(said) if words]


@contextlib.contextmanager
def answered(call: str, phase: str) -> Iterator[None]:
    """Raise errors of the process group as ``ShardingError``."""
    try:
        yield
    except LateinitError:
        raise
    except RuntimeError as error:
        raise ShardingError(
            f"{call}, {phase}: not all ranks answered. One of them has ended, or did not make the "
            f"same call ({reason(error)})"
        ) from error
