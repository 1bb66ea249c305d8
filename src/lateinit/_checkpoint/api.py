"""``save_checkpoint`` and ``load_checkpoint``: the public functions on checkpoints.

This module checks their arguments. ``save/save.py`` saves, and ``load/load.py`` loads.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from lateinit._checkpoint.load import Choice, Loaded, Rename, load_into
from lateinit._checkpoint.save import Asked, Saved, check_suffix, save_files, save_shards
from lateinit._recording import current
from lateinit._tensors import Devices, DTypes, Init, casting
from lateinit._torch import is_dtensor, is_out_of_memory, outside, restoring, unhurried
from lateinit._units import parse_bytes
from lateinit.errors import CheckpointError, DeferredTensorError, LateinitError, OutOfMemoryError


@restoring
def save_checkpoint(  # noqa: PLR0913 - options, all of them by keyword
    module: nn.Module | Mapping[str, Tensor],
    path: str | os.PathLike[str],
    *,
    max_shard_size: int | str = "5GB",
    dtype: DTypes | None = None,
    init: Init | None = None,
    force: bool = False,
    progress: bool = False,
    seed: int | None = None,
    resume: bool = False,
    format: Literal["dcp", "safetensors"] | None = None,  # noqa: A002 - as users say
    wait: bool = True,
) -> Saved:
    """Write the state dict of a module as safetensors, in the layout of the Hugging Face hub.

    Deferred tensors are computed, written and freed in turn, and stay deferred: memory peaks at one
    shard and the largest tensor, whatever the size of the model. Real tensors are written as they
    are. Tied tensors are written once. The global random state is neither read nor moved.

    The output appears whole or not at all: it is written beside its place, synced to disk, and
    renamed. A killed process leaves the earlier output as it was, and ``resume=True`` continues its
    work. If the call is interrupted (Ctrl-C), the same call in the same process continues it.

    If the module is sharded, each rank writes its shards, through ``torch.distributed.checkpoint``
    (DCP), and holds no others. Every rank of the default process group must make this call, with a
    path on a file system that all ranks share.

    Args:
        module: any module, deferred, real or in part; or a dict of such tensors by name.
        path: a folder to make, or one file if it ends in ``.safetensors``. In a folder, the files
            have the names that the model's library looks for.
        max_shard_size: the most bytes for a file in a folder, such as ``"5GB"``. A larger tensor
            gets a file of its own.
        dtype: cast floating-point tensors to this dtype, or to the dtypes of a map, as
            ``materialize`` does.
        init: initialisers for deferred tensors by name, as for ``materialize``.
        force: overwrite an existing checkpoint, or discard an unfinished one.
        progress: show a progress bar on stderr; for a sharded module, for this rank's writes.
        seed: as if ``torch.manual_seed(seed)`` had preceded the construction. By default the random
            state that really preceded it.
        resume: continue a save that was killed; the files are the same as without the kill. The
            shards of a sharded module are written again.
        format: ``"safetensors"``, or ``"dcp"`` for a folder of DCP, the default for a sharded
            module. In safetensors every rank writes its shards at their places in files of whole
            tensors.
        wait: if False, the shards are copied to the CPU, DCP writes them in the background, and
            the call returns. The output appears when all ranks have written; ``result()`` of the
            returned object waits for that.

    Returns:
        What was written: path, files, tensors, bytes, and the seed if it is known.

    Raises:
        OutputExistsError: there is an output, finished or not, and neither ``force`` nor
            ``resume`` was given.
        OutputError: there is no room or no permission.
        CheckpointError: the module holds a value that safetensors cannot, or the unfinished
            checkpoint to resume is of another model, seed, dtype or shard size, or ``path`` has the
            suffix of another format.
        NotRecordedError: a tensor is on ``meta`` and was never recorded.
        SeedError: the construction branched on a random value, and ``seed`` gives another one.
        OutOfMemoryError: memory ran out while a tensor was computed.
        ShardingError: the ranks would write shards of different models, or a rank failed or did not
            answer. The earlier output is as it was.
        TypeError: ``module`` is neither a module nor a dict.

    Example:
        >>> layer = lateinit.deferred_init(torch.nn.Linear, 4, 2)
        >>> lateinit.save_checkpoint(layer, tmp_path / "layer.safetensors").tensors
        2
        >>> lateinit.is_deferred(layer)
        True
        >>> weights = {name: p for name, p in layer.named_parameters() if name != "bias"}
        >>> lateinit.save_checkpoint(weights, tmp_path / "weights.safetensors").tensors
        1
    """
    if isinstance(module, Mapping):
        module = dict(module)
    elif not isinstance(module, nn.Module):
        raise TypeError(f"save_checkpoint takes a module or a dict of tensors, not {type(module)}")
    check_suffix(path)
    # Through symbolic links, so that a rename replaces the output and not a link to it.
    target = Path(os.path.realpath(path))
    one_file = target.suffix == ".safetensors"
    limit = parse_bytes(max_shard_size)
    if isinstance(dtype, torch.dtype) and not dtype.is_floating_point:
        raise CheckpointError(f"dtype={dtype} is no floating-point dtype")
    casts = casting(None, dtype)
    if format not in {None, "dcp", "safetensors"}:
        raise ValueError(f"format={format!r}: 'dcp' or 'safetensors' is meant")
    asked = Asked(casts, init, limit, force, seed, resume, format, wait, progress)
    if format == "dcp" or any(map(is_dtensor, _parameters(module))):
        if one_file:
            raise CheckpointError(f"{target}: shards are written into a folder; name one")
        return save_shards(module, target, asked)
    if not wait:
        raise CheckpointError("wait=False is for a module with shards, or with format='dcp'")
    return save_files(module, target, asked, one_file=one_file)


@restoring
@unhurried
def load_checkpoint(  # noqa: PLR0913 - options, all of them by keyword
    module: nn.Module,
    path: str | os.PathLike[str],
    *,
    strict: bool = True,
    device: Devices | None = None,
    dtype: DTypes | None = None,
    init: Init | None = None,
    offload_folder: str | os.PathLike[str] | None = None,
    progress: bool = False,
    check: bool = True,
    key: str | None = None,
    prefix: str | None = None,
    rename: Rename | None = None,
    source_rank: int | None = None,
) -> Loaded:
    """Give a module the values of a checkpoint, without initialising it first.

    The result is what loading into the eager twin gives. torch's own ``module.load_state_dict``
    decides which tensor goes where, so that hooks, overrides, versions and extra state count. If
    the module has any of these or is lazy, or the checkpoint does not fit directly, it runs twice:
    first as a dry run on ``meta``, which finds all problems before anything changes, and then for
    real, one tensor at a time. Hooks then run twice, and see the same values as with
    ``load_state_dict``. Parameters stay the same objects.

    A ``transformers`` model also accepts the names under which it is saved: tensors are renamed,
    joined and split as in ``from_pretrained``.

    On the CPU, a deferred tensor with the dtype of the file is not copied. It takes the file's
    memory, mapped privately: pages are read when they are touched, and training never writes to the
    file. While the model lives, the file must not be overwritten in place or truncated. Replacing
    it by a rename, as ``save_checkpoint`` does, is safe. Other tensors are allocated and copied
    into, one at a time.

    Deferred tensors that the checkpoint does not hold are materialised: non-persistent buffers
    always, others from their recorded construction if ``strict=False``. The global random state is
    neither read nor moved by this.

    Args:
        module: any module: deferred, lazy, real, or a mixture. Lazy modules take their sizes from
            the checkpoint. Real tensors are copied into.
        path: a ``.safetensors`` file, a folder of them with their index, a ``.pt``, ``.pth`` or
            ``.bin`` file of ``torch.save`` (read with ``weights_only=True``), or a folder of
            ``torch.distributed.checkpoint``.
        strict: whether module and checkpoint must have the same names, apart from those that a
            ``transformers`` model declares irrelevant. If False, they must still have one name in
            common.
        device: the device of deferred tensors, by default the device each was recorded for. Real
            tensors stay where they are. Or a map of names, as for ``materialize``.
        dtype: cast deferred floating-point parameters and buffers of the state dict to this dtype;
            by default each keeps its own. Or a map of names, as for ``materialize``.
        init: initialisers by name, as for ``materialize``, for deferred tensors that the checkpoint
            lacks.
        offload_folder: where ``device="disk"`` writes, as for ``materialize``, once all is loaded.
        progress: show a progress bar on stderr.
        check: for a sharded module, compare with the other ranks of its mesh, before any tensor
            changes, whether they load the same files into the same shards, and afterwards whether
            all have finished. Every rank must make this call. With False, or for a module without
            shards, there is no communication.
        key: where the module's state dict is in the checkpoint of a training run, such as
            ``"model"`` or ``"state_dict"``; keys inside of keys are joined by dots, and ``""`` is
            the outermost dict. By default it is found, if only one fits.
        prefix: the prefix of the names in that dict that the module's names lack, such as
            ``"module."``; names without it are left out. By default it is found too. The names that
            ``torch.compile`` and activation checkpointing add are ignored on both sides.
        rename: maps a name in that dict, after the prefix, to the module's name for it, or to None
            to leave it out: a function, or a dict of the names that change. Then no prefix is
            searched for.
        source_rank: the only rank that reads ``path``. It sends every other rank of the default
            process group the tensors that this rank loads, one at a time. Every rank must make this
            call, also ranks without shards. By default each rank reads for itself.

    Returns:
        What was loaded, initialised, computed and unexpected, with sizes; ``print`` it.

    Raises:
        PatternError: a pattern of ``device``, ``dtype`` or ``init`` matches nothing, or contradicts
            another one. Nothing has changed.
        DeviceError: this machine does not have the device.
        InitError: a value of ``init`` is no initialiser, or does not fit its tensor.
        MismatchError: names, shapes or dtypes do not fit. The message lists all problems; nothing
            has changed.
        CorruptCheckpointError: this is no checkpoint, or a part of it is missing, truncated,
            corrupt, outside its folder, or a pickle that could run code. Nothing has changed.
        NotRecordedError: a tensor is on ``meta`` and was never recorded.
        ShardingError: it is not known which part of the full tensor a local part is: load before
            sharding. Or another rank loads other files, failed, or did not answer within the
            timeout of the process group.
        ConstantChangedError: real data has changed since the construction read it, and a tensor
            that the checkpoint lacks is computed from it. Nothing has changed.
        CheckpointError: a hook fails, or needs values that do not exist; then nothing has changed.
            Or a hook behaved differently in the second run; the message says so, and the module has
            changed.
        DeferredTensorError: this was called inside a ``deferred()`` block.
        OutOfMemoryError: memory ran out. Tensors that were loaded stay so, and another call
            continues.
        TypeError: ``module`` is no module, or ``path`` no path; or ``key``, ``prefix`` or
            ``rename`` is of another type.

    Example:
        >>> _ = lateinit.save_checkpoint(torch.nn.Linear(4, 2), tmp_path / "saved.safetensors")
        >>> layer = lateinit.deferred_init(torch.nn.Linear, 4, 2)
        >>> report = lateinit.load_checkpoint(layer, tmp_path / "saved.safetensors")
        >>> [entry.name for entry in report.loaded], lateinit.is_deferred(layer)
        (['weight', 'bias'], False)
    """
    casts = casting(device, dtype)
    if not isinstance(module, nn.Module):
        raise TypeError(f"load_checkpoint takes a module, not {type(module)}")
    choice = Choice(key, prefix, rename)
    if source_rank is not None and type(source_rank) is not int:
        raise TypeError(f"source_rank: the number of a rank is meant, not {type(source_rank)}")
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
    with outside(), torch.set_grad_enabled(grad):  # hooks must see the caller's setting
        try:
            return load_into(
                module,
                Path(path),
                casts,
                init=init,
                offload_folder=offload_folder,
                strict=strict,
                progress=progress,
                check=check,
                choice=choice,
                source_rank=source_rank,
            )
        except (MemoryError, OSError, RuntimeError) as error:
            if isinstance(error, LateinitError) or not is_out_of_memory(error):
                raise
            raise OutOfMemoryError(
                f"out of memory while loading {path}; what was done before stands: free memory "
                "and call load_checkpoint() again, or load a part"
            ) from error


def _parameters(module: nn.Module | Mapping[str, Tensor]) -> Iterable[Tensor]:
    return module.parameters() if isinstance(module, nn.Module) else module.values()
