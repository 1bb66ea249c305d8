"""``Op`` and its references: windows on storages, real data, places in random streams.

An op's tensor argument is a ``TensorRef``, a window on a numbered storage; tensors have no numbers.
For views, ``.data``, ``set_`` and ``Parameter(...)`` make new tensors that the dispatcher does not
always see, but the storage of a tensor can always be read.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lateinit._torch import negative_view, operators

CONJUGATE, NEGATIVE = 1, 2


# TensorRef and Op are tuples, not frozen dataclasses: recording makes one or two for every op of
# every constructor, and a frozen dataclass takes three times as long to make.
class TensorRef(NamedTuple):
    """A window on a storage; sizes and strides in elements of ``dtype``."""

    storage: int
    dtype: torch.dtype
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    bits: int = 0  # CONJUGATE and NEGATIVE: torch's lazy conjugation and negation

    @classmethod
    def of(cls, tensor: Tensor, storage: int) -> TensorRef:
        """The window of a tensor, on the storage with this number."""
        bits = (CONJUGATE if tensor.is_conj() else 0) | (NEGATIVE if tensor.is_neg() else 0)
        size, stride, offset = tuple(tensor.size()), tensor.stride(), tensor.storage_offset()
        fields = storage, tensor.dtype, size, stride, int(offset), bits
        return tuple.__new__(cls, fields)  # the same as cls(...), without a call of Python code

    @property
    def numel(self) -> int:
        count = 1
        for length in self.size:
            count *= length
        return count

    def is_contiguous(self) -> bool:
        """Whether the elements lie in row-major order without gaps."""
        # The stride of a dim of length one has no effect and may be any number.
        expected = 1
        for length, stride in zip(reversed(self.size), reversed(self.stride), strict=True):
            if length != 1:
                if stride != expected:
                    return False
                expected *= length
        return True

    def is_dense(self) -> bool:
        """Whether the elements fill their span without gaps or overlaps, in any dim order."""
        expected = 1
        for stride, length in sorted(zip(self.stride, self.size, strict=True)):
            if length != 1:
                if stride != expected:
                    return False
                expected *= length
        return True

    def on(self, storage: torch.UntypedStorage) -> Tensor:
        """The tensor that shows this window on a real or meta storage."""
        tensor = torch.empty(0, dtype=self.dtype, device=storage.device)
        tensor.set_(storage, self.offset, self.size, self.stride)
        if self.bits & CONJUGATE:
            tensor = tensor.conj()
        return negative_view(tensor) if self.bits & NEGATIVE else tensor

    def __str__(self) -> str:
        shape = "x".join(map(str, self.size)) or "scalar"
        return f"%{self.storage}:{str(self.dtype).removeprefix('torch.')}[{shape}]"


NUMBERS = frozenset({float, int, bool, type(None)})
"""The types of arguments that can be passed to a part of a fill unchanged."""


class Const(NamedTuple):
    """A reference to real data that the program keeps."""

    number: int


class Draw(NamedTuple):
    """The place of a random op in its stream."""

    stream: int
    number: int


class Op(NamedTuple):
    """One recorded op.

    Attributes:
        name: the qualified name of the overload; ``OpOverload`` objects cannot be pickled.
        args: its positional arguments, with ``TensorRef`` or ``Const`` in place of tensors.
        kwargs: its keyword arguments in the same form, without ``generator``.
        outs: the windows of its results; empty if it only writes its arguments.
        draw: its place in a random stream, None if it draws nothing.
        ambient: the number of the settings under which it was recorded.
        label: the words for the initialiser that called it, if one did.
    """

    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outs: tuple[TensorRef | None, ...]
    draw: Draw | None
    ambient: int
    label: str | None

    def fills(self) -> TensorRef | None:
        """The window that this op fills from numbers alone, None if it does anything else."""
        if self.outs or self.kwargs:
            return None
        if not operators.by_name(self.name).fills or type(self.args[0]) is not TensorRef:
            return None
        for value in self.args[1:]:
            if type(value) not in NUMBERS:
                return None
        return self.args[0]

    def written(self) -> list[TensorRef]:
        """The windows that this op writes."""
        filled = self.fills()  # first, since most ops are fills and a plan reads this of every op
        if filled is not None:
            return [filled]
        found: list[TensorRef] = []
        info = operators.by_name(self.name)
        for position in info.mutates:
            if position < len(self.args):
                found += tensor_refs(self.args[position])
        for key in info.mutates_kw:
            found += tensor_refs(self.kwargs.get(key))
        if self.outs:
            found += [out for out in self.outs if out is not None]
        return found

    def read(self) -> list[TensorRef]:
        """The windows that this op reads."""
        # An op that fills its first argument does not read it: earlier values are dead.
        found: list[TensorRef] = []
        for value in self.args[1:] if operators.by_name(self.name).fills else self.args:
            found += tensor_refs(value)
        if self.kwargs:
            for value in self.kwargs.values():
                found += tensor_refs(value)
        return found

    def constants(self) -> set[int]:
        """The numbers of the real data that this op reads."""
        return {number for value in (*self.args, *self.kwargs.values()) for number in _data(value)}

    def __reduce__(self) -> Any:
        kwargs = {key: _spelt(value) for key, value in self.kwargs.items()}
        return _op, (*self._replace(args=tuple(map(_spelt, self.args)), kwargs=kwargs),)

    def __str__(self) -> str:
        shown = [_show(a) for a in self.args] + [f"{k}={_show(v)}" for k, v in self.kwargs.items()]
        outs = ", ".join(str(out) for out in self.outs)
        call = f"{operators.spoken(self.name)}({', '.join(shown)})"
        draw = f"  # draw {self.draw.number} of stream {self.draw.stream}" if self.draw else ""
        return (f"{outs} = {call}" if outs else call) + draw


class _Format(NamedTuple):
    """The name of a ``torch.memory_format``, in its place in a pickle.

    A memory format pickles as an attribute of the module ``torch``. Protocol 2 cannot express that,
    and ``torch.save`` writes protocol 2.
    """

    name: str


def _spelt(value: Any) -> Any:
    if isinstance(value, torch.memory_format):
        return _Format(str(value).removeprefix("torch."))
    return value


def _read(value: Any) -> Any:
    return getattr(torch, value.name) if type(value) is _Format else value


def _op(name: str, args: tuple[Any, ...], kwargs: dict[str, Any], *rest: Any) -> Op:
    return Op(name, tuple(map(_read, args)), {k: _read(v) for k, v in kwargs.items()}, *rest)


def tensor_refs(value: Any) -> Sequence[TensorRef]:
    """Every ``TensorRef`` in an argument, also inside lists and tuples."""
    kind = type(value)
    if kind is TensorRef:
        return (value,)
    if kind is tuple or kind is list:
        return [ref for item in value for ref in tensor_refs(item)]
    return ()


def _data(value: Any) -> Sequence[int]:
    if type(value) is Const:
        return (value.number,)
    return [number for item in value for number in _data(item)] if type(value) is tuple else ()


def _show(value: Any) -> str:
    if isinstance(value, Const):
        return f"data[{value.number}]"
    if type(value) is tuple:
        return f"[{', '.join(map(_show, value))}]"
    return str(value)
