"""A checkpoint that one rank, the *source*, reads for all: each rank requests its blocks.

The other ranks open no file. They receive the headers of the files, and make the same plan as if
they had opened them. While a rank loads, it requests one block after another. The source loads its
own tensors first, and then answers until every rank has reported that it is done. So ranks may load
different tensors, in any order, and only one block is in transit at a time.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lateinit._checkpoint.formats import Objects, Reader, open_checkpoint
from lateinit._distributed import answered, by_words, every_rank, is_running
from lateinit.errors import ShardingError

_DONE, _TENSOR, _OBJECT = range(3)
# The most dims of a tensor in torch (at::kMaxDims is 64 where it matters), each with two numbers.
_LONGEST = 2 * 64
# Bytes that are sent at once (64 MiB).
_PIECE = 1 << 26
_CALL = "load_checkpoint()"
# The attributes of `Reader` that the source sends to the other ranks.
_TOLD = ("aliases", "entries", "headers", "homes", "shared", "versions")


class Link:
    """The ranks of the default process group, one of which reads the files.

    Args:
        source: the rank that reads.

    Raises:
        ShardingError: there is no process group, or another rank named another source.
    """

    def __init__(self, source: int) -> None:
        if not is_running():
            raise ShardingError(
                f"source_rank={source}: there is no process group; call "
                "torch.distributed.init_process_group() on every rank first"
            )
        ranks = dist.get_world_size()
        if not 0 <= source < ranks:
            raise ShardingError(f"source_rank={source}: the ranks are 0 to {ranks - 1}")
        self._source = source
        self._is_source = dist.get_rank() == source
        # Blocks are in memory of the CPU, which NCCL cannot send.
        on_cpu = "cpu:" in dist.get_backend_config()
        self._group = None if on_cpu else dist.new_group(backend="gloo")
        self._reader: Reader | None = None
        self._ranks = every_rank(_CALL, self._group)
        named = self._ranks.say(source)
        if len(named) > 1:
            raise ShardingError(f"source_rank: {by_words(named)}: name one rank on all of them")

    def open(self, path: Path) -> Reader:
        """The checkpoint; a collective operation."""
        with self._ranks.together("opening the checkpoint"):
            if self._is_source:
                self._reader = open_checkpoint(path)
        told: list[Any] = [None, None]
        if self._reader is not None:
            values = {name: getattr(self._reader, name) for name in _TOLD}
            told = [values, list(self._reader.objects)]
        with answered(_CALL, "telling what the files hold", self._group):
            dist.broadcast_object_list(told, self._source, self._group, torch.device("cpu"))
        return self._reader or _Sent(self, path, *told)

    @contextlib.contextmanager
    def serving(self, phase: str) -> Iterator[None]:
        """Run a block in which ranks read; the source answers the others at its end.

        Args:
            phase: the name of the block, for messages.

        Raises:
            ShardingError: another rank failed in the block, or did not answer.
        """
        with self._ranks.together(phase):
            try:
                yield
            except Exception:
                # A second error would hide the first one.
                with contextlib.suppress(ShardingError):
                    self._end()
                raise
            self._end()

    def _end(self) -> None:
        with answered(_CALL, "sending tensors"):
            if self._is_source:
                self._answer()
            else:
                dist.send(_header(_DONE), self._source, self._group)

    def _answer(self) -> None:
        waiting = dist.get_world_size() - 1
        while waiting:
            header = _header(_DONE)
            rank = dist.recv(header, None, self._group)
            kind, number, dims, *rest = header.tolist()
            if kind == _DONE:
                waiting -= 1
                continue
            try:
                assert self._reader is not None
                if kind == _OBJECT:
                    found = self._reader.objects[list(self._reader.objects)[number]]
                else:
                    name = list(self._reader.entries)[number]
                    block = rest[:dims], rest[dims : 2 * dims]
                    found = self._reader.read(name, *block, alone=True)
            except Exception as error:  # noqa: BLE001 - raised by the rank that asked
                dist.send(torch.ones(1, dtype=torch.int64), rank, self._group)
                dist.send_object_list([f"{type(error).__name__}: {error}"], rank, self._group)
                continue
            dist.send(torch.zeros(1, dtype=torch.int64), rank, self._group)
            if kind == _OBJECT:
                dist.send_object_list([found], rank, self._group)
            else:
                for piece in _pieces(found.detach().contiguous()):
                    dist.send(piece, rank, self._group)

    def ask_object(self, number: int) -> Any:
        """An object of the checkpoint, by its number."""
        with answered(_CALL, "asking for an extra state"):
            self._ask(_OBJECT, number)
            return self._object()

    def ask_block(
        self, number: int, dtype: torch.dtype, offsets: tuple[int, ...], sizes: tuple[int, ...]
    ) -> Tensor:
        """A block of a tensor of the checkpoint, by its number."""
        result = torch.empty(sizes, dtype=dtype, device="cpu")
        if result.numel():
            with answered(_CALL, "asking for a tensor"):
                self._ask(_TENSOR, number, len(sizes), *offsets, *sizes)
                for piece in _pieces(result):
                    dist.recv(piece, self._source, self._group)
        return result

    def _ask(self, *numbers: int) -> None:
        dist.send(_header(*numbers), self._source, self._group)
        status = torch.zeros(1, dtype=torch.int64)
        dist.recv(status, self._source, self._group)
        if status.item():
            raise ShardingError(f"rank {self._source} cannot read what was asked: {self._object()}")

    def _object(self) -> Any:
        found: list[Any] = [None]
        dist.recv_object_list(found, self._source, self._group)
        return found[0]


class _Sent(Reader):
    """A checkpoint that another rank reads."""

    def __init__(self, link: Link, path: Path, values: dict[str, Any], objects: list[str]) -> None:
        super().__init__(path)
        for name, value in values.items():
            setattr(self, name, value)
        self._link = link
        self._numbers = {name: number for number, name in enumerate(self.entries)}
        self.objects = Objects(
            {name: partial(link.ask_object, number) for number, name in enumerate(objects)}
        )

    def _read(
        self, name: str, offsets: tuple[int, ...], sizes: tuple[int, ...], alone: bool
    ) -> Tensor:
        dtype = self.entries[name].dtype
        return self._link.ask_block(self._numbers[name], dtype, offsets, sizes)


def _header(*numbers: int) -> Tensor:
    return torch.tensor([*numbers, *[0] * (3 + _LONGEST - len(numbers))], dtype=torch.int64)


def _pieces(tensor: Tensor) -> Iterator[Tensor]:
    flat = tensor.view(-1).view(torch.uint8)
    for start in range(0, flat.numel(), _PIECE):
        yield flat[start : start + _PIECE]
