"""What ranks compare of the files that they load: headers and sizes, not where the files are."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn

import lateinit
from lateinit._checkpoint.formats import open_checkpoint

KINDS = ("dcp", "folder", "old.pt", "one.pt", "one.safetensors")


def written(path: Path, seed: int, rows: int = 5) -> Path:
    torch.manual_seed(seed)
    layer = nn.Linear(3, rows)
    if path.name == "dcp":
        dcp.save(layer.state_dict(), checkpoint_id=path, no_dist=True)
    elif path.name == "old.pt":
        torch.save(layer.state_dict(), path, _use_new_zipfile_serialization=False)
    elif path.suffix == ".pt":
        torch.save(layer.state_dict(), path)
    else:
        torch.manual_seed(seed)
        late = lateinit.deferred_init(nn.Linear, 3, rows)
        lateinit.save_checkpoint(late, path, max_shard_size=50)
    return path


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_a_copy_is_told_as_its_original_and_other_shapes_are_not(kind: str, tmp_path: Path) -> None:
    path = written(tmp_path / kind, seed=1)
    copy = tmp_path / f"copy{path.suffix}"
    (shutil.copytree if path.is_dir() else shutil.copy)(path, copy)
    told = open_checkpoint(path).described()
    assert open_checkpoint(copy).described() == told
    assert told.startswith("2 tensors in ")
    (tmp_path / "other").mkdir()
    other = open_checkpoint(written(tmp_path / "other" / kind, seed=1, rows=6))
    assert other.described() != told


@pytest.mark.parametrize("kind", ["folder", "one.pt", "one.safetensors"])
def test_other_values_are_told_where_headers_say_so(kind: str, tmp_path: Path) -> None:
    """A seed among the metadata of ``save_checkpoint``, the checksums of ``torch.save``."""
    (tmp_path / "other").mkdir()
    first = open_checkpoint(written(tmp_path / kind, seed=1))
    other = open_checkpoint(written(tmp_path / "other" / kind, seed=2))
    assert first.described() != other.described()
