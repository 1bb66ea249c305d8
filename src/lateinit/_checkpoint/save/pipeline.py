"""Computing tensors and writing them to files, without ever holding many of them."""

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
from lateinit._materialize.scheduler import execute
from lateinit._program.plan import plan_storages
from lateinit._progress import Progress
from lateinit._replay.replay import Replay, Storages
from lateinit._torch.messages import is_out_of_memory
from lateinit._torch.modes import without_modes
from lateinit._workers import Workers
from lateinit.errors import OutOfMemoryError, listing

_BATCH = 1 << 25  # bytes that are computed together, where single tensors are smaller


def write_shards(
    stage: Stage,
    shards: Iterable[ShardFile],
    metadata: dict[str, str],
    *,
    seed: int | None,
    room: int,
    bar: Progress,
) -> None:
    """Compute and write shards, but for those that an earlier process has finished.

    While some tensors are written the next ones are computed, if both take at most ``room`` bytes.
    """
    values = TensorComputer(seed)
    with contextlib.ExitStack() as files, Workers(1) as thread:
        pipe = Pipe(thread, room)
        for shard in shards:
            real = any(item.place is None for item in shard.items)
            if shard.file in stage.finished and not real:
                bar.advance(shard.nbytes)
                continue
            file = files.enter_context((stage.files / shard.file).open("wb"))
            tied = {alias: item.entry.name for item in shard.items for alias in item.aliases}
            writer = SafetensorsWriter(file, [item.entry for item in shard.items], tied | metadata)
            for batch in batches(shard.items):
                nbytes = sum(_working_bytes(batch))
                pipe.make_room(nbytes)
                pipe.put(_writing(writer, file, values.of(batch), bar), nbytes)
            pipe.put(_finishing(writer, file, stage, shard.file), 0)
        pipe.wait()


def batches(items: Iterable[Item]) -> Iterator[list[Item]]:
    """Runs of tensors that are computed together: few bytes, or one storage."""
    batch: list[Item] = []
    for item in items:
        if batch and sum(_working_bytes([*batch, item])) > max(_BATCH, sum(_working_bytes(batch))):
            yield batch
            batch = []
        batch.append(item)
    if batch:
        yield batch


class TensorComputer:
    """Gives tensors their values, and keeps nothing of them."""

    def __init__(self, seed: int | None) -> None:
        self._seed = seed
        self._replays: dict[int, Replay] = {}

    def of(self, items: list[Item]) -> list[Tensor]:
        """The real tensors of some items; those that are deferred stay deferred."""
        wanted: dict[int, dict[int, None]] = {}
        for item in items:
            if item.place is not None and item.place[0].real is None:
                _, program, ref = item.place
                self._replays.setdefault(id(program), Replay(program, self._seed))
                wanted.setdefault(id(program), {})[ref.storage] = None
        try:
            found = {key: self._run(key, storages) for key, storages in wanted.items()}
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            names = listing(item.entry.name for item in items)
            raise OutOfMemoryError(f"out of memory while computing {names}: free some") from error
        return [_real(item, found) for item in items]

    def _run(self, program: int, storages: Iterable[int]) -> Storages:
        replay = self._replays[program]
        found: Storages = {}
        for _, run in execute(replay, plan_storages(replay.program, storages)):
            found |= run()
        return found


def _real(item: Item, found: dict[int, Storages]) -> Tensor:
    if item.place is None:
        return item.tensor.detach()
    slot, program, ref = item.place
    storage = slot.real
    if storage is None:
        storage = found[id(program)][ref.storage]
    with without_modes():
        return ref.on(storage)


def _working_bytes(items: Iterable[Item]) -> Iterable[int]:
    """The bytes of the storages that are computed for some items."""
    storages: dict[tuple[int, int], int] = {}
    for item in items:
        if item.place is not None:
            _, program, ref = item.place
            storages[id(program), ref.storage] = program.storages[ref.storage].nbytes
    return storages.values()


def _writing(
    writer: SafetensorsWriter, file: BinaryIO, tensors: list[Tensor], bar: Progress
) -> Callable[[], None]:
    def write() -> None:
        tensors.reverse()
        with without_modes():
            while tensors:
                bar.advance(writer.write(tensors.pop()))
        _to_disk(file)

    return write


def _to_disk(file: BinaryIO) -> None:
    """Have the system begin to write, rather than wait for memory to fill or for the sync."""
    file.flush()
    if hasattr(os, "posix_fadvise"):
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
    """A thread that writes while the next tensors are computed; one call waits at most."""

    def __init__(self, thread: Workers, room: int) -> None:
        self._thread = thread
        self._room = room
        self._held = 0
        self._last: Future[None] | None = None

    def make_room(self, nbytes: int) -> None:
        """Wait until this many bytes more may be held."""
        if self._held + nbytes > self._room:
            self.wait()

    def put(self, call: Callable[[], None], nbytes: int) -> None:
        """Have something written, that holds this many bytes until it is."""
        self.wait()
        self._last, self._held = self._thread.submit(call), nbytes

    def wait(self) -> None:
        """Wait until everything is written; raises what writing raised."""
        last, self._last, self._held = self._last, None, 0
        if last is not None:
            last.result()
