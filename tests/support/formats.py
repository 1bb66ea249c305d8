"""State dicts written in every format that is read, each by the library that it belongs to."""

from __future__ import annotations

import json
import warnings
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

State = dict[str, Any]


def plain(state: State) -> State:
    """Each tensor in memory of its own, as safetensors wants it; what is no tensor left out."""
    return {
        name: value.detach().clone(memory_format=torch.contiguous_format).resolve_conj()
        for name, value in state.items()
        if isinstance(value, torch.Tensor)
    }


def one_file(state: State, folder: Path) -> Path:
    path = folder / "weights.safetensors"
    save_file(plain(state), path)
    return path


def shards(state: State, folder: Path) -> Path:
    return sharded(state, folder / "shards", "model", "safetensors", save_file)


def bin_shards(state: State, folder: Path) -> Path:
    return sharded(state, folder / "bins", "pytorch_model", "bin", torch.save)


def sharded(
    state: State, folder: Path, stem: str, suffix: str, write: Callable[[State, Path], Any]
) -> Path:
    folder.mkdir()
    every, half = list(plain(state).items()), (len(state) + 1) // 2
    places = {}
    for number, part in enumerate((every[:half], every[half:]), 1):
        file = f"{stem}-{number:05}-of-00002.{suffix}"
        write(dict(part), folder / file)
        places |= {name: file for name, _ in part}
    index = {"metadata": {}, "weight_map": places}
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps(index))
    return folder


def torch_file(state: State, folder: Path) -> Path:
    path = folder / "weights.pt"
    torch.save(state, path)
    return path


def old_torch_file(state: State, folder: Path) -> Path:
    path = folder / "weights.pth"
    torch.save(state, path, _use_new_zipfile_serialization=False)
    return path


def dcp_folder(state: State, folder: Path) -> Path:
    path = folder / "dcp"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is no process group
        dcp.save(dict(state), checkpoint_id=path, no_dist=True)
    return path


FORMATS: dict[str, Callable[[State, Path], Path]] = {
    "safetensors": one_file,
    "shards": shards,
    "pt": torch_file,
    "old pt": old_torch_file,
    "bin shards": bin_shards,
    "dcp": dcp_folder,
}
SAFETENSORS = ("safetensors", "shards")
