"""Run torch code on shapes alone, for ``infer_shapes``.

``ShapeMode`` sends the ops of a forward pass to ``meta``. Tensors that the pass makes from nothing,
such as positions or sizes, and inputs such as masks are small and often read by Python, so they are
computed. A mark on their storage records whether their values are still right.
"""

from __future__ import annotations

import functools
import traceback
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from lateinit._lazy.meta_kernels import numel_of_factory, range_on_meta, shortcut
from lateinit._torch import (
    DispatchMode,
    OpInfo,
    OpOverload,
    asks_for_values,
    innermost_foreign_line,
    is_library,
    kwargs_to_meta,
    map_tensors,
    op_info,
    tensors_in,
    to_meta,
)
from lateinit.errors import NeedsValuesError

# The most elements of a tensor made from nothing that is computed, so that its values can be read,
# and of an input that keeps its values: a mask of 512 x 512. Bounds the memory and the arithmetic
# of a pass on shapes.
_SMALL = 1 << 18
# For tensors of at most so many elements, the size of an op's result is not checked first: even an
# outer product of them is affordable.
_TINY = 4096
_NEEDS_VALUES = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
# Ops whose results, or the shapes of whose results, follow from the values of one argument, with
# its position. nn.TransformerEncoder.forward (torch/nn/modules/transformer.py) calls the first one
# on a padding mask; torch/nn/utils/rnn.py packs by lengths. They have no meta kernels.
_VALUES_OF = {
    "aten::_nested_tensor_from_mask_left_aligned": 1,
    "aten::_pack_padded_sequence": 1,
    "aten::_pad_packed_sequence": 1,
}
# An attribute of real storages of the pass: "small" (values can be read) or "spoilt" (unknown
# values of a meta tensor were written there or used to compute them).
_MARK = "_lateinit_small"


class ShapeMode(DispatchMode):
    """Dispatch mode: sends the ops of a forward pass to ``meta``.

    Small tensors that the pass makes from nothing (sizes as tensors, ranges) are computed, so that
    their values can be read. Of other real tensors only the shape is read, and they are not written
    to.
    """

    def __torch_dispatch__(
        self, func: OpOverload, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        info = op_info(func)
        tensors = tensors_in(args, kwargs)
        real = [tensor for tensor in tensors if not tensor.is_meta]
        if len(real) == len(tensors):
            return self._without_meta(info, args, kwargs, real)
        at = _VALUES_OF.get(info.name)
        if at is not None and _is_small(args[at]) and not _is_spoilt(args[at]):
            return _by_values_of(args[at], func, args)
        if real:
            for position in info.mutates:
                _spoil(args[position])
            args = to_meta(args)
        if real or kwargs.get("device") is not None:
            kwargs = kwargs_to_meta(info, kwargs)
        return on_shapes(info, args, kwargs)

    def _without_meta(self, info: OpInfo, args: Any, kwargs: Any, real: list[Tensor]) -> Any:
        """Run an op whose tensors are all real, or that takes no tensor."""
        if not real:
            return self._made(info, args, kwargs)
        written = [args[i] for i in info.mutates] + [kwargs.get(k) for k in info.mutates_kw]
        foreign = any(not _is_small(t) for t in tensors_in(tuple(written), {}))
        if any(_is_spoilt(t) for t in real) and not info.returns_tensor:
            raise needs_values(info.name)
        count = sum(t.numel() for t in real)
        if foreign or count > _TINY:
            made = on_shapes(info, to_meta(args), kwargs_to_meta(info, kwargs))
            if foreign or max(count, *(t.numel() for t in tensors_in((made,), {}))) > _SMALL:
                return made
        made = info.func(*args, **kwargs)
        return made if written else _marked(made, any(_is_spoilt(t) for t in real))

    def _made(self, info: OpInfo, args: Any, kwargs: Any) -> Any:
        """Make a tensor from nothing: real if it is small and on the CPU, else on ``meta``."""
        on_cpu = torch.device(kwargs.get("device") or "cpu").type == "cpu"
        numel, made = numel_of_factory(info, args), None
        if numel is None or numel > _SMALL or not on_cpu:
            made = range_on_meta(info, args, kwargs)
            if made is None:
                made = on_shapes(info, args, kwargs_to_meta(info, kwargs))
            numel = made.numel() if isinstance(made, Tensor) else _SMALL + 1
        return _marked(info.func(*args, **kwargs)) if numel <= _SMALL and on_cpu else made


def on_shapes(info: OpInfo, args: Any, kwargs: Any) -> Any:
    """Run an op on meta tensors, by a shortcut if there is one."""
    made = shortcut(info, args, kwargs)
    if made is not None:
        return made
    if not info.returns_tensor and _tagged(info.func):
        raise needs_values(info.name)
    try:
        return info.func(*args, **kwargs)
    except NeedsValuesError:
        raise
    except NotImplementedError as error:
        raise needs_values(info.name) from error
    except Exception as error:
        if _tagged(info.func) and asks_for_values(error):
            raise needs_values(info.name) from error
        raise


@functools.cache
def _tagged(func: OpOverload) -> bool:
    return not _NEEDS_VALUES.isdisjoint(func.tags)


def _marked(made: Any, spoilt: bool = False) -> Any:
    for tensor in made if isinstance(made, (list, tuple)) else [made]:
        if isinstance(tensor, Tensor) and not tensor.is_meta:
            storage = tensor.untyped_storage()
            setattr(storage, _MARK, "spoilt" if spoilt else getattr(storage, _MARK, "small"))
    return made


def is_readable(tensor: Tensor) -> bool:
    """Whether the pass may read the values of a real input: of a mask, of lengths or of indices.

    A floating-point input is taken for an activation, unless it holds an infinity: masks that are
    added to scores do, and activations do not.
    """
    if tensor.device.type != "cpu" or tensor.numel() > _SMALL or tensor.requires_grad:
        return False
    return not tensor.is_floating_point() or bool(tensor.isinf().any())


def readable(tensor: Tensor) -> Tensor:
    """Mark a real tensor as one that the pass may compute with and read."""
    made: Tensor = _marked(tensor)
    return made


def _mark_of(tensor: Any) -> str | None:
    if not isinstance(tensor, Tensor) or tensor.is_meta:
        return None
    return getattr(tensor.untyped_storage(), _MARK, None)


def _by_values_of(values: Tensor, func: OpOverload, args: Any) -> Any:
    """Run an op that needs the values of one argument alone; activations come out on ``meta``."""

    def known(value: Any) -> Any:
        if value is values or not isinstance(value, Tensor):
            return value
        return torch.zeros((), dtype=value.dtype).expand(value.shape)

    made = func(*map(known, args))
    return map_tensors(made, lambda t: to_meta(t) if t.is_floating_point() else readable(t))


def _is_small(tensor: Any) -> bool:
    return _mark_of(tensor) is not None


def _is_spoilt(tensor: Any) -> bool:
    return _mark_of(tensor) == "spoilt"


def _spoil(tensor: Any) -> None:
    """Note that unknown values were written to a real tensor."""
    if _is_small(tensor):
        setattr(tensor.untyped_storage(), _MARK, "spoilt")


def needs_values(op: str, error: BaseException | None = None) -> NeedsValuesError:
    """The error for a forward pass that needs values; it names the line that reads them.

    Args:
        op: the op that reads values, or the message of its error.
        error: the error to take the line from, by default the running frame.
    """
    place = where(error.__traceback__ if error is not None else None)
    return NeedsValuesError(
        f"{place}: the forward pass needs the values of a tensor here ({op}), and only its shape "
        "is known: pass real=True to run it with values"
    )


def where(trace: TracebackType | None = None) -> str:
    """``file.py:12 in forward``: the innermost line that is neither torch's nor lateinit's."""
    if trace is None:
        return innermost_foreign_line() or "inside torch"
    found = [f for f in traceback.extract_tb(trace) if not is_library(f.filename)]
    if not found:
        return "inside torch"
    return f"{found[-1].filename}:{found[-1].lineno} in {found[-1].name}"
