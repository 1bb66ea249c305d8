"""Save the shards of a model: each rank writes its own, by ``torch.distributed.checkpoint`` (DCP).

Deferred shards are computed one after another as DCP asks for them, and stay deferred. DCP writes
into the hidden folder of a ``Stage``, on a file system that all ranks share; when all ranks have
written, its coordinator describes the whole and puts the folder in its place.

Imported when it is needed: DCP is slow to import.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
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

from lateinit._checkpoint.formats import block_of
from lateinit._checkpoint.save.atomic_output import Stage, check_target, returned
from lateinit._checkpoint.save.manifest import Item
from lateinit._checkpoint.save.pipeline import TensorComputer
from lateinit._distributed import Part, answered, everyone, is_running, parts_of, whole_part
from lateinit._tensors import held
from lateinit._torch import is_dtensor, without_modes
from lateinit.errors import CheckpointError, LateinitError, OutputError

_CALL = "save_checkpoint()"
FORMATS = ("dcp", "safetensors")


class ShardedSave:
    """One save by all ranks.

    Args:
        target: the folder to make.
        items: what this rank holds, by name.
        files: for safetensors, the number of the file that each tensor belongs in; None for DCP.
        seed: replaces the recorded random state; None keeps it.
        stem: what the names of safetensors files begin with.
    """

    def __init__(
        self,
        target: Path,
        items: Mapping[str, Item],
        files: Mapping[str, int] | None,
        seed: int | None,
        stem: str,
    ) -> None:
        self._stem = stem
        self.stage = Stage(target)
        self._items = items
        self._files = files
        self._computer = TensorComputer(seed)
        self._parts = {name: _parts(name, item) for name, item in items.items()}
        if files is not None:
            self._check_safetensors()

    def _check_safetensors(self) -> None:
        if importlib.util.find_spec("safetensors") is None:
            raise CheckpointError(
                "format='safetensors': torch writes shards by the library safetensors, which is "
                "not installed: install it, or use format='dcp'"
            )
        # HuggingFaceStorageWriter keeps one block of a tensor in each file of a rank.
        several = [name for name, parts in self._parts.items() if len(parts) > 1]
        if several:
            raise CheckpointError(
                f"{several[0]!r} is sharded so that a rank holds several blocks of it, which torch "
                "cannot write as safetensors: use format='dcp'"
            )

    def open(self, texts: Mapping[str, str], *, force: bool, discard: bool) -> None:
        """Make the hidden folder; a collective operation.

        Args:
            texts: small files of the output, by name.
            force: overwrite an existing checkpoint.
            discard: discard what a killed save left.
        """
        stage = self.stage
        with everyone(_CALL, "opening the output"):
            if is_first():
                check_target(stage.target, force=force)
                stage.open("", resume=False, force=discard)
                for name, text in texts.items():
                    stage.write_text(name, text)
        with everyone(_CALL, "looking for the output"):
            if not stage.files.is_dir():
                raise OutputError(
                    None, f"{stage.files} is not there on this rank: choose a path that all share"
                )

    def run(self) -> None:
        """Write, and return when the output is in its place."""
        phase = "writing shards"
        with (
            everyone(_CALL, phase),
            answered(_CALL, phase),
            without_modes(),
            warnings.catch_warnings(),
        ):
            # That there is no process group, which is no reason to warn.
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            try:
                with without_modes():
                    save({}, storage_writer=self._writer(), planner=self._planner({}))
            except CheckpointException as error:
                raise self._failed(error) from error

    def start(self, done: Callable[[], Any]) -> Future[Any]:
        """Copy the shards, and write them in the background; the result is that of ``done``."""
        copies = {name: self._local(name).detach().cpu().clone() for name in self._parts}
        # Its collectives must not come between those of the training.
        group = dist.new_group(backend="gloo")
        result: Future[Any] = Future()

        def finished(future: Any) -> None:
            error = future.exception()
            if error is not None:
                self.close()
                result.set_exception(self._failed(error))
            else:
                result.set_result(done())
            dist.destroy_process_group(group)

        writing: Any = async_save(
            {},
            storage_writer=self._writer(),
            planner=self._planner(copies),
            process_group=group,
        )
        writing.add_done_callback(finished)
        return result

    def close(self) -> None:
        """Remove the hidden folder of a save that failed."""
        if is_first():
            self.stage.discard()
            self.stage.release()

    def _failed(self, error: BaseException) -> BaseException:
        """An error of DCP in words that say what to do next."""
        if isinstance(error, LateinitError):
            return error
        told = str(error)
        if isinstance(error, CheckpointException):
            found = sorted(error.failures.items())
            told = "; ".join(f"on rank {rank}: {failure}" for rank, (failure, _) in found)
        return CheckpointError(
            f"{_CALL} failed, writing shards, {told}. {self.stage.target} is as it was: when that "
            "is mended, save again on every rank"
        )

    def _writer(self) -> Any:
        if self._files is None:
            return _DcpWriter(self.stage)
        return _SafetensorsWriter(self.stage, dict(self._files), self._stem)

    def _planner(self, copies: Mapping[str, Tensor]) -> Any:
        read = copies.__getitem__ if copies else self._local
        return _Planner(self._items, self._parts, read)

    def _local(self, name: str) -> Tensor:
        """What this rank holds of a tensor, in the dtype that is written."""
        item = self._items[name]
        with without_modes():
            (found,) = self._computer.of([item])
            return held(found).detach().to(item.entry.dtype)


class _Planner(DefaultSavePlanner):
    """Says which blocks a rank writes, and reads each when it is written.

    torch's own plan takes the local part of a ``DTensor`` for one block, wherever it lies.
    """

    def __init__(
        self,
        items: Mapping[str, Item],
        parts: Mapping[str, Sequence[Part]],
        read: Callable[[str], Tensor],
    ) -> None:
        super().__init__()
        self._items = items
        self._blocks = {
            MetadataIndex(name, torch.Size(part.full.start)): part
            for name, found in parts.items()
            for part in found
        }
        self._read = read

    def create_local_plan(self) -> SavePlan:
        items = [
            WriteItem(
                index=index,
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(
                    chunk=ChunkStorageMetadata(
                        offsets=torch.Size(part.full.start), sizes=torch.Size(part.full.size)
                    ),
                    properties=TensorProperties(dtype=self._items[index.fqn].entry.dtype),
                    size=torch.Size(self._items[index.fqn].entry.shape),
                ),
            )
            for index, part in self._blocks.items()
        ]
        self.plan = SavePlan(items, planner_data={name: (name,) for name in self._items})
        return self.plan

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        index = MetadataIndex(write_item.index.fqn, write_item.index.offset)
        with without_modes():
            block = block_of(self._read(index.fqn), *self._blocks[index].local).contiguous()
            whole = block.untyped_storage().nbytes() == block.nbytes
            return block if whole else block.clone()  # a file would hold the whole storage


class _Publishing:
    """A storage writer that puts its folder in its place when all ranks have written."""

    output: Stage

    def finish(self, metadata: Metadata, results: list[list[Any]]) -> None:
        super().finish(metadata, results)  # type: ignore[misc]
        self.joined()
        self.output.publish()
        returned(self.output.target, None)
        self.output.release()

    def joined(self) -> None:
        """Tidy up what torch has written."""


class _DcpWriter(_Publishing, FileSystemWriter):
    def __init__(self, stage: Stage) -> None:
        super().__init__(stage.files)
        self.output = stage


class _SafetensorsWriter(_Publishing, HuggingFaceStorageWriter):
    """Each rank writes its shards; the first one joins them into whole tensors."""

    def __init__(self, stage: Stage, files: dict[str, int], stem: str) -> None:
        super().__init__(str(stage.files), files, save_distributed=True, enable_consolidation=True)
        self.output = stage
        self._stem = stem

    def joined(self) -> None:
        folder = self.output.files
        shutil.rmtree(folder / "sharded", ignore_errors=True)
        # torch calls the files `model-00001-of-00003.safetensors` whatever the model
        # (torch/distributed/checkpoint/_hf_utils.py).
        if self._stem != "model":
            path = folder / "model.safetensors.index.json"
            index = json.loads(path.read_text())
            index["weight_map"] = {n: self._named(f) for n, f in index["weight_map"].items()}
            path.write_text(json.dumps(index, indent=2) + "\n")
            for file in folder.glob("model[-.]*safetensors*"):
                file.rename(folder / self._named(file.name))

    def _named(self, file: str) -> str:
        return self._stem + file.removeprefix("model")


def is_first() -> bool:
    """Whether this rank does what one rank has to do."""
    return not is_running() or dist.get_rank() == 0


def _parts(name: str, item: Item) -> list[Part]:
    """The blocks of a tensor that this rank holds."""
    # Of a tensor without elements no rank holds any.
    if not is_dtensor(item.tensor) or not torch.Size(item.entry.shape).numel():
        return [whole_part(item.entry.shape)]
    return parts_of(item.tensor, name)
