"""DCP folders whose blocks are not those of a mesh."""

from __future__ import annotations

import itertools
import pickle
import re
from typing import TYPE_CHECKING

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint import FileSystemWriter
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

import lateinit
from lateinit._checkpoint.formats import dcp as reader
from lateinit.errors import CorruptCheckpointError

if TYPE_CHECKING:
    from pathlib import Path


class _InBlocks(DefaultSavePlanner):
    """Writes one tensor in blocks, which need not be those of a mesh."""

    def __init__(self, full: torch.Tensor, boxes: list[tuple[slice, ...]]) -> None:
        super().__init__()
        self._full, self._boxes = full, boxes

    def create_local_plan(self) -> SavePlan:
        items = []
        for box in self._boxes:
            offsets, sizes = torch.Size(s.start for s in box), self._full[box].shape
            about = TensorWriteData(
                chunk=ChunkStorageMetadata(offsets=offsets, sizes=sizes),
                properties=TensorProperties(dtype=self._full.dtype),
                size=self._full.shape,
            )
            items.append(
                WriteItem(MetadataIndex("weight", offsets), WriteItemType.SHARD, tensor_data=about)
            )
        self.plan = SavePlan(items, planner_data={"weight": ("weight",)})
        return self.plan

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor:
        box = next(b for b in self._boxes if tuple(s.start for s in b) == write_item.index.offset)
        return self._full[box].clone()


CUTS = {
    "columns": [(slice(0, 6), slice(0, 1)), (slice(0, 6), slice(1, 3)), (slice(0, 6), slice(3, 4))],
    "grid": [(slice(a, a + 3), slice(b, b + 2)) for a in (0, 3) for b in (0, 2)],
    "rows": [(slice(a, a + 2), slice(0, 4)) for a in (0, 2, 4)],
    "uneven": [
        (slice(0, 2), slice(0, 4)),
        (slice(2, 6), slice(0, 1)),
        (slice(2, 3), slice(1, 4)),
        (slice(3, 6), slice(1, 4)),
    ],
}


@pytest.mark.parametrize("cuts", sorted(CUTS))
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_dcp_blocks_that_leave_elements_out_are_refused_however_many_they_are(
    cuts: str, tmp_path: Path
) -> None:
    """A block that stands twice, in the place of another one: as many elements as the tensor."""
    full, boxes = torch.rand(6, 4), CUTS[cuts]
    dcp.save({}, storage_writer=FileSystemWriter(tmp_path), planner=_InBlocks(full, boxes))
    described = (tmp_path / ".metadata").read_bytes()
    for gone, twice in itertools.product(range(len(boxes)), repeat=2):
        metadata = pickle.loads(described)
        chunks = metadata.state_dict_metadata["weight"].chunks
        chunks[gone] = chunks[twice]
        if gone != twice:
            chunks *= 2
        (tmp_path / ".metadata").write_bytes(pickle.dumps(metadata))
        layer = lateinit.deferred_init(nn.Linear, 4, 6, bias=False)
        if gone == twice:
            lateinit.load_checkpoint(layer, tmp_path)
            assert torch.equal(layer.weight, full)
            continue
        first = tuple(s.start for s in boxes[gone])
        with pytest.raises(
            CorruptCheckpointError, match=f"no block with the element {re.escape(str(first))}"
        ):
            lateinit.load_checkpoint(layer, tmp_path)
        assert lateinit.is_deferred(layer)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_blocks_in_countless_places_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planner = _InBlocks(torch.rand(6, 4), CUTS["grid"])
    dcp.save({}, storage_writer=FileSystemWriter(tmp_path), planner=planner)
    monkeypatch.setattr(reader, "_MOST_CELLS", 3)
    with pytest.raises(CorruptCheckpointError, match="'weight' is in 4 blocks that form no grid"):
        lateinit.load_checkpoint(nn.Linear(4, 6, bias=False), tmp_path)
