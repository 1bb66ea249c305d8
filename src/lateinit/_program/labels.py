"""The words for how a tensor is initialised, as summaries show them: ``normal_(std=0.02)``.

They come from the function of ``nn.init`` that was running when an op was recorded
(``initializer``). If none was, they come from the recorded ops (``describe_initialisation``).
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch

from lateinit._program.ops import Const, Op, TensorRef
from lateinit._program.plan import needed_ops
from lateinit._program.program import Program
from lateinit._torch import FILL, ZERO, by_name, running_initialiser

EMPTY = "empty (uninitialised)"
_MOST_PIECES = 3  # the most writes to list; of more writes only the number is shown
_DEEPEST = 8  # the longest chain of copies that is followed to its source

# -- while recording -----------------------------------------------------------------------------


def initializer() -> str | None:
    """The call of the ``nn.init`` function that is running, or None.

    Arguments equal to their defaults are left out: ``kaiming_uniform_(a=2.236)``,
    ``normal_(std=0.02)``, ``zeros``.
    """
    found = running_initialiser(_DEFAULTS)
    return called(*found) if found is not None else None


def called(name: str, given: Mapping[str, Any]) -> str:
    """The call of a function of ``nn.init`` with these arguments, as ``initializer`` shows it."""
    values = map(given.get, _DEFAULTS[name])
    return _call(name, tuple([v if isinstance(v, _PLAIN) else None for v in values]))


@functools.lru_cache(maxsize=1024)
def _call(name: str, values: tuple[Any, ...]) -> str:
    """The call of an initialiser, without arguments that equal their defaults."""
    # The same few calls repeat for every layer, hence the cache.
    if name in ("zeros_", "zero_", "ones_", "eye_"):
        return {"zero_": "zeros"}.get(name, name[:-1])
    if name in ("constant_", "fill_"):
        return _fill(values[0])
    if name == "uniform_":
        return f"uniform_({', '.join(map(_number, values))})"
    shown = [
        f"{key}={_number(value)}"
        for (key, default), value in zip(_DEFAULTS[name].items(), values, strict=True)
        if value is not None and value != default
    ]
    return f"{name}({', '.join(shown)})"


def _initialisers() -> dict[str, dict[str, Any]]:
    """The arguments of every initialiser after the tensor, with their defaults."""
    found: dict[str, dict[str, Any]] = {}
    for name, function in vars(torch.nn.init).items():
        if name.endswith("_") and not name.startswith("_") and inspect.isfunction(function):
            parameters = list(inspect.signature(function).parameters.values())[1:]
            found[name] = {p.name: p.default for p in parameters if p.name != "generator"}
    # The private _no_grad_fill_ and _no_grad_zero_ do the work of constant_ and zeros_.
    found["fill_"] = {"val": inspect.Parameter.empty}
    found["zero_"] = {}
    return found


_DEFAULTS = _initialisers()


# -- from the recorded ops -----------------------------------------------------------------------


def describe_initialisation(program: Program, ref: TensorRef) -> str:
    """The words for how a tensor of a program gets its values.

    They list the live writes, if those are few and simple, or else give the number of ops.
    """
    words = _describe(program, ref, len(program.ops), _DEEPEST)
    if words is not None:
        return words
    needed = needed_ops(program, [ref.storage])
    count = sum(not by_name(program.ops[number].name).is_empty for number in needed)
    return f"computed ({count} op{'s' * (count != 1)})"


def _describe(program: Program, ref: TensorRef, before: int, depth: int) -> str | None:
    """The words for a tensor as it is before op ``before``, or None if there are too many writes.

    Walks backwards over the writes that overlap the tensor, until a write that covers all of it.
    """
    pieces: list[_Piece] = []
    for number in reversed(program.writers(ref.storage)):
        op = program.ops[number]
        written = [w for w in op.written() if w.storage == ref.storage and _overlap(w, ref)]
        if number >= before or not written or by_name(op.name).is_empty:
            continue
        words = op.label or _words(program, op, number, depth)
        whole = any(w == ref or program.covers(w) for w in written)
        if words is None or len(pieces) == len(_TRUNCATED):
            return None
        # The ops of one initialiser have the same label and count as one piece.
        if op.label is not None and pieces and pieces[-1].words == words:
            pieces[-1] = _Piece(op, words, whole or pieces[-1].whole)
        else:
            pieces.append(_Piece(op, words, whole))
        if whole and all(r.storage != ref.storage for r in op.read()):
            break
    return _joined(pieces[::-1])


class _Piece(NamedTuple):
    """The words for one write, and whether it covers the whole tensor."""

    op: Op
    words: str
    whole: bool


def _joined(pieces: list[_Piece]) -> str | None:
    """The words for a sequence of writes, or None if there are too many."""
    if tuple(_base(piece.op.name) for piece in pieces) == _TRUNCATED:
        return _truncated(*(piece.op for piece in pieces[2:]))
    if len(pieces) > _MOST_PIECES:
        return None
    shown = [piece.words if piece.whole else f"{piece.words} in part" for piece in pieces]
    return ", then ".join(shown) or EMPTY


# A truncated normal by inversion, as libraries and torch/nn/init.py before 2.13 draw it.
_TRUNCATED = ("uniform_", "erfinv_", "mul_", "add_", "clamp_")


def _truncated(scaled: Op, moved: Op, clamped: Op) -> str | None:
    values = [moved.args[1], scaled.args[1], *clamped.args[1:], *clamped.kwargs.values()]
    if moved.kwargs or len(values) != 4 or not all(isinstance(v, (int, float)) for v in values):
        return None
    values[1] /= math.sqrt(2)  # erfinv is scaled by std * sqrt(2)
    return _call("trunc_normal_", tuple(float(f"{v:.4g}") for v in values))


def _words(program: Program, op: Op, number: int, depth: int) -> str | None:
    """The words for one write, or None if it reads other tensors."""
    info = by_name(op.name)
    if info.copies is not None:
        source = op.args[info.copies]
        if isinstance(source, Const):
            return "constant"
        if type(source) is TensorRef and depth:
            return _describe(program, source, number, depth - 1)
        return None
    # Skip the first argument if the op writes it, or reads only its sizes.
    own = 1 if info.mutates or info.from_sizes else 0
    if _mentions_tensor(op.args[own:]) or _mentions_tensor(
        value for key, value in op.kwargs.items() if key != "out"
    ):
        return None
    scalars = tuple([a for a in op.args if a is None or isinstance(a, _SCALARS)])
    return _call_of(*(info.fill_for(op.args) or (op.name, scalars)))


def _call_of(name: str, numbers: tuple[Any, ...]) -> str:
    """The words for a write that reads no other tensor: a factory, fill, draw or arithmetic."""
    if name == ZERO:
        return _fill(0)
    if name == FILL:
        return _fill(numbers[-1])
    base = _base(name)
    if base in _DEFAULTS:
        return _call(base, (*numbers, *list(_DEFAULTS[base].values())[len(numbers) :]))
    return f"{base}({', '.join(map(_number, numbers))})"


def _fill(value: Any) -> str:
    if value is None:
        return "fill"
    if value in (0, 1):
        return "ones" if value else "zeros"
    return f"fill({_number(value)})"


_SCALARS = (int, float, complex)
_PLAIN = (*_SCALARS, str)


def _base(name: str) -> str:
    """The name of an op without namespace and overload."""
    return name.partition("::")[2].partition(".")[0]


def _mentions_tensor(values: Iterable[Any]) -> bool:
    for value in values:
        if type(value) is TensorRef or isinstance(value, Const):
            return True
        if type(value) is tuple and _mentions_tensor(value):
            return True
    return False


def _overlap(a: TensorRef, b: TensorRef) -> bool:
    """Whether the spans of two windows on one storage overlap: then they may share bytes."""
    (a_start, a_end), (b_start, b_end) = _span(a), _span(b)
    return a_start < b_end and b_start < a_end


def _span(ref: TensorRef) -> tuple[int, int]:
    if 0 in ref.size:
        return 0, 0
    last = sum((length - 1) * stride for length, stride in zip(ref.size, ref.stride, strict=True))
    size = ref.dtype.itemsize
    return ref.offset * size, (ref.offset + last + 1) * size


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
