"""Digest of everything that determines a checkpoint's bytes.

It decides whether an interrupted save may be resumed.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from lateinit._checkpoint.save.manifest import ShardFile
from lateinit._program import Program
from lateinit._replay import costs_of, needed_for
from lateinit._torch import as_bytes


def fingerprint(shards: Iterable[ShardFile], metadata: dict[str, str], seed: int | None) -> str:
    """The digest that identifies the contents of the files, without computing them.

    Real tensors count by name, dtype and shape only. Files that hold one are therefore written
    again when a save is resumed.

    Args:
        shards: the files and their tensors.
        metadata: the metadata of every file, the versions of lateinit and torch included.
        seed: replaces the recorded random state; None keeps it.
    """
    digest = hashlib.sha256()
    for part in _parts(shards, metadata, seed):
        digest.update(part)
    return digest.hexdigest()


def _parts(
    shards: Iterable[ShardFile], metadata: dict[str, str], seed: int | None
) -> Iterator[bytes | memoryview]:
    programs: dict[Program, set[int]] = {}
    yield repr((sorted(metadata.items()), seed)).encode()
    for shard in shards:
        for item in shard.items:
            ref = item.deferred and item.deferred.ref
            yield repr((shard.file, item.entry, item.aliases, ref)).encode()
            if item.deferred is not None:
                programs.setdefault(item.deferred.program, set()).add(item.deferred.ref.storage)
    for program, storages in programs.items():
        yield from _program_parts(program, storages, seed)


def _program_parts(
    program: Program, storages: set[int], seed: int | None
) -> Iterator[bytes | memoryview]:
    # Only needed ops, since the others may have been dropped (``Program.keep``).
    needed = [program.ops[number] for number in sorted(needed_for(program, storages))]
    for op in needed:
        yield repr((op, program.ambients[op.ambient])).encode()
    for stream, costs in zip(program.streams, costs_of(program), strict=True):
        # The recorded state of a root stream does not matter if a seed replaces it.
        replaced = stream.root and seed is not None
        yield repr((stream.device, costs, None if replaced else stream.start)).encode()
    yield repr(program.holes).encode()
    for number in sorted(set().union(*(op.constants() for op in needed))):
        yield from _data_parts(program.constants[number].tensor.detach())


def _data_parts(tensor: Tensor) -> Iterator[bytes | memoryview]:
    yield repr((tensor.dtype, tensor.shape, tensor.layout)).encode()
    if tensor.layout is torch.strided and not tensor.is_quantized:
        yield as_bytes(tensor.cpu()).numpy().data
    else:
        saved = io.BytesIO()
        torch.save(tensor, saved)
        yield saved.getbuffer()
