"""What a rank reads of a checkpoint: the bytes of its shards, into memory of its own."""

from __future__ import annotations

import itertools
import random
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_module, distribute_tensor

import lateinit
from lateinit._checkpoint.formats import data_file, open_checkpoint
from lateinit._checkpoint.formats.data_file import DataFile
from lateinit.errors import CorruptCheckpointError, MismatchError
from tests.sharding.alone import alone_as

State = dict[str, Tensor]
RANKS = 4
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def plain() -> State:
    torch.manual_seed(0)
    return {
        "matrix": torch.randn(30, 51),
        "half": torch.randn(7, 3, 65).bfloat16(),
        "odd": torch.randn(5),
        "scalar": torch.tensor(3.0),
        "empty": torch.randn(0, 4),
        "mask": torch.rand(9, 9) > 0.5,
        "double": torch.randn(40, 3, dtype=torch.float64),
        "complex": torch.randn(6, 5, dtype=torch.complex64),
    }


def permuted() -> State:
    whole = torch.randn(4, 40)
    return {
        "transposed": torch.randn(5, 7).t(),
        "permuted": torch.randn(4, 5, 6).permute(2, 0, 1),
        "columns": whole[:, 3:9],
        "expanded": torch.randn(4, 1).expand(4, 6),
    }


def as_safetensors(state: State, folder: Path) -> Path:
    save_file(state, folder / "model.safetensors")
    return folder / "model.safetensors"


def as_torch_zip(state: State, folder: Path) -> Path:
    torch.save(state, folder / "model.pt")
    return folder / "model.pt"


def as_old_pickle(state: State, folder: Path) -> Path:
    torch.save(state, folder / "old.pt", _use_new_zipfile_serialization=False)
    return folder / "old.pt"


def as_dcp(state: State, folder: Path) -> Path:
    dcp.save(state, checkpoint_id=folder / "dcp", no_dist=True)
    return folder / "dcp"


MAPPED = {"dcp": as_dcp, "safetensors": as_safetensors, "zip": as_torch_zip}
FORMATS = {**MAPPED, "old pickle": as_old_pickle}


@pytest.mark.parametrize(("run", "piece"), [(1, 1), (64, 512), (1 << 30, 256), (16 << 10, 4 << 20)])
@pytest.mark.parametrize("form", sorted(FORMATS))
def test_a_block_that_is_read_alone_is_that_block_of_the_tensor(
    form: str, run: int, piece: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data_file, "_RUN", run)
    monkeypatch.setattr(data_file, "_PIECE", piece)
    state = plain() | ({} if form == "safetensors" else permuted())
    reader, choose = open_checkpoint(FORMATS[form](state, tmp_path)), random.Random(0)
    for name, tensor in state.items():
        assert torch.equal(reader.read(name, alone=True), tensor), name
        for _ in range(6):
            starts = [choose.randint(0, size) for size in tensor.shape]
            sizes = [choose.randint(0, n - s) for n, s in zip(tensor.shape, starts, strict=True)]
            block = tensor[tuple(slice(s, s + n) for s, n in zip(starts, sizes, strict=True))]
            found = reader.read(name, starts, sizes, alone=True)
            assert found.dtype == tensor.dtype
            assert torch.equal(found, block), (name, starts, sizes)


@pytest.mark.parametrize("form", sorted(MAPPED))
def test_what_is_read_alone_is_no_window_on_the_file(form: str, tmp_path: Path) -> None:
    reader = open_checkpoint(MAPPED[form](plain(), tmp_path))
    reader.read("matrix", alone=True).zero_()
    assert torch.equal(reader.read("matrix", alone=True), plain()["matrix"])


class Net(nn.Module):
    """Matrices, small vectors, and a tied weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(256, 64 * RANKS)
        self.second = nn.Linear(64 * RANKS, 256, bias=False)
        self.tied = nn.Linear(64 * RANKS, 256, bias=False)
        self.tied.weight = self.second.weight


def cut(model: nn.Module, dim: int) -> nn.Module:
    mesh = init_device_mesh("cpu", (RANKS,))
    made: dict[nn.Parameter, nn.Parameter] = {}

    def shard(_: str, module: nn.Module, mesh: Any) -> None:
        for name, p in list(module._parameters.items()):
            if p is not None and p not in made:
                place = Shard(min(dim, p.dim() - 1))
                part = distribute_tensor(p, mesh, [place], src_data_rank=None)
                made[p] = nn.Parameter(part)
            if p is not None:
                module.register_parameter(name, made[p])

    return distribute_module(model, mesh, shard)


@pytest.mark.parametrize(("form", "dim"), list(itertools.product(sorted(MAPPED), (0, 1))))
def test_a_rank_reads_its_share_and_maps_nothing(
    form: str, dim: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Rows of columns are read alone from 16 KB on.
    monkeypatch.setattr(data_file, "_RUN", 64)
    eager = Net()
    state = {name: t.detach().clone() for name, t in eager.state_dict().items()}
    path, read = MAPPED[form](state, tmp_path), 0
    original = DataFile.read_bytes

    def counted(self: DataFile, start: int, into: memoryview) -> None:
        nonlocal read
        read += len(into)
        original(self, start, into)

    def refused(*_: Any) -> None:
        raise AssertionError("a rank maps a file")

    with alone_as(RANKS - 1, RANKS):
        late, right = cut(lateinit.deferred_init(Net), dim), cut(eager, dim)
        opened = open_checkpoint(path)
        monkeypatch.setattr(DataFile, "mapped", refused)
        monkeypatch.setattr(DataFile, "read_bytes", counted)
        for name, entry in opened.entries.items():
            opened.read(name, (0,) * len(entry.shape), (0,) * len(entry.shape), alone=True)
        read = 0
        lateinit.load_checkpoint(late, path, check=False)
        for (name, ours), theirs in zip(late.named_parameters(), right.parameters(), strict=True):
            assert torch.equal(ours.to_local(), theirs.to_local()), name
    # The tied tensor is stored twice, compared, and put twice; and DCP has a directory a tensor.
    stored = sum(t.nbytes for t in state.values()) + 2 * state["second.weight"].nbytes
    directories = 64 * 1024 if form == "dcp" else 0
    assert 0 < read <= stored / RANKS + directories


def test_a_rank_refuses_tied_tensors_that_differ_in_its_shard(tmp_path: Path) -> None:
    state = {name: t.detach().clone() for name, t in Net().state_dict().items()}
    state["tied.weight"][-1] += 1
    path = as_safetensors(state, tmp_path)
    with alone_as(RANKS - 1, RANKS):
        model = cut(lateinit.deferred_init(Net), 0)
        with pytest.raises(MismatchError, match="are one tensor in the model, but two"):
            lateinit.load_checkpoint(model, path, check=False)


def test_a_file_that_is_replaced_while_it_is_read_is_read_as_it_was(tmp_path: Path) -> None:
    path = as_safetensors(plain(), tmp_path)
    reader = open_checkpoint(path)
    other = tmp_path / "other"
    save_file({"matrix": torch.zeros(30, 51)}, other)
    other.replace(path)
    assert torch.equal(reader.read("matrix", alone=True), plain()["matrix"])


def test_a_file_that_is_truncated_while_it_is_read_is_refused(tmp_path: Path) -> None:
    path = as_safetensors(plain(), tmp_path)
    reader = open_checkpoint(path)
    with path.open("r+b") as file:
        file.truncate(600)
    with pytest.raises(CorruptCheckpointError, match="truncated since it was opened"):
        reader.read("matrix", alone=True)
