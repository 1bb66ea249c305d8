"""Map a shard to flat ranges, to compute only the part of a tensor that a rank holds.

Sharding a deferred tensor records copies: of a chunk into a padded buffer (FSDP2:
``FSDPParam._init_sharded_param``), or into chunks to be scattered (``distribute_tensor``). Followed
backwards, they lead to a box of the full tensor. If the full tensor is filled element by element in
flat order, only the ranges that contain the box are drawn, a bounded number of elements at a time,
each at its place in the random stream.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from lateinit._native import APART
from lateinit._program import Op, Program, Step, TensorRef, needed_ops
from lateinit._replay import PIECE, ChunkedFill, calls_of, words_of
from lateinit._rng import UNIT, fills, mt19937
from lateinit._torch import ZERO, by_name

# The most elements that are drawn at a time, 2 MiB in float32. Bounds the memory beside the shard.
_ROWS = 1 << 19
# From so many elements on, several threads draw a shard. Each thread makes a jump of its own, which
# takes as long as about 5e5 draws.
_APART = 1 << 22
# From so many unused elements between two rows on, each row is drawn alone. Below, drawing the gap
# takes less time than moving the generator over it.
_GAP = 1 << 16


class Box(NamedTuple):
    """A block of a tensor: its start and its length in each dim."""

    start: tuple[int, ...]
    size: tuple[int, ...]

    def within(self, other: Box) -> Box:
        """The intersection of two boxes."""
        start = tuple(map(max, self.start, other.start))
        ends = map(min, self._ends(), other._ends())
        return Box(start, tuple(max(0, e - s) for s, e in zip(start, ends, strict=True)))

    def moved(self, origin: Box, target: Box) -> Box:
        """This box, moved by the distance from ``origin`` to ``target``."""
        start = zip(self.start, origin.start, target.start, strict=True)
        return Box(tuple(s - o + t for s, o, t in start), self.size)

    def _ends(self) -> tuple[int, ...]:
        return tuple(s + n for s, n in zip(self.start, self.size, strict=True))


@dataclass(frozen=True, slots=True)
class Copied:
    """A contiguous tensor that holds a box of another one, and zeros elsewhere.

    Attributes:
        shape: the shape of this tensor.
        dtype: its dtype.
        box: the place of the copied values in this tensor.
        source: the place in the full tensor from which they were copied.
        casts: the dtypes to which they were cast, in order.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    box: Box
    source: Box
    casts: tuple[torch.dtype, ...] = ()

    def read(self, ref: TensorRef) -> Copied | None:
        """The part of this tensor in a window; None if that is no box."""
        seen = box_of(ref, self.shape)
        if seen is None or ref.dtype != self.dtype:
            return None
        held = seen.within(self.box)
        origin = Box((0,) * len(ref.size), ref.size)
        return replace(
            self,
            shape=ref.size,
            box=held.moved(seen, origin),
            source=held.moved(self.box, self.source),
        )

    def written(self, ref: TensorRef, value: Copied) -> Copied | None:
        """This tensor after ``value`` was copied to a window on it; None if not a single box."""
        target = box_of(ref, self.shape)
        whole = ref.size == self.shape
        # Only one box is followed, so the copy must bring all copied values.
        if target is None or value.shape != ref.size or not (whole or 0 in self.box.size):
            return None
        origin = Box((0,) * len(ref.size), ref.size)
        box = value.box.moved(origin, target)
        return replace(value.cast(self.dtype), shape=self.shape, box=box)

    def cast(self, dtype: torch.dtype) -> Copied:
        """The same tensor in another dtype."""
        if dtype == self.dtype:
            return self
        return replace(self, dtype=dtype, casts=(*self.casts, dtype))


def _whole(shape: tuple[int, ...]) -> Box:
    return Box((0,) * len(shape), shape)


def _strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(math.prod(shape[dim + 1 :]) for dim in range(len(shape)))


def box_of(ref: TensorRef, shape: tuple[int, ...]) -> Box | None:
    """The box of a contiguous tensor that a window shows; None if it shows no box."""
    if len(ref.size) != len(shape) or ref.bits:
        return None
    if ref.numel == 0:
        return Box((0,) * len(shape), ref.size)
    left, start = ref.offset, []
    for size, stride, natural in zip(ref.size, ref.stride, _strides(shape), strict=True):
        if size != 1 and stride != natural:
            return None
        start.append(left // natural)
        left -= start[-1] * natural
    ends = (s + size for s, size in zip(start, ref.size, strict=True))
    fits = all(end <= length for end, length in zip(ends, shape, strict=True))
    return Box(tuple(start), ref.size) if fits else None


@dataclass(frozen=True, slots=True)
class Shard:
    """A storage that holds a box of a tensor which a fill computes."""

    storage: int
    copied: Copied
    fill: ChunkedFill


def shards_of(program: Program, step: Step, fill: ChunkedFill) -> list[Shard] | None:
    """The shards that a step computes.

    None if the step does anything but copy boxes of the tensor that its fill computes: then it must
    run whole.

    Args:
        program: the program.
        step: the step.
        fill: the ops that the step begins with.
    """
    ref = fill.ref
    if ref.storage in step.gives:
        return None
    whole = _whole(ref.size)
    known = {ref.storage: Copied(ref.size, ref.dtype, whole, whole)}
    for number in step.ops[len(fill.ops) :]:
        if not _follow(program, program.ops[number], known):
            return None
    if not all(number in known and _fills(program, number, known) for number in step.gives):
        return None
    return [Shard(number, known[number], fill) for number in step.gives]


def _fills(program: Program, number: int, known: dict[int, Copied]) -> bool:
    copied, storage = known[number], program.storages[number]
    nbytes = math.prod(copied.shape) * copied.dtype.itemsize
    return storage.nbytes == nbytes and storage.device.type == "cpu"


def _follow(program: Program, op: Op, known: dict[int, Copied]) -> bool:
    """Update ``known`` with the copies of an op; False if the op does anything else."""
    info = by_name(op.name)
    out = op.args[0] if info.mutates else next(iter(op.outs), None)
    if type(out) is not TensorRef or len(op.outs) > 1:
        return False
    if op.name == "aten::copy_":
        value = _read(known, op.args[1])
        into = known.get(out.storage) or _blank(program, out)
        made = into.written(out, value) if into is not None and value is not None else None
    elif info.is_empty or ZERO in (op.name, *(info.filled_by or ())):
        made = _blank(program, out)
    else:
        made = _made(op, out, known) if _blank(program, out) else None
    if made is None:
        return False
    known[out.storage] = made
    return True


def _blank(program: Program, ref: TensorRef) -> Copied | None:
    """A tensor on the whole of its storage, with no copied values yet; None if it is not."""
    if ref.bits or not ref.is_contiguous() or not program.covers(ref):
        return None
    nothing = Box((0,) * len(ref.size), (0,) * len(ref.size))
    return Copied(ref.size, ref.dtype, nothing, nothing)


def _made(op: Op, out: TensorRef, known: dict[int, Copied]) -> Copied | None:
    """The tensor that a copying op makes; None if it cannot be followed."""
    padded = op.name == "aten::constant_pad_nd"
    copies = padded or by_name(op.name).copies == 0
    value = _read(known, op.args[0]) if copies else None
    if value is None:
        return None
    if padded:
        # Padding is (left, right) for each dim from the last one: only zeros on the right are
        # followed.
        if any(op.args[1][::2]) or min(op.args[1]) < 0 or any(op.args[2:]) or op.kwargs:
            return None
        return replace(value, shape=out.size)
    return value.cast(out.dtype) if value.shape == out.size else None


def _read(known: dict[int, Copied], ref: object) -> Copied | None:
    if type(ref) is not TensorRef:
        return None
    holder = known.get(ref.storage)
    return holder.read(ref) if holder is not None else None


def reads_nothing(program: Program, storage: int) -> bool:
    """Whether a shard was made from memory that nothing was ever written to.

    That happens if torch leaves out a copy on ``meta`` that lateinit does not know of.
    """
    read = {
        ref.storage
        for number in needed_ops(program, [storage])
        for ref in program.ops[number].read()
    }
    return any(
        program.storages[number].followed
        and all(by_name(program.ops[w].name).is_empty for w in program.writers(number))
        for number in {storage, *read}
    )


class Leaf(NamedTuple):
    """Rows that are drawn together.

    Attributes:
        start: the first flat element of the full tensor.
        end: the flat element after the last.
        target: the index of the rows in the box of the shard.
        size: the shape of the elements to keep.
        stride: their strides in the flat range.
    """

    start: int
    end: int
    target: tuple[int | slice, ...]
    size: tuple[int, ...]
    stride: tuple[int, ...]


def leaves(shard: Shard) -> list[Leaf]:
    """The flat ranges of the full tensor that contain a shard, in order."""
    start, size = shard.copied.source
    if 0 in size:
        return []
    strides = _strides(shard.fill.ref.size)
    # The outermost dim whose rows are small enough to be drawn at a time; over the dims before it,
    # this loops.
    dim = next(d for d, stride in enumerate(strides) if stride <= _ROWS)
    inner = list(zip(start, size, strides, strict=True))[dim + 1 :]
    before = sum(s * stride for s, _, stride in inner)
    length = 1 + sum((n - 1) * stride for _, n, stride in inner)
    wide = strides[dim] - length > _GAP
    rows = 1 if wide else max(1, _ROWS // strides[dim])
    found = []
    for leading in itertools.product(*map(range, size[:dim])):
        places = zip(start[:dim], leading, strides[:dim], strict=True)
        base = sum((s + i) * stride for s, i, stride in places) + before
        for row in range(0, size[dim], rows):
            count = min(rows, size[dim] - row)
            first = base + (start[dim] + row) * strides[dim]
            last = first + (count - 1) * strides[dim] + length
            target: tuple[int | slice, ...] = (*leading, slice(row, row + count))
            found.append(Leaf(first, last, target, (count, *size[dim + 1 :]), strides[dim:]))
    return found


def _as_rows(leaf: Leaf) -> tuple[int, int, int] | None:
    """The number, length and distance of a leaf's rows; None for one row or rows too close."""
    dims = [(n, stride) for n, stride in zip(leaf.size, leaf.stride, strict=True) if n > 1]
    length, count = 1, 1
    while dims and dims[-1][1] == length:
        length *= dims.pop()[0]
    apart = dims[-1][1] if dims else 0
    while dims:
        n, stride = dims.pop()
        if stride != count * apart:
            return None
        count *= n
    return (count, length, apart) if apart - length >= APART else None


def groups(shard: Shard, threads: int) -> list[list[Leaf]]:
    """Divide the leaves of a shard among threads."""
    found = leaves(shard)
    drawn = sum(leaf.end - leaf.start for leaf in found)
    count = min(len(found), max(threads if drawn > _APART else 1, -(-drawn // PIECE)))
    length = -(-len(found) // count) if count else 1
    return [found[i : i + length] for i in range(0, len(found), length)]


def run_leaves(
    shard: Shard, storage: torch.UntypedStorage, part: list[Leaf], state: bytes | None
) -> None:
    """Draw some ranges, and copy the elements that the shard holds into it.

    Args:
        shard: the shard.
        storage: its storage.
        part: the ranges, in order.
        state: the generator's state at the beginning of the full tensor.
    """
    copied = shard.copied
    whole = torch.empty(0, dtype=copied.dtype)
    whole.set_(storage, 0, copied.shape, _strides(copied.shape))
    box = tuple(slice(s, s + n) for s, n in zip(*copied.box, strict=True))
    with torch.no_grad():
        target, reader = whole[box], FlatReader(shard.fill, part[0].start // UNIT * UNIT, state)
        for leaf in part:
            drawn = reader.rows(leaf)
            if drawn is None:
                drawn = reader.read(leaf.start, leaf.end).as_strided(leaf.size, leaf.stride)
            # The copy makes the last cast. All earlier casts are made too, since each one rounds.
            for dtype in copied.casts[:-1]:
                drawn = drawn.to(dtype)
            target[leaf.target].copy_(drawn)


class FlatReader:
    """Reads the elements that a fill would compute, forward from one place on.

    Args:
        fill: the fill.
        start: the first element that will be read, rounded down to a multiple of 16.
        state: the generator's state at the beginning of the full tensor; None if nothing is drawn.
    """

    def __init__(self, fill: ChunkedFill, start: int, state: bytes | None) -> None:
        self._fill = fill
        # Kernels draw a last piece of less than 16 elements in another way than the full tensor:
        # the last 16 to 31 elements are drawn together.
        self._last = (fill.ref.numel - UNIT) // UNIT * UNIT
        self._drawn = min(start, self._last)
        if state is not None:
            state = mt19937.jump(state, words_of(fill, self._drawn))
        self._generator = None if state is None else mt19937.generator_at(state)
        self._calls = calls_of(fill, self._generator)
        self._start = self._drawn
        self._values = torch.empty(0, dtype=fill.ref.dtype)

    def rows(self, leaf: Leaf) -> Tensor | None:
        """The elements of a leaf, drawn without the gaps; None if that is not possible."""
        rows, first, op = _as_rows(leaf), leaf.start // UNIT * UNIT, self._fill.ops[0]
        if rows is None or self._generator is None or op.kwargs or leaf.end > self._last:
            return None
        if first < self._drawn or not fills.is_native(op.name, self._values.dtype):
            return None
        self._reach(first)
        *shape, apart = rows
        values, begin = torch.empty(shape, dtype=self._values.dtype), leaf.start - first
        if not fills.fill_rows(op.name, values, begin, apart, op.args[1:], self._generator):
            return None
        for call in self._calls[1:]:
            call(values.view(-1))
        self._drawn = self._start = -(-leaf.end // UNIT) * UNIT
        self._values = values[:0, 0]
        return values.view(leaf.size)

    def read(self, start: int, end: int) -> Tensor:
        """Elements ``start`` to ``end``; neither may be before that of the previous call."""
        first, last = start // UNIT * UNIT, -(-end // UNIT) * UNIT
        if last > self._last:
            first, last = min(first, self._last), self._fill.ref.numel
        # Ranges may overlap after they are widened to multiples of 16, so the elements of the last
        # draw are kept.
        values = torch.empty(last - first, dtype=self._values.dtype)
        kept = max(0, self._drawn - first)
        values[:kept] = self._values[first - self._start :][:kept]
        if kept < len(values):
            self._draw(values[kept:], first + kept)
        self._values, self._start = values, first
        return values[start - first : end - first]

    def _draw(self, values: Tensor, start: int) -> None:
        self._reach(start)
        for call in self._calls:
            call(values)
        self._drawn = start + len(values)

    def _reach(self, start: int) -> None:
        """Move the generator on to a group of 16."""
        if self._generator is not None and start > self._drawn:
            mt19937.move(self._generator, words_of(self._fill, start - self._drawn))
            self._drawn = start
