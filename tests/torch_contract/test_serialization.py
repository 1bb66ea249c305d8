"""Which of torch's functions a pickle inside an archive names."""

from __future__ import annotations

import io
import pickle
import pickletools
import warnings
import zipfile
from collections import OrderedDict
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from lateinit._torch.serialization import (
    REBUILD_PARAMETER,
    REBUILD_PARAMETER_WITH_STATE,
    REBUILD_TENSOR,
    REBUILD_TENSOR_WITH_ATTRIBUTES,
    REBUILD_TENSOR_WITH_DTYPE,
    REBUILDING,
    bytes_loaded,
    rebuild,
    rebuild_tensor,
    stored_by_dcp,
)

if TYPE_CHECKING:
    from pathlib import Path


def archived(saved: Any) -> io.BytesIO:
    archive = io.BytesIO()
    torch.save(saved, archive)
    archive.seek(0)
    return archive


def named_in(saved: Any) -> list[tuple[str, str]]:
    """The functions and classes that ``torch.save`` has the pickle of an object name, in order."""
    with zipfile.ZipFile(archived(saved)) as opened:
        (name,) = (name for name in opened.namelist() if name.endswith("/data.pkl"))
        pickled = opened.read(name)
    found = [arg for op, arg, _ in pickletools.genops(pickled) if op.name == "GLOBAL"]
    return [tuple(arg.split(" ")) for arg in found]


def test_the_names_are_those_of_functions() -> None:
    """torch/_utils.py: the functions that unpickling calls."""
    for name in (
        REBUILD_PARAMETER,
        REBUILD_PARAMETER_WITH_STATE,
        REBUILD_TENSOR,
        REBUILD_TENSOR_WITH_ATTRIBUTES,
        REBUILD_TENSOR_WITH_DTYPE,
    ):
        assert callable(rebuild(name))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
def test_a_tensor_is_rebuilt_from_a_storage_that_has_its_dtype(dtype: torch.dtype) -> None:
    """torch/_tensor.py: _reduce_ex_internal gives _rebuild_tensor_v2 for dtypes of old storages."""
    named = named_in(torch.ones(2).to(dtype))
    assert named[0] == REBUILD_TENSOR
    assert named[1][1].endswith("Storage")
    assert named[1] != ("torch.storage", "UntypedStorage")


@pytest.mark.parametrize("dtype", [torch.uint16, torch.uint64, torch.float8_e4m3fn])
def test_a_tensor_of_a_newer_dtype_is_rebuilt_from_bytes_and_the_dtype(dtype: torch.dtype) -> None:
    """torch/_tensor.py: _reduce_ex_internal gives _rebuild_tensor_v3 where no storage is typed."""
    named = named_in(torch.ones(2).to(dtype))
    assert named[:2] == [REBUILD_TENSOR_WITH_DTYPE, ("torch.storage", "UntypedStorage")]
    assert ("torch", str(dtype).removeprefix("torch.")) in named


def test_a_parameter_is_rebuilt_around_a_tensor() -> None:
    """torch/nn/parameter.py: __reduce_ex__ gives _rebuild_parameter and the data."""
    assert named_in(nn.Parameter(torch.ones(2)))[:2] == [REBUILD_PARAMETER, REBUILD_TENSOR]


def test_attributes_of_tensors_come_with_the_function_that_has_built_them() -> None:
    """torch/_tensor.py: __reduce_ex__, and torch/nn/parameter.py."""
    tensor, parameter = torch.ones(2), nn.Parameter(torch.ones(2))
    tensor.tag = parameter.tag = "marked"
    assert named_in(tensor)[:2] == [REBUILD_TENSOR_WITH_ATTRIBUTES, REBUILD_TENSOR]
    assert ("torch", "Tensor") in named_in(tensor)
    assert named_in(parameter)[:2] == [REBUILD_PARAMETER_WITH_STATE, REBUILD_TENSOR]
    data, state = torch.ones(2), {"tag": "marked"}
    built = rebuild(REBUILD_PARAMETER_WITH_STATE)(data, True, OrderedDict(), state)
    assert built.tag == "marked"
    assert rebuild(REBUILD_PARAMETER)(data, True, OrderedDict()).equal(built)


@pytest.mark.skipif(not dist.is_available(), reason="torch without torch.distributed")
def test_dcp_looks_for_a_block_where_its_record_says(tmp_path: Path) -> None:
    """torch/distributed/checkpoint/filesystem.py: read_data seeks to offset, and reads length."""
    import torch.distributed.checkpoint as dcp

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is no process group
        dcp.save({"a": torch.ones(3)}, checkpoint_id=tmp_path)
    (found,) = dcp.FileSystemReader(tmp_path).read_metadata().storage_data.values()
    assert found == stored_by_dcp(found.relative_path, found.offset, found.length)
    with (tmp_path / found.relative_path).open("rb") as file:
        file.seek(found.offset)
        block = torch.load(io.BytesIO(file.read(found.length)))
    assert block.equal(torch.ones(3))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.int64])
def test_a_tensor_that_is_loaded_is_rebuilt_by_one_function(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch/_utils.py: _rebuild_tensor_v2 and _rebuild_tensor_v3."""
    found = []

    def listening(storage: Any, *args: Any) -> torch.Tensor:
        found.append(bytes_loaded(storage))
        return rebuild_tensor(storage, *args)

    monkeypatch.setattr(*REBUILDING, listening)
    for data in (pickle.dumps(torch.ones(3).to(dtype)), archived(torch.ones(3).to(dtype))):
        loads = pickle.loads if isinstance(data, bytes) else torch.load
        assert torch.equal(loads(data), torch.ones(3).to(dtype))
    assert found == [3 if dtype is torch.uint8 else None] * 2


def test_a_state_that_is_unpickled_into_a_generator_is_read_from_memory() -> None:
    """torch/csrc/Generator.cpp: no mode hears of it, and an error in it is an internal one."""
    state = torch.Generator().get_state()
    with pytest.raises(SystemError, match="__setstate__"):
        torch.Generator().__setstate__((1, None, state.to("meta")))
