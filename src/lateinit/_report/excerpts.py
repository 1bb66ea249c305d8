"""Excerpts: a few thousand values of a tensor, without computing or reading all of it.

If a fill draws a tensor in flat order, a few ranges are drawn, each at its place in the random
stream (``FlatReader``), so even a model that fits no machine takes only seconds. From a tensor in a
checkpoint a few blocks are read. Other tensors are computed whole, if they are small enough.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lateinit._checkpoint.formats import Reader
from lateinit._distributed import FlatReader
from lateinit._native import NORMAL, UNIFORM
from lateinit._program import Program, Step, TensorRef, plan_storages
from lateinit._replay import ChunkedFill, execution_of, fill_of, one_thread
from lateinit._report.rows import State
from lateinit._tensors import Deferred, held
from lateinit._torch import by_name
from lateinit.errors import LateinitError

# A range costs a jump of the generator, as much as about 5e5 draws, and there are four of them.
_RANGES = 4
_RANGE = 2048
_WHOLE = 1 << 16  # the most elements of a tensor that is always computed whole
_MOST = 1 << 22  # elements that the ops of a tensor may write, if it must be computed whole


@dataclass(frozen=True, slots=True)
class Excerpt:
    """Some values of a tensor.

    Attributes:
        values: the values as flat float64; empty if there are none.
        whole: whether these are all values of the tensor.
        mean: the mean of the distribution from which they were drawn, if known.
        std: the standard deviation of that distribution.
        why: the reason why there are no values.
    """

    values: Tensor
    whole: bool = False
    mean: float | None = None
    std: float | None = None
    why: str = ""


def _none(why: str) -> Excerpt:
    return Excerpt(torch.empty(0, dtype=torch.float64, device="cpu"), why=why)


def excerpt_of(tensor: Tensor, state: State) -> Excerpt:
    """Some values of a tensor of a model.

    The model does not change, and no generator moves.

    Args:
        tensor: the tensor.
        state: whether it is deferred, lazy, real, or plain ``meta``.
    """
    if state == "lazy":
        return _none("its shape is not known yet")
    if state == "meta":
        return _none("it is on meta, and was not recorded")
    if state == "real":
        return _of_real(held(tensor))
    handle = Deferred.of(tensor)
    real = handle.real()
    if real is not None:
        return _of_real(real)
    try:
        with one_thread:
            return _of_deferred(handle.program, handle.ref)
    except LateinitError as error:
        return _none(str(error))


def excerpt_of_stored(reader: Reader, name: str) -> Excerpt:
    """Some values of a tensor in a checkpoint."""
    shape = reader.entries[name].shape
    blocks = [reader.read(name, *block) for block in _blocks(shape)]
    return _excerpt(blocks, math.prod(shape))


def _of_real(tensor: Tensor) -> Excerpt:
    if tensor.layout != torch.strided or tensor.is_quantized:
        return _none(f"not shown for {tensor.layout} tensors")
    blocks = []
    for offsets, sizes in _blocks(tuple(tensor.shape)):
        block = tensor.detach()
        for dim, (start, size) in enumerate(zip(offsets, sizes, strict=True)):
            block = block.narrow(dim, start, size)
        blocks.append(block)
    return _excerpt(blocks, tensor.numel())


def _of_deferred(program: Program, ref: TensorRef) -> Excerpt:
    device = program.storages[ref.storage].device
    if device.type != "cpu":
        return _none(f"not shown for tensors on {device}")
    (step,) = plan_storages(program, [ref.storage])
    if all(by_name(program.ops[number].name).is_empty for number in step.ops):
        return _none("it is not initialised")
    execution = execution_of(program)
    fill = fill_of(program, step, _WHOLE)
    if fill is not None and len(fill.ops) == len(step.ops) and _in_a_row(ref, fill.ref):
        state = None if fill.draw is None else execution.state(fill.draw)
        with execution.session():
            reader = FlatReader(fill, 0, state)
            drawn = [reader.read(*part) for part in _parts(ref.offset, ref.numel)]
        found = _excerpt(drawn, ref.numel)
        if fill.draw is None and found.values.numel():  # a fill without draws: all values are equal
            return replace(found, mean=float(found.values[0]), std=0.0)
        mean, std = _moments(fill)
        return replace(found, mean=mean, std=std)
    work = _work(program, step)
    if work > _MOST:
        return _none(f"not shown: {work:,} elements would have to be computed for it")
    return _of_real(execution.value(ref))


def _excerpt(blocks: Sequence[Tensor], numel: int) -> Excerpt:
    """The values of some blocks of a tensor with ``numel`` elements."""
    try:
        flat = [
            (torch.view_as_real(block.resolve_conj()) if block.is_complex() else block)
            .to("cpu", torch.float64)
            .reshape(-1)
            for block in blocks
        ]
    except (NotImplementedError, RuntimeError):
        return _none(f"torch makes no numbers of {blocks[0].dtype}")  # types of 1 to 7 bits
    return Excerpt(torch.cat(flat), whole=sum(block.numel() for block in blocks) == numel)


def _in_a_row(ref: TensorRef, filled: TensorRef) -> bool:
    """Whether a window covers, in any order, a flat range of the elements that a fill writes."""
    same = ref.storage == filled.storage and ref.dtype == filled.dtype and not ref.bits
    return same and ref.is_dense()


def _work(program: Program, step: Step) -> int:
    return sum(ref.numel for number in step.ops for ref in program.ops[number].written())


def _moments(fill: ChunkedFill) -> tuple[float | None, float | None]:
    """Mean and standard deviation of a fill that is one plain draw; None otherwise."""
    (op, *rest), given = fill.ops, fill.ops[0].args[1:]
    if rest or op.name not in {NORMAL, UNIFORM}:
        return None, None
    first, second = (*map(float, given), *(0.0, 1.0)[len(given) :])  # both have these defaults
    if op.name == NORMAL:
        return first, second
    return (first + second) / 2, (second - first) / math.sqrt(12)


def _parts(offset: int, numel: int) -> Iterator[tuple[int, int]]:
    """Flat ranges, evenly spread, from the first elements to the last."""
    if numel <= _RANGES * _RANGE:
        yield offset, offset + numel
        return
    for number in range(_RANGES):
        start = offset + (numel - _RANGE) * number // (_RANGES - 1)
        yield start, start + _RANGE


def _blocks(shape: Sequence[int]) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Blocks of a tensor, evenly spread: the offsets and the shape of each."""
    inner, dim = 1, len(shape)
    while dim and inner * shape[dim - 1] <= _RANGE:
        dim -= 1
        inner *= shape[dim]
    if not dim or math.prod(shape) <= _RANGES * _RANGE:
        yield (0,) * len(shape), tuple(shape)
        return
    rows, rest = _RANGE // inner, tuple(shape[dim:])
    for number in range(_RANGES):
        place = (math.prod(shape[:dim]) - 1) * number // (_RANGES - 1)
        start: list[int] = []
        for size in reversed(shape[:dim]):
            place, index = divmod(place, size)
            start.insert(0, index)
        length = min(rows, shape[dim - 1])
        start[-1] = min(start[-1], shape[dim - 1] - length)
        yield (*start, *(0,) * len(rest)), (*(1,) * (dim - 1), length, *rest)
