"""Write the blocks of a rank: the part of ``torch.distributed.checkpoint`` that touches files.

DCP's own writers hold all shards of a file until it is closed (torch 2.13,
torch/distributed/checkpoint/filesystem.py: ``tensor_dict`` in ``_write_files_from_queue``), and a
rank has one file. Here each block is freed when it is written.

Imported on first use, since DCP is slow to import.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, BinaryIO

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.storage import WriteResult

from lateinit._checkpoint.formats import block_of
from lateinit._checkpoint.save.atomic_output import Stage, returned
from lateinit._checkpoint.save.manifest import Item
from lateinit._checkpoint.save.pipeline import TensorComputer, batches, to_disk
from lateinit._checkpoint.save.whole_files import WholeFiles, put_block
from lateinit._distributed import Box, Part, is_running, parts_of, whole_part
from lateinit._progress import Progress
from lateinit._tensors import held
from lateinit._torch import is_dtensor, stored_by_dcp, without_modes


class Blocks:
    """The blocks of tensors that this rank holds, computed in turn; none of them is kept.

    Args:
        items: the tensors or shards of this rank, by name.
        seed: replaces the recorded random state; None keeps it.
    """

    def __init__(self, items: Mapping[str, Item], seed: int | None) -> None:
        self.items = items
        self.parts = {name: _parts(name, item) for name, item in items.items()}
        self._computer = TensorComputer(seed)
        self._copies: dict[str, Tensor] = {}

    def copy(self) -> None:
        """Copy the present values to the CPU; all later writes use the copies."""
        held_here = self._items_of(name for name, parts in self.parts.items() if parts)
        self._copies = {
            item.entry.name: local.cpu().clone() for item, local in self._locals(held_here)
        }

    def of(self, wanted: Iterable[WriteItem]) -> Iterator[tuple[WriteItem, Tensor]]:
        """Blocks with their values, each on the CPU and on a storage of its own."""
        due: dict[str, list[WriteItem]] = {}
        for write in wanted:
            due.setdefault(self.items[write.index.fqn].entry.name, []).append(write)
        for item, local in self._locals(self._items_of(due)):
            for write in due[item.entry.name]:
                yield write, self._block(write, item.entry.dtype, local)

    def _block(self, write: WriteItem, dtype: torch.dtype, local: Tensor) -> Tensor:
        box = _box(write)
        if 0 in box.size:  # a block without elements
            return torch.empty(box.size, dtype=dtype, device="cpu")
        (place,) = (part.local for part in self.parts[write.index.fqn] if part.full == box)
        block = block_of(local, *place).to("cpu", dtype).contiguous()
        # DCP writes the whole storage of a tensor.
        alone = block.untyped_storage().nbytes() == block.nbytes
        return block if alone else block.clone()

    def _items_of(self, names: Iterable[str]) -> list[Item]:
        """The items of some names, tied ones once."""
        return list({item.entry.name: item for item in map(self.items.__getitem__, names)}.values())

    def _locals(self, items: Iterable[Item]) -> Iterator[tuple[Item, Tensor]]:
        """The local parts of some tensors."""
        for batch in batches(items):
            if self._copies:
                values = [self._copies[item.entry.name] for item in batch]
            else:
                values = self._computer.of(batch)
            for item in reversed(batch):
                yield item, held(values.pop()).detach()  # freed before the next one is computed


class DcpWriter(FileSystemWriter):
    """Writes one file for each rank, and publishes the folder when all have written.

    Args:
        stage: the hidden folder of the output.
        blocks: the blocks of this rank.
        shown: whether to show a progress bar.
    """

    def __init__(self, stage: Stage, blocks: Blocks, *, shown: bool) -> None:
        super().__init__(stage.files)
        self._stage = stage
        self._blocks = blocks
        self._shown = shown

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Any:
        total = sum(map(_nbytes, plan.items))
        written: Any = torch.futures.Future()
        with without_modes(), Progress("write", total, shown=self._shown) as bar:
            written.set_result(self.write(plan.items, bar))
        return written

    def write(self, items: Iterable[WriteItem], bar: Progress) -> list[WriteResult]:
        """Write some blocks; returns the position of each."""
        name = f"__{dist.get_rank() if is_running() else 0}_0.distcp"
        found = []
        with (self._stage.files / name).open("wb") as file:
            for item, block in self._blocks.of(items):
                start = file.tell()
                _save(block, file)
                place = stored_by_dcp(name, start, file.tell() - start)
                found.append(WriteResult(item.index, block.nbytes, place))
                bar.advance(block.nbytes)
                to_disk(file)
            os.fsync(file.fileno())
        return found

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Describe the whole output and put it in its place; called on one rank."""
        self.describe(metadata, results)
        self._stage.publish()
        returned(self._stage.target, None)
        self._stage.release()

    def describe(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Write the file with the position of each block."""
        super().finish(metadata, results)


class WholeFilesWriter(DcpWriter):
    """Writes the blocks into files of whole tensors, each at its place.

    In torch's own ``HuggingFaceStorageWriter`` one rank joins the files of all ranks. That rank
    holds whole tensors, refuses integers, and leaves tensors without dims zero (torch 2.13,
    torch/distributed/checkpoint/_consolidate_hf_safetensors.py).
    """

    def __init__(self, stage: Stage, blocks: Blocks, files: WholeFiles, *, shown: bool) -> None:
        super().__init__(stage, blocks, shown=shown)
        self._files = files

    def write(self, items: Iterable[WriteItem], bar: Progress) -> list[WriteResult]:
        found, opened = [], {}
        with contextlib.ExitStack() as stack:
            for item, block in self._blocks.of(items):
                place = self._files.places[item.index.fqn]
                if place.file not in opened:
                    path = self._stage.files / place.file
                    opened[place.file] = stack.enter_context(path.open("r+b"))
                put_block(opened[place.file], place, _box(item), block)
                found.append(WriteResult(item.index, block.nbytes, None))
                bar.advance(block.nbytes)
                to_disk(opened[place.file])
            for file in opened.values():
                os.fsync(file.fileno())
        return found

    def describe(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Nothing to write: the headers of the files already have the position of each tensor."""


def _save(block: Tensor, file: BinaryIO) -> None:
    try:
        torch.save(block, file)
    except RuntimeError as error:
        # torch/serialization.py also closes the archive after a failed write, which raises another
        # error.
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise


def _box(item: WriteItem) -> Box:
    """The place of a block in the full tensor."""
    about = item.tensor_data
    assert about is not None
    return Box(tuple(about.chunk.offsets), tuple(about.chunk.sizes))


def _nbytes(item: WriteItem) -> int:
    about = item.tensor_data
    assert about is not None
    return about.chunk.sizes.numel() * about.properties.dtype.itemsize


def _parts(name: str, item: Item) -> list[Part]:
    """The blocks of a tensor that this rank holds."""
    # No rank holds a part of a tensor without elements.
    if not is_dtensor(item.tensor) or not torch.Size(item.entry.shape).numel():
        return [whole_part(item.entry.shape)]
    return parts_of(item.tensor, name)
