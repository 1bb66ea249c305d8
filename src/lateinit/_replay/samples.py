"""Samples of kernels: the results of an op of a program for a few hundred elements.

Two machines compute the same model only if their kernels give the same bits. That depends on the
versions of torch and of the libraries under it, on the vector extensions that are used, and on the
processor. A sample is computed from numbers that are the same everywhere, with the op's own
arguments on smaller tensors of the same layout. Different samples prove that kernels differ. Equal
samples do not prove that they agree: a kernel may treat large tensors in another way than small
ones.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from lateinit import _native
from lateinit._program import Const, Op, Program, TensorRef
from lateinit._replay.execution import execution_of
from lateinit._replay.session import Memory, Session
from lateinit._torch import TRUNCATED, by_name, digest, span_of, without_modes
from lateinit._torch.operators import spoken

# The smallest size that stands for larger ones, by the number of dims: several vectors and a
# remainder, in a few hundred to a few thousand elements.
_SIZES = {0: 645, 1: 645, 2: 33, 3: 17}
_SMALLEST = 9
_SEED = 1
_CPU = torch.device("cpu")
# The samples by op, its arguments, and the settings that it depends on.
_known: dict[str, dict[str, str]] = {}


def sample_of(program: Program, op: Op) -> dict[str, str]:
    """A digest of the results of an op's kernel, by the name of the kernel.

    Empty if the op computes nothing, or if no sample can be made: of ops of other libraries, and of
    ops that read integers, which may be indices that a smaller tensor does not have.

    Hold ``one_thread``: the settings of the op are in force during the call.
    """
    info = by_name(op.name)
    filled = op.fills()
    if filled is not None and _is_on_cpu(program, filled):
        # `trunc_normal_` redraws values of `normal_`.
        name = _native.NORMAL if op.name == TRUNCATED else op.name
        if name in (_native.NORMAL, _native.UNIFORM) and filled.dtype in _native.DTYPES:
            with without_modes():
                return {_label(op, [filled]): _native.digest_of_draws(name, filled.dtype)}
    if info.is_empty or info.foreign or info.collective or info.metadata_only:
        return {}
    twin = _Twin(program, op)
    if not info.pointwise and not all(map(_is_of_values, twin.refs)):
        return {}
    device = next((program.storages[ref.storage].device for ref in op.written()), _CPU)
    ambient = program.ambients[op.ambient]
    key = repr((op.name, twin.op.args, sorted(twin.op.kwargs.items()), ambient, device))
    if key not in _known:
        with ambient.in_force(), execution_of(program).session() as session:
            found = _digest_of(session, twin, device)
        _known[key] = {_label(op, [*twin.refs, *op.written()]): found} if found else {}
    return _known[key]


def _is_of_values(ref: TensorRef) -> bool:
    return ref.dtype.is_floating_point or ref.dtype.is_complex


def _is_on_cpu(program: Program, ref: TensorRef) -> bool:
    return program.storages[ref.storage].device.type == "cpu"


def _label(op: Op, refs: Iterable[TensorRef]) -> str:
    """The name of a kernel: its op and its dtypes."""
    dtypes = dict.fromkeys(str(ref.dtype).removeprefix("torch.") for ref in refs)
    return f"{spoken(op.name)} in {', '.join(dtypes)}"


class _Twin:
    """A copy of an op with smaller tensors.

    Attributes:
        op: the copy.
        refs: its tensor arguments, each on a storage of its own.
    """

    def __init__(self, program: Program, op: Op) -> None:
        self._constants = program.constants
        self._numbers: dict[tuple[int, int], int] = {}
        self.refs: list[TensorRef] = []
        given = [ref for value in (*op.args, *op.kwargs.values()) for ref in self._given(value)]
        shown = given or op.written()
        smallest = _SIZES.get(max((len(ref.size) for ref in shown), default=0), _SMALLEST)
        large = sorted({n for ref in shown for n in ref.size if n > smallest})
        self._sizes = {n: smallest + rank for rank, n in enumerate(large)}
        # Number arguments are sizes only if there is no tensor argument, as in `arange`.
        self._sized = not given
        args = tuple(map(self._smaller, op.args))
        kwargs = {name: self._smaller(value) for name, value in op.kwargs.items()}
        self.op = op._replace(args=args, kwargs=kwargs)

    def _given(self, value: Any) -> list[TensorRef]:
        if type(value) is Const:
            return [TensorRef.of(self._constants[value.number].tensor, -1 - value.number)]
        if type(value) is tuple:
            return [ref for item in value for ref in self._given(item)]
        return [value] if type(value) is TensorRef else []

    def _smaller(self, value: Any, listed: bool = False) -> Any:
        if type(value) is tuple:
            return tuple(self._smaller(item, listed=True) for item in value)
        if type(value) is int and (listed or self._sized):
            return self._sizes.get(value, value)
        return self._window(*self._given(value)) if self._given(value) else value

    def _window(self, ref: TensorRef) -> TensorRef:
        """A window of a smaller size, with its dims in the same order in memory."""
        number = self._numbers.setdefault((ref.storage, ref.offset), len(self._numbers))
        size = tuple(self._sizes.get(n, n) for n in ref.size)
        stride, span = [0] * len(size), 1
        for dim in sorted(range(len(size)), key=lambda d: (ref.stride[d], ref.size[d], -d)):
            if ref.stride[dim]:
                stride[dim], span = span, span * max(size[dim], 1)
        found = ref._replace(storage=number, size=size, stride=tuple(stride), offset=0)
        self.refs.append(found)
        return found


def _digest_of(session: Session, twin: _Twin, device: torch.device) -> str | None:
    """A digest of the results of an op and of its writes; None if the smaller op cannot run."""
    try:
        memory = Memory()
        for ref in twin.refs:
            span = span_of(ref.size, ref.stride) if ref.numel else 0
            values = _numbers(span) if _is_of_values(ref) else 1 + 10 * _numbers(span)
            values = values.to(device=device, dtype=ref.dtype)
            held = memory.get(ref.storage)
            if held is None or held.nbytes() < values.nbytes:
                memory[ref.storage] = values.untyped_storage()
        generator = torch.Generator(device).manual_seed(_SEED) if twin.op.draw else None
        given = session.call(twin.op, memory, generator)
        written = [ref.on(memory[ref.storage]) for ref in twin.op.written() if ref in twin.refs]
        tensors = [t for t in (*given, *written) if isinstance(t, Tensor)]
        found = b"".join(map(digest, tensors))
    except Exception:  # noqa: BLE001 - smaller tensors may be wrong for it, in any way
        return None
    return hashlib.sha256(found).hexdigest()[:12] if tensors else None


@functools.cache
def _numbers(count: int) -> Tensor:
    """Numbers in (0.05, 0.95), valid for most functions, by arithmetic that is exact everywhere."""
    golden = [(index * 0.6180339887498949) % 1.0 for index in range(1, count + 1)]
    return torch.tensor([0.05 + 0.9 * part for part in golden], dtype=torch.float64, device="cpu")
