"""One process that takes itself for one of many; nothing is sent."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

if TYPE_CHECKING:
    from collections.abc import Iterator


@contextlib.contextmanager
def alone_as(rank: int, ranks: int) -> Iterator[None]:
    """A process that takes itself for one of many."""
    dist.init_process_group("fake", rank=rank, world_size=ranks, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()
