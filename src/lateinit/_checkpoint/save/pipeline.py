"""Compute tensors and write them to files, without holding many of them in memory.

One thread computes (with the threads of ``_materialize.scheduler``) while another writes.
``write_shards`` does all of it; ``TensorComputer`` also serves the comparison of a checkpoint with
a seed.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from typing import BinaryIO

from torch import Tensor

from lateinit._checkpoint.save.atomic_output import Stage
from lateinit._checkpoint.save.manifest import Item, ShardFile
from lateinit._checkpoint.save.safetensors_writer import SafetensorsWriter
from lateinit._materialize import execute
from lateinit._program import Program, plan_storages
from lateinit._progress import Progress
from lateinit._replay import Computed, execution_of
from lateinit._torch import is_out_of_memory, without_modes
from lateinit._workers import Workers
from lateinit.errors import OutOfMemoryError, listing

# Bytes of small tensors that are computed together (32 MiB). Bounds the memory of a batch, unless a
# single storage is larger.
_BATCH = 1 << 25


def write_shards(
    stage: Stage,
    shards: Iterable[ShardFile],
    metadata: dict[str, str],
    *,
    seed: int | None,
    room: int,
    bar: Progress,
) -> None:
    """Compute and write shards, except those that an earlier process has finished.

    Args:
        stage: the folder in which the output grows.
        shards: the files and their tensors.
        metadata: the metadata of every file.
        seed: replaces the recorded random state; None keeps it.
        room: the most bytes in memory while tensors are computed and others are still written.
        bar: advances as bytes are written.
    """
    values = TensorComputer(seed)
    thread = Workers(1)
    try:
        with contextlib.ExitStack() as files, thread:
            pipe = Pipe(thread, room)
            for shard in shards:
                # The digest of a resumed save does not cover the values of real tensors: files that
                # hold one are written again.
                real = any(item.deferred is None for item in shard.items)
                if shard.file in stage.finished and not real:
                    bar.advance(shard.nbytes)
                    continue
                file = files.enter_context((stage.files / shard.file).open("wb"))
                tied = {alias: item.entry.name for item in shard.items for alias in item.aliases}
                writer = SafetensorsWriter(
                    file, [item.entry for item in shard.items], tied | metadata
                )
                for batch in batches(shard.items):
                    nbytes = sum(_working_bytes(batch))
                    pipe.make_room(nbytes)
                    pipe.put(_writing(writer, file, values.of(batch), bar), nbytes)
                pipe.put(_finishing(writer, file, stage, shard.file), 0)
            pipe.wait()
    except BaseException:
        thread.shutdown()  # again if it was interrupted: nothing may be written from now on
        raise


def batches(items: Iterable[Item]) -> Iterator[list[Item]]:
    """Divide items into batches that are computed together: of few bytes, or of one storage."""
    batch: list[Item] = []
    for item in items:
        # The bytes of a storage count once, so that items on one storage stay in one batch.
        if batch and sum(_working_bytes([*batch, item])) > max(_BATCH, sum(_working_bytes(batch))):
            yield batch
            batch = []
        batch.append(item)
    if batch:
        yield batch


class TensorComputer:
    """Computes the values of deferred tensors, which stay deferred; keeps none of them."""

    def __init__(self, seed: int | None) -> None:
        self._seed = seed

    def of(self, items: list[Item]) -> list[Tensor]:
        """Real tensors with the values of some items.

        Raises:
            OutOfMemoryError: memory ran out.
        """
        wanted: dict[Program, dict[int, None]] = {}
        for item in items:
            if item.deferred is not None and item.deferred.slot.real is None:
                wanted.setdefault(item.deferred.program, {})[item.deferred.ref.storage] = None
        try:
            found = {key: self._run(key, storages) for key, storages in wanted.items()}
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            names = listing(item.entry.name for item in items)
            raise OutOfMemoryError(f"out of memory while computing {names}: free some") from error
        return [_real(item, found) for item in items]

    def _run(self, program: Program, storages: Iterable[int]) -> dict[int, Computed]:
        found: dict[int, Computed] = {}
        with execution_of(program, self._seed).session() as session:
            for _, run in execute(session, plan_storages(program, storages)):
                found |= run()
        return found


def _real(item: Item, found: dict[Program, dict[int, Computed]]) -> Tensor:
    deferred = item.deferred
    if deferred is None:
        return item.tensor.detach()
    real = deferred.real()
    if real is not None:
        return real
    with without_modes():
        return deferred.ref.on(found[deferred.program][deferred.ref.storage].storage)


def _working_bytes(items: Iterable[Item]) -> Iterable[int]:
    """The bytes of each storage that must be computed for some items."""
    storages: dict[tuple[Program, int], int] = {}
    for item in items:
        if item.deferred is not None:
            where = item.deferred.program, item.deferred.ref.storage
            storages[where] = item.deferred.storage.nbytes
    return storages.values()


def _writing(
    writer: SafetensorsWriter, file: BinaryIO, tensors: list[Tensor], bar: Progress
) -> Callable[[], None]:
    def write() -> None:
        # Each tensor is freed as soon as it is written.
        tensors.reverse()
        with without_modes():
            while tensors:
                bar.advance(writer.write(tensors.pop()))
        to_disk(file)

    return write


def to_disk(file: BinaryIO) -> None:
    """Have the system start writing now, instead of when memory is full or at the sync."""
    file.flush()
    if hasattr(os, "posix_fadvise"):
        # On Linux POSIX_FADV_DONTNEED starts writing dirty pages, and drops clean pages from the
        # cache. It is only advice: a system may ignore it.
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _finishing(
    writer: SafetensorsWriter, file: BinaryIO, stage: Stage, name: str
) -> Callable[[], None]:
    def finish() -> None:
        checksum = writer.finish()
        file.flush()
        os.fsync(file.fileno())
        file.close()
        stage.finish(name, checksum)

    return finish


class Pipe:
    """A thread that writes while the next tensors are computed; at most one call is pending."""

    def __init__(self, thread: Workers, room: int) -> None:
        self._thread = thread
        self._room = room
        self._held = 0
        self._last: Future[None] | None = None

    def make_room(self, nbytes: int) -> None:
        """Wait for the pending write, if ``nbytes`` more bytes would exceed ``room``."""
        if self._held + nbytes > self._room:
            self.wait()

    def put(self, call: Callable[[], None], nbytes: int) -> None:
        """Queue ``call`` for the writing thread; it holds ``nbytes`` until it has finished."""
        self.wait()
        self._last, self._held = self._thread.submit(call), nbytes

    def wait(self) -> None:
        """Wait until everything is written; raises the error of the write."""
        last, self._last, self._held = self._last, None, 0
        if last is not None:
            last.result()
