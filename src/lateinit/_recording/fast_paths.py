"""Handlers of the most frequent calls of a constructor: record them before the dispatcher.

Nearly all calls of a construction are factories and fills. Their results are known without a
kernel, and each is one op in the program or none. Going through the dispatcher takes several times
as long as recording the op. If anything about a call is unusual, the handler calls the function,
and the dispatcher records it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from itertools import takewhile
from typing import Any, cast

import torch
from torch import Tensor, nn

from lateinit._program import NUMBERS, called
from lateinit._recording.conversions import from_data
from lateinit._recording.writer import ProgramWriter, current
from lateinit._tensors import PLAIN_CLASSES, is_deferred_tensor, is_placeholder
from lateinit._torch import (
    FILL,
    META,
    NORMAL,
    OP_TABLE,
    UNIFORM,
    ZERO,
    OpInfo,
    WeakTensor,
    below_python,
    by_name,
    device_of_result,
    is_recording_alone,
    is_running,
    without_functions,
)

Handler = Callable[..., Any]
_CPU = torch.device("cpu")
_USUAL = frozenset({"dtype", "device", "requires_grad", "size"})
_DTYPE = frozenset({"dtype", "device"})
_HOST = (None, "cpu", _CPU)
_GENERATOR = ("generator",)


def _making(name: str) -> Handler:
    """The handler of a factory, by the name of its op, that takes sizes alone."""
    fill = by_name(name).fill_for(())

    def make(writer: ProgramWriter, func: Handler, args: Any, kwargs: Any) -> Any:
        device = kwargs.get("device")
        device = _CPU if device is None else device_of_result(device)
        if device == META or not _USUAL.issuperset(kwargs) or not is_recording_alone():
            return func(*args, **kwargs)
        try:
            with below_python():
                tensor = torch.empty(*args, **(kwargs | {"device": META}))
        except (TypeError, RuntimeError):
            return func(*args, **kwargs)  # raises torch's own message
        return writer.made(tensor, device, fill)

    return make


def _from_number(writer: ProgramWriter, func: Handler, args: Any, kwargs: Any) -> Any:
    """``torch.tensor(number)``: a constant, such as the counter of every batch norm."""
    number = len(args) == 1 and type(args[0]) in NUMBERS
    usual = number and _DTYPE.issuperset(kwargs) and kwargs.get("device") in _HOST
    if not usual or not is_recording_alone():
        return from_data(writer, func, args, kwargs)
    with below_python():
        return writer.keep(func(*args, **kwargs))


def _data(writer: ProgramWriter, func: Handler, args: Any, kwargs: Any) -> Any:
    """``x.data``: a view, which needs no op; it is only noted, to be guarded later."""
    if not is_deferred_tensor(args[0]) or not is_recording_alone():
        return func(*args, **kwargs)
    with below_python():
        data = func(*args)
    writer.born.append(WeakTensor(data))
    return data


def _overwriting(name: str) -> Handler:
    """The handler of an in-place fill, by the name of its op."""
    info = by_name(name)
    keywords = info.arguments[1:]

    def fill(writer: ProgramWriter, func: Handler, args: Any, kwargs: Any) -> Any:
        tensor, values = args[0], args[1:]
        if kwargs:
            rest = takewhile(kwargs.__contains__, keywords[len(values) :])
            values += tuple([kwargs[key] for key in rest])
        # A call with any other argument is left to torch, and so is an in-place write that autograd
        # may have to refuse.
        usual = 1 + len(values) + ("generator" in kwargs) == len(args) + len(kwargs)
        grad = tensor.requires_grad and torch.is_grad_enabled()
        if not usual or grad or not _filled(writer, info, tensor, values, kwargs):
            return func(*args, **kwargs)
        return tensor

    return fill


def _initialising(name: str, *keywords: str) -> Handler:
    """The handler of a function of ``nn.init`` that is one in-place fill.

    torch/nn/init.py passes every argument by name to ``handle_torch_function``. It fills under
    ``no_grad``, so autograd has nothing to refuse.
    """
    info = by_name(name)

    def fill(writer: ProgramWriter, func: Handler, args: Any, kwargs: Any) -> Any:
        if args:
            kwargs = dict(zip(("tensor", *keywords), args, strict=False)) | kwargs
        tensor, values = kwargs["tensor"], tuple([kwargs[key] for key in keywords])
        label = called(func.__name__, kwargs)
        if not _filled(writer, info, tensor, values, kwargs, label):
            return func(**kwargs)
        return tensor

    return fill


def _filled(
    writer: ProgramWriter,
    info: OpInfo,
    tensor: Any,
    values: tuple[Any, ...],
    given: Any,
    label: str | None = None,
) -> bool:
    """Record a fill; False if the tensor is lazy or not deferred, or a value is a tensor."""
    if type(tensor) not in PLAIN_CLASSES and is_placeholder(tensor):
        return False
    for value in values:
        if isinstance(value, Tensor):
            return False
    return writer.overwrite(info, tensor, values, given.get("generator"), label)


def _without_gradients(private: str, name: str, numbers: int) -> Handler:
    """The replacement of a private function of torch/nn/init.py that is one fill under ``no_grad``.

    It is recorded here, since ``no_grad`` alone makes two calls of the function mode.
    """
    original: Handler = getattr(nn.init, private)
    info = by_name(name)

    def fill(tensor: Tensor, *values: Any, **named: Any) -> Tensor:
        writer = current()
        usual = not named and numbers <= len(values) <= numbers + info.takes_generator
        if writer is None or not usual or not is_recording_alone(functions=1):
            original(tensor, *values, **named)
            return tensor
        given = dict(zip(_GENERATOR, values[numbers:], strict=False))
        with without_functions():
            recorded = _filled(writer, info, tensor, values[:numbers], given)
        if not recorded:
            original(tensor, *values)
        return tensor

    return fill


class _StandIn:
    """Stands in for a deferred tensor in an initialiser that reads its sizes, then fills it.

    The initialiser computes its bounds as usual; the fill is recorded without the dispatcher.
    """

    __slots__ = ("dim", "label", "shape", "size", "tensor", "writer")

    def __init__(self, writer: ProgramWriter, tensor: Tensor, label: str | None) -> None:
        self.writer = writer
        self.tensor = tensor
        self.label = label
        self.shape = tensor.shape
        self.size = tensor.size
        self.dim = tensor.dim

    def uniform_(self, low: float, high: float, *, generator: Any = None) -> None:
        info = by_name(UNIFORM)
        self.writer.overwrite(info, self.tensor, (low, high), generator, self.label)

    def normal_(self, mean: float, std: float, *, generator: Any = None) -> None:
        info = by_name(NORMAL)
        self.writer.overwrite(info, self.tensor, (mean, std), generator, self.label)


def _scaled(writer: ProgramWriter, func: Handler, args: Any, kwargs: Any) -> Any:
    """The handler of an initialiser that makes one draw, scaled by the sizes of the tensor."""
    tensor = args[0] if args else kwargs["tensor"]
    if not is_deferred_tensor(tensor) or not tensor.is_floating_point():
        return func(*args, **kwargs)
    if args:
        func(_StandIn(writer, tensor, None), *args[1:], **kwargs)
    else:
        stand_in = _StandIn(writer, tensor, called(func.__name__, kwargs))
        func(**(kwargs | {"tensor": stand_in}))
    return tensor


HANDLERS: dict[Any, Handler] = {
    torch.empty: _making("aten::empty.memory_format"),
    torch.zeros: _making("aten::zeros"),
    torch.ones: _making("aten::ones"),
    torch.tensor: _from_number,
    torch.Tensor.data.__get__: _data,  # type: ignore[attr-defined]
    **{by_name(n).call: _overwriting(n) for n, traits in OP_TABLE.items() if traits.method},
    nn.init.normal_: _initialising(NORMAL, "mean", "std"),
    nn.init.uniform_: _initialising(UNIFORM, "a", "b"),
    nn.init.constant_: _initialising(FILL, "val"),
    nn.init.kaiming_uniform_: _scaled,
}
"""The entries of this module in the table of ``Masquerade``."""

PATCHES: tuple[tuple[Any, str, Any], ...] = tuple(
    (nn.init, private, _without_gradients(private, name, numbers))
    for private, name, numbers in (
        ("_no_grad_zero_", ZERO, 0),
        ("_no_grad_fill_", FILL, 1),
        ("_no_grad_normal_", NORMAL, 2),
        ("_no_grad_uniform_", UNIFORM, 2),
    )
)
"""What ``patches`` replaces for this module."""

_INITIALISERS: dict[str, Any] = {
    name: value
    for name, value in vars(nn.init).items()
    if inspect.isfunction(value) and value.__name__ == name
}
# How many callers of a function mode are searched for an initialiser. In torch 2.13 it is the
# second caller, after handle_torch_function (torch/overrides.py).
_DEEPEST = 4


def initialiser_behind(func: Any) -> Handler | None:
    """The original initialiser of torch, if ``func`` is a library's wrapper that has called it.

    Libraries replace functions of ``nn.init`` (such as ``nn.init.normal_``) by wrappers that call
    the original. The original looks up its own global name, which is now the wrapper, and passes
    that to ``handle_torch_function``. Calling the wrapper again would recurse.

    Returns:
        The original function if it is running, else None.
    """
    own: Any = _INITIALISERS.get(getattr(func, "__name__", ""))
    if own is None or getattr(nn.init, own.__name__) is not func:
        return None
    return cast("Handler", own) if is_running(own.__code__, _DEEPEST) else None
