"""Save the shards of a model: each rank writes its own, by ``torch.distributed.checkpoint`` (DCP).

DCP decides which rank writes which block; ``shard_writers.py`` computes and writes them one after
another, and deferred tensors stay deferred. All ranks write into the hidden folder of a ``Stage``,
on a file system that they share; when all have written, DCP's coordinator describes the whole
output and puts the folder in its place.

Imported on first use, since DCP is slow to import.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import (
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.state_dict_saver import async_save, save

from lateinit._checkpoint.save.atomic_output import Stage, check_room, check_target
from lateinit._checkpoint.save.manifest import Item
from lateinit._checkpoint.save.shard_writers import (
    Blocks,
    DcpWriter,
    WholeFilesWriter,
)
from lateinit._checkpoint.save.whole_files import WholeFiles
from lateinit._distributed import Arguments, answered, every_rank, is_running
from lateinit._torch import without_modes
from lateinit.errors import CheckpointError, OutputError

_CALL = "save_checkpoint()"
_PHASE = "writing shards"


class ShardedSave:
    """One save by all ranks.

    Args:
        target: the folder to make.
        items: the tensors or shards of this rank, by name.
        files: the files of whole tensors to make, for safetensors; None for DCP.
        seed: replaces the recorded random state; None keeps it.
        shown: whether to show a progress bar.
    """

    def __init__(
        self,
        target: Path,
        items: Mapping[str, Item],
        files: WholeFiles | None,
        seed: int | None,
        *,
        shown: bool,
    ) -> None:
        self.stage = Stage(target)
        self._files = files
        self._blocks = Blocks(items, seed)
        self._shown = shown

    def open(
        self, texts: Mapping[str, str], nbytes: int, said: str, *, force: bool, discard: bool
    ) -> None:
        """Make the hidden folder; a collective operation.

        Args:
            texts: small files of the output, by name.
            nbytes: the bytes that all ranks will write.
            said: the arguments that must be the same on all ranks, in words.
            force: overwrite an existing checkpoint.
            discard: discard the files that a killed save left.
        """
        stage = self.stage
        ranks = every_rank(_CALL)
        with ranks.together("comparing arguments") as phase:
            phase.compared = Arguments(said)
        with ranks.together("opening the output"):
            if is_first():
                check_target(stage.target, force=force)
                check_room(stage.target, nbytes)
                stage.open("", resume=False, force=discard)
                for name, text in texts.items():
                    stage.write_text(name, text)
                if self._files is not None:
                    self._files.make(stage.files)
        with ranks.together("looking for the output"):
            if not stage.files.is_dir():
                raise OutputError(
                    None, f"{stage.files} is not there on this rank: choose a path that all share"
                )
            if self._files is not None:
                self._files.check(stage.files)

    def run(self) -> None:
        """Write, and return when the output is in its place."""
        whole = every_rank(_CALL).together(_PHASE)
        with whole, self._told(), without_modes(), warnings.catch_warnings():
            # DCP warns if there is no process group, which is a valid use here.
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            save({}, storage_writer=self._writer(), planner=_Planner(self._blocks))

    def start(self, done: Callable[[], Any]) -> Future[Any]:
        """Copy the shards, and write them in the background; the future gets ``done()``."""
        with without_modes():
            self._blocks.copy()
        # A group of its own, so that its collectives do not mix with those of the training.
        group = dist.new_group(backend="gloo")
        result: Future[Any] = Future()

        def finished(future: Any) -> None:
            try:
                try:
                    with self._told():
                        future.result()
                finally:
                    # Before the result is set: a thread that waits for it may then destroy all
                    # groups, and a group that two threads destroy at once aborts the process.
                    dist.destroy_process_group(group)
                found = done()
            except BaseException as error:  # noqa: BLE001 - it is the result
                self.close()
                result.set_exception(error)
            else:
                result.set_result(found)

        writing: Any = async_save(
            {},
            storage_writer=self._writer(),
            planner=_Planner(self._blocks),
            process_group=group,
        )
        writing.add_done_callback(finished)
        return result

    def close(self) -> None:
        """Remove the hidden folder of a save that failed."""
        if is_first():
            self.stage.discard()
            self.stage.release()

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        """Reword errors of DCP, with the next step."""
        try:
            with answered(_CALL, _PHASE):
                yield
        except CheckpointException as error:
            found = sorted(error.failures.items())
            told = "; ".join(f"on rank {rank}: {failure}" for rank, (failure, _) in found)
            raise CheckpointError(
                f"{_CALL} failed, {_PHASE}, {told}. {self.stage.target} is as it was: when that "
                "is mended, save again on every rank"
            ) from error

    def _writer(self) -> DcpWriter:
        if self._files is None:
            return DcpWriter(self.stage, self._blocks, shown=self._shown)
        return WholeFilesWriter(self.stage, self._blocks, self._files, shown=self._shown)


class _Planner(DefaultSavePlanner):
    """Lists the blocks that a rank holds.

    torch's own plan treats the local part of a ``DTensor`` as one block, even if it is several.
    """

    def __init__(self, blocks: Blocks) -> None:
        super().__init__()
        self._blocks = blocks

    def create_local_plan(self) -> SavePlan:
        items = self._blocks.items
        found = [
            WriteItem(
                index=MetadataIndex(name, torch.Size(part.full.start)),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(
                    chunk=ChunkStorageMetadata(
                        offsets=torch.Size(part.full.start), sizes=torch.Size(part.full.size)
                    ),
                    properties=TensorProperties(dtype=items[name].entry.dtype),
                    size=torch.Size(items[name].entry.shape),
                ),
            )
            for name, parts in self._blocks.parts.items()
            for part in parts
        ]
        self.plan = SavePlan(found, planner_data={name: (name,) for name in items})
        return self.plan


def is_first() -> bool:
    """Whether this is the rank that does the work for which one rank is needed."""
    return not is_running() or dist.get_rank() == 0
