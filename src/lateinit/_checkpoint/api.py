"""Checkpoints: written of models that need not fit into memory, loaded into deferred ones."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from lateinit._checkpoint.load.load import Loaded, load_into
from lateinit._checkpoint.save.atomic_output import Stage, check_room, check_target, staged
from lateinit._checkpoint.save.manifest import Item, ShardFile, collect, divide
from lateinit._checkpoint.save.pipeline import write_shards
from lateinit._checkpoint.save.resume_digest import fingerprint
from lateinit._integrations.transformers_names import saved_config
from lateinit._materialize.materialize import check_seed
from lateinit._progress import Progress
from lateinit._recording.recorder import current
from lateinit._replay.streams import recorded_seed
from lateinit._tensors.realize import cast_to
from lateinit._torch.messages import is_out_of_memory
from lateinit._torch.modes import outside
from lateinit._units import format_bytes, parse_bytes
from lateinit._version import __version__
from lateinit.errors import DeferredTensorError, LateinitError, OutOfMemoryError

_INDEX = "model.safetensors.index.json"
_ROOM = 5 * 10**9  # bytes in memory at once while one file is written


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
        What was written: path, files, tensors, bytes, and the seed where it is known.

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
    shards = divide(items, None if one_file else limit, target.name if one_file else None)
    recorded, seed = _seeds(items, seed)
    metadata = _metadata(recorded if seed is None else seed)
    nbytes = sum(shard.nbytes for shard in shards)
    check_room(target, nbytes)
    request = fingerprint(shards, metadata, seed)
    with staged(target, request, resume=resume, force=force) as stage:
        with Progress("write", nbytes, shown=progress) as bar:
            room = _ROOM if one_file else limit
            write_shards(stage, shards, metadata, seed=seed, room=room, bar=bar)
        if not one_file:
            _describe(stage, module, shards)
        files = tuple(sorted(path.name for path in stage.files.iterdir()))
    return Saved(target, files, len(items), nbytes, recorded if seed is None else seed)


def load_checkpoint(
    module: nn.Module,
    path: str | os.PathLike[str],
    *,
    strict: bool = True,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    progress: bool = False,
) -> Loaded:
    """Give a module the values of a checkpoint, without initialising what it holds.

    What goes where is decided by torch's own ``module.load_state_dict``, so that hooks, overrides,
    versions and extra state count, and the result is what loading into the eager twin gives. It is
    run twice: as a rehearsal on ``meta``, from which all problems are known before anything
    changes, and then for real, one tensor at a time. Hooks, which run twice then, see the values
    that they always see. Parameters stay the objects they are.

    Of a ``transformers`` model the names count under which it is saved, too: what they are
    renamed, joined and split to is what ``from_pretrained`` makes of them.

    On the CPU, a deferred tensor that has the dtype of the file is not copied: it takes the file's
    memory, mapped privately, so that pages are read when they are touched and training never
    writes to the file. The file must not be overwritten in place or cut off while the model lives;
    to replace it by renaming another one, as ``save_checkpoint`` does, is safe.

    Deferred tensors that the checkpoint does not hold are materialised: non-persistent buffers
    always, others as their recorded construction says if ``strict=False``. The global random state
    is neither read nor moved by this.

    Args:
        module: any module, deferred, lazy, real, or a mixture. Real tensors are copied into.
        path: a ``.safetensors`` file, a folder of them with their index, a ``.pt``, ``.pth`` or
            ``.bin`` file of ``torch.save`` (read with ``weights_only=True``), or a folder of
            ``torch.distributed.checkpoint``.
        strict: whether both sides must have the same names, but for those that a ``transformers``
            model says do not matter. If not, there must still be one that both have.
        device: where to put deferred tensors; by default the device each was recorded for. Real
            tensors stay where they are.
        dtype: cast deferred floating-point tensors to this; by default each keeps its own.
        progress: show a progress bar on stderr.

    Returns:
        What was loaded, initialised, computed, and unexpected, with sizes; ``print`` it.

    Raises:
        MismatchError: names, shapes or dtypes do not fit. All of them are told, and nothing has
            changed.
        CorruptCheckpointError: this is no checkpoint, or a part of it is missing, truncated,
            corrupt, outside of its folder, or a pickle that could run code. Nothing has changed.
        NotRecordedError: a tensor is on ``meta`` and was never recorded.
        ShardingError: a tensor is sharded already: load before sharding.
        ConstantChangedError: real data that the construction read has changed since, and what the
            checkpoint lacks is computed from them. Nothing has changed.
        CheckpointError: a hook fails, or wants values that cannot be had. Nothing has changed.
            Or hooks did something else when they were run again, and the message says so: what was
            done stands.
        OutOfMemoryError: memory ran out; what was done stands, and calling again continues.

    Example:
        >>> _ = lateinit.save_checkpoint(torch.nn.Linear(4, 2), tmp_path / "saved.safetensors")
        >>> layer = lateinit.deferred_init(torch.nn.Linear, 4, 2)
        >>> report = lateinit.load_checkpoint(layer, tmp_path / "saved.safetensors")
        >>> [entry.name for entry in report.loaded], lateinit.is_deferred(layer)
        (['weight', 'bias'], False)
    """
    cast = cast_to(device, dtype)
    if not isinstance(module, nn.Module):
        raise TypeError(f"load_checkpoint takes a module, not {type(module)}")
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(
            f"path: a file or a folder is meant, not {type(path)}; a state dict is loaded by "
            "module.load_state_dict()"
        )
    if current() is not None:
        raise DeferredTensorError(
            "load_checkpoint was called in a `with lateinit.deferred():` block: call it after it"
        )
    grad = torch.is_grad_enabled()
    with outside(), torch.set_grad_enabled(grad):  # as hooks always see it
        try:
            return load_into(module, Path(path), cast, strict=strict, progress=progress)
        except (MemoryError, OSError, RuntimeError) as error:
            if isinstance(error, LateinitError) or not is_out_of_memory(error):
                raise
            raise OutOfMemoryError(
                f"out of memory while loading {path}; what was done before stands: free memory "
                "and call load_checkpoint() again, or load a part"
            ) from error


def _seeds(items: Iterable[Item], seed: int | None) -> tuple[int | None, int | None]:
    """The seed that the recorded construction started from, and the one to replace it."""
    programs = {id(item.place[1]): item.place[1] for item in items if item.place is not None}
    recorded = {recorded_seed(program) for program in programs.values()}
    known = recorded.pop() if len(recorded) == 1 else None
    if seed is not None and seed == known:
        return known, None
    for program in programs.values():
        check_seed(program, seed)
    return known, seed


def _metadata(seed: int | None) -> dict[str, str]:
    """What every file says of itself; ``format`` is what ``transformers`` looks for."""
    known = {} if seed is None else {"seed": str(seed)}
    return {"format": "pt", "lateinit": __version__, "torch": torch.__version__, **known}


def _describe(stage: Stage, module: nn.Module, shards: list[ShardFile]) -> None:
    """Write the index of several shards, and the configuration of a ``transformers`` model."""
    if len(shards) > 1:
        places = {item.entry.name: shard.file for shard in shards for item in shard.items}
        index = {
            "metadata": {"total_size": sum(shard.nbytes for shard in shards)},
            "weight_map": dict(sorted(places.items())),
        }
        stage.write_text(_INDEX, json.dumps(index, indent=2) + "\n")
    config = getattr(module, "config", None)
    if hasattr(config, "to_json_string"):
        floats = (i.entry.dtype for s in shards for i in s.items if i.entry.dtype.is_floating_point)
        stage.write_text("config.json", saved_config(config, module, next(floats, None)))
