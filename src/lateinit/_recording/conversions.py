"""Handlers of conversions in a block: moves, casts, copies, and tensors made from data.

``x.to(...)`` returns ``x`` itself if device and dtype already match the recorded ones. Without
these handlers torch would compare with the device ``meta``, and copy in every such case.
"""

from __future__ import annotations

from collections.abc import Callable
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from lateinit._recording.argument_checks import EMPTY, check_kept
from lateinit._recording.writer import ProgramWriter
from lateinit._tensors import is_deferred_tensor, slot_of
from lateinit._torch import device_number, parse_to, to_copy, without_modes

Handler = Callable[..., Any]
_SEQUENCES = frozenset({list, tuple, range})


def of_deferred(handler: Handler) -> Handler:
    """``handler`` for deferred first arguments; calls the function itself for all others."""

    def asked(writer: ProgramWriter, func: Handler, args: tuple[Any, ...], kwargs: Any) -> Any:
        if not is_deferred_tensor(args[0]):
            return func(*args, **kwargs)
        return handler(writer, func, args, kwargs)

    return asked


def computed(writer: ProgramWriter, tensor: Tensor) -> Tensor:
    """A copy of the current values of a deferred tensor; notes that they were read if random."""
    with without_modes():
        return writer.read(tensor).clone()


def _to(writer: ProgramWriter, func: Handler, args: Any, kwargs: Any) -> Any:
    """``x.to(...)``, compared with the device that ``x`` reports inside a block."""
    tensor = args[0]
    copy = kwargs.pop("copy", False) if "copy" in kwargs else False
    others = [a for a in (*args[1:], kwargs.get("other")) if isinstance(a, Tensor)]
    if others:
        device: Any = _reported(writer, others[0])
        dtype: Any
        dtype, non_blocking, layout = others[0].dtype, False, kwargs.get("memory_format")
    else:
        positional = args[1:]
        # torch's own parser, the one of nn.Module.to, does not take copy=. Its place is third in
        # to(dtype, non_blocking, copy), fourth in to(device, dtype, non_blocking, copy).
        last = 2 if positional and isinstance(positional[0], torch.dtype) else 3
        if len(positional) > last:
            copy, positional = positional[last], positional[:last]
        device, dtype, non_blocking, layout = parse_to(*positional, **kwargs)
    device = None if device is None else _indexed(device)
    asked = tensor.dtype if dtype is None else dtype
    if device is None or device == _reported(writer, tensor):
        return func(tensor, asked, copy=copy, memory_format=_layout(layout))
    if not is_deferred_tensor(tensor):
        return func(tensor, device, asked, non_blocking, copy=copy)
    # The user requests meta: without this, the recorder would replace it by the recorded device.
    if device.type == "meta":
        writer.call = (), {"device": device}
    return to_copy(
        tensor, dtype=dtype, device=device, non_blocking=non_blocking, memory_format=layout
    )


def _layout(layout: torch.memory_format | None) -> torch.memory_format:
    return torch.preserve_format if layout is None else layout


def _indexed(device: torch.device) -> torch.device:
    # "cuda" and "cuda:0" name one device and compare unequal.
    if device.type == "cuda" and torch.cuda.is_available():
        return torch.device("cuda", device_number(device))
    return device


def _reported(writer: ProgramWriter, tensor: Tensor) -> torch.device:
    if is_deferred_tensor(tensor):
        return _indexed(writer.device_of(tensor))
    return tensor.device


# Handlers of the methods that are ``to`` under another name: each passes on to ``_to``.
def _cpu(writer: ProgramWriter, func: Handler, args: Any, kwargs: Any) -> Any:
    return _to(writer, torch.Tensor.to, (args[0], torch.device("cpu")), kwargs)


def _cuda(writer: ProgramWriter, func: Handler, args: Any, kwargs: Any) -> Any:
    asked = args[1] if len(args) > 1 else kwargs.get("device")
    device = (
        torch.device("cuda", asked) if isinstance(asked, int) else torch.device(asked or "cuda")
    )
    return _to(writer, torch.Tensor.to, (args[0], device), {})


def _to_any(writer: ProgramWriter, func: Handler, args: Any, kwargs: Any) -> Any:
    if any(isinstance(a, Tensor) and is_deferred_tensor(a) for a in (*args, kwargs.get("other"))):
        return _to(writer, func, args, dict(kwargs))
    return func(*args, **kwargs)


def _parse_to(writer: ProgramWriter, func: Handler, args: Any, kwargs: Any) -> Any:
    """``module.to(tensor)``: to the device that a deferred tensor reports inside a block."""
    parsed = func(*args, **kwargs)
    other = next((a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)), None)
    return parsed if other is None else (_reported(writer, other), *parsed[1:])


def _new_tensor(writer: ProgramWriter, func: Handler, args: Any, kwargs: Any) -> Tensor:
    given = {"dtype": args[0].dtype, "device": writer.device_of(args[0])}
    given |= {key: value for key, value in kwargs.items() if key != "data"}
    data = args[1] if len(args) > 1 else kwargs["data"]
    if isinstance(data, Tensor):
        return data.to(given["device"], given["dtype"], copy=True).detach()
    return torch.tensor(data, **given)


def _new(writer: ProgramWriter, func: Handler, args: Any, kwargs: Any) -> Tensor:
    sizes = args[1:]
    if sizes and isinstance(sizes[0], Tensor):
        alias: Tensor = torch.ops.aten.alias(sizes[0])
        return alias
    if all(isinstance(size, int) for size in sizes) or isinstance(sizes[0], torch.Size):
        shape = sizes[0] if sizes and isinstance(sizes[0], torch.Size) else sizes or (0,)
        return torch.empty(shape, dtype=args[0].dtype, device=writer.device_of(args[0]))
    return _new_tensor(writer, func, args, kwargs)


def _type(writer: ProgramWriter, func: Handler, args: Any, kwargs: Any) -> Any:
    tensor, *asked = args
    kind: Any = asked[0] if asked else kwargs.get("dtype")
    # Without an argument, type() names the legacy class, such as "torch.cuda.FloatTensor".
    if kind is None:
        name: str = func(*args, **kwargs)
        passes_for = writer.device_of(tensor).type
        own = "torch." if passes_for == "cpu" else f"torch.{passes_for}."
        return name.replace("torch.meta.", own)
    if isinstance(kind, torch.dtype):
        return func(*args, **kwargs)
    *place, last = (kind if isinstance(kind, str) else f"{kind.__module__}.{kind.__name__}").split(
        "."
    )
    dtype = getattr(getattr(torch, last, None), "dtype", None)
    if not isinstance(dtype, torch.dtype):
        return func(*args, **kwargs)  # raises torch's own message
    device = torch.device("cuda" if "cuda" in place else "cpu")
    return _to(writer, torch.Tensor.to, (tensor, device, dtype), {})


def _type_as(writer: ProgramWriter, func: Handler, args: Any, kwargs: Any) -> Any:
    return _to_any(writer, torch.Tensor.to, (*args, *kwargs.values()), {})


def from_data(writer: ProgramWriter, func: Handler, args: Any, kwargs: Any) -> Any:
    """``torch.tensor``, ``as_tensor`` and others, with a deferred tensor in their data."""
    data = args[0] if args else kwargs.get("data", kwargs.get("obj"))
    if isinstance(data, Tensor) and is_deferred_tensor(data):
        device = kwargs.get("device")
        # Already there: with device= torch would copy from meta.
        if device is not None and _indexed(torch.device(device)) == _reported(writer, data):
            kwargs = {key: value for key, value in kwargs.items() if key != "device"}
        return func(*args, **kwargs)
    try:
        return func(*args, **kwargs)
    except RuntimeError:
        real = _real(writer, data)
        if real is data:
            raise
        return func(real, *args[1:], **{k: v for k, v in kwargs.items() if v is not data})


def _real(writer: ProgramWriter, data: Any) -> Any:
    """The data with all deferred tensors replaced by their values; itself, if it has none."""
    if isinstance(data, Tensor):
        return computed(writer, data) if is_deferred_tensor(data) else data
    if not isinstance(data, (list, tuple)):
        return data
    items = [_real(writer, item) for item in data]
    return items if any(new is not old for new, old in zip(items, data, strict=True)) else data


def _by_index(writer: ProgramWriter, func: Handler, args: Any, kwargs: Any) -> Any:
    """``x[[0, 2]]``: turn index lists into tensors here, where they get values.

    torch (torch/csrc/autograd/python_variable_indexing.cpp) makes them on the device of ``x``. That
    is ``meta``, where the indices would be lost.
    """
    tensor, index, *rest = args
    alone = type(index) is not tuple
    whole = (index,) if alone else index
    if not any(type(item) in _SEQUENCES for item in whole):
        return func(*args, **kwargs)
    if alone and not all(isinstance(place, Integral) for place in index):
        return func(*args, **kwargs)  # a list of slices or of lists may stand for a tuple
    places = tuple([_places(writer, item) if type(item) in _SEQUENCES else item for item in whole])
    return func(tensor, places[0] if alone else places, *rest, **kwargs)


def _set_by_index(writer: ProgramWriter, func: Handler, args: Any, kwargs: Any) -> Any:
    """``x[index] = value``; if ``x`` is empty, as a foreign placeholder is, it runs no op."""
    if args[0].size() == EMPTY:
        check_kept(slot_of(args[0]))
    return _by_index(writer, func, args, kwargs)


def _places(writer: ProgramWriter, item: Any) -> Any:
    try:
        made = torch.tensor(item, dtype=None if len(item) else torch.int64)
    except (TypeError, ValueError, RuntimeError):
        return item  # torch raises its own message
    if is_deferred_tensor(made):
        return made
    with without_modes():  # after a block nothing has recorded it
        return writer.lift(made)


_tensor = torch.Tensor
CONVERSIONS: dict[Any, Handler] = {
    _tensor.to: _to_any,
    _tensor.cpu: of_deferred(_cpu),
    _tensor.cuda: of_deferred(_cuda),
    _tensor.type: of_deferred(_type),
    _tensor.type_as: _type_as,
    parse_to: _parse_to,
}
"""The handlers of moves and casts."""

AFTER_BLOCK: dict[Any, Handler] = {
    **CONVERSIONS,
    _tensor.__getitem__: of_deferred(_by_index),
    _tensor.__setitem__: of_deferred(_set_by_index),
}
"""The handlers of moves, casts and indices, in a block and after it."""

HANDLERS: dict[Any, Handler] = {
    **AFTER_BLOCK,
    _tensor.new_tensor: of_deferred(_new_tensor),
    _tensor.new: of_deferred(_new),
    torch.tensor: from_data,
    torch.as_tensor: from_data,
    torch.asarray: from_data,
}
"""The entries of this module in the table of ``Masquerade``."""
