"""Checkpoints. ``save_checkpoint`` writes a model that need not fit into memory."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lateinit import __version__
from lateinit.errors import CheckpointError
from lateinit.fingerprint import fingerprint
from lateinit.materialize import check_seed
from lateinit.program import Program
from lateinit.progress import Progress
from lateinit.replay import Replay, Storages, without_modes
from lateinit.safetensors_file import Writer
from lateinit.shards import Item, Shard, collect, divide
from lateinit.staging import Stage, check_room, check_target, staged
from lateinit.streams import state_of
from lateinit.units import format_bytes, parse_bytes

_BATCH = 1 << 26  # bytes that are computed together, where single tensors are smaller
_INDEX = "model.safetensors.index.json"


@dataclass(frozen=True, slots=True)
class Saved:
    """What ``save_checkpoint`` wrote."""

    path: Path
    files: tuple[str, ...]
    tensors: int
    nbytes: int
    seed: int | None

    def __str__(self) -> str:
        files = f"{len(self.files)} file{'s' * (len(self.files) != 1)}"
        return f"{self.path}: {self.tensors} tensors, {format_bytes(self.nbytes)}, in {files}"


def save_checkpoint(
    module: nn.Module,
    path: str | os.PathLike[str],
    *,
    max_shard_size: int | str = "5GB",
    dtype: torch.dtype | None = None,
    force: bool = False,
    progress: bool = False,
    seed: int | None = None,
    resume: bool = False,
) -> Saved:
    """Write the state dict of a module as safetensors, in the layout of the Hugging Face hub.

    A deferred tensor is computed, written and freed, one after another: the module stays deferred,
    and memory peaks at one shard and the largest tensor, whatever the model's size. Real tensors
    are written as they are. Tied tensors are written once. The random state is not moved.

    The output appears whole or not at all: it grows beside its place, is synced, and renamed. A
    killed process leaves what was there before, and ``resume=True`` continues its work.

    Args:
        module: any module, deferred, real or in part.
        path: a folder to make, or one file if it ends in ``.safetensors``.
        max_shard_size: bytes to a file in a folder, such as ``"5GB"``; a larger tensor has its own.
        dtype: cast floating-point tensors to this.
        force: overwrite a checkpoint that is there, or discard an unfinished one.
        progress: show a progress bar on stderr.
        seed: as if ``torch.manual_seed(seed)`` had preceded the construction; by default the
            random state that really did.
        resume: continue a save that was killed; the files are those that it would have written.

    Returns:
        What was written: path, files, tensors, bytes, seed.

    Raises:
        OutputExistsError: there is an output, finished or not, and no ``force`` or ``resume``.
        OutputError: there is no room or no permission.
        CheckpointError: the module holds what safetensors cannot, or ``resume`` finds the
            unfinished checkpoint of another model.
        NotRecordedError: a tensor is on ``meta`` and was never recorded.
        SeedError: the construction branched on a random value, and ``seed`` gives another one.

    Example:
        >>> layer = lateinit.deferred_init(torch.nn.Linear, 4, 2)
        >>> lateinit.save_checkpoint(layer, tmp_path / "layer.safetensors").tensors
        2
        >>> lateinit.is_deferred(layer)
        True
    """
    target = Path(os.path.realpath(path))
    one_file = target.suffix == ".safetensors"
    limit = parse_bytes(max_shard_size)
    check_target(target, force=force)
    items = collect(module, dtype)
    recorded = _recorded_seed(items)
    if seed is not None and seed == recorded:
        seed = None
    shards = divide(items, None if one_file else limit, target.name if one_file else None)
    save = _Save(shards, _metadata(recorded if seed is None else seed), limit, seed)
    save.check()
    check_room(target, sum(shard.nbytes for shard in shards))
    request = fingerprint(shards, save.metadata, seed)
    with staged(target, request, resume=resume, force=force) as stage:
        with Progress("write", sum(shard.nbytes for shard in shards), shown=progress) as bar:
            save.run(stage, bar)
        if not one_file:
            save.describe(stage, module)
        files = tuple(sorted(path.name for path in stage.files.iterdir()))
    return Saved(
        target,
        files,
        len(items),
        sum(shard.nbytes for shard in shards),
        recorded if seed is None else seed,
    )
