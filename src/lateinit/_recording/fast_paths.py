"""What constructors do most, answered before it reaches the dispatcher.

Factories and fills make up nearly all of a construction. Their results are known without a kernel,
and each is one op or none of a program; on its way through the dispatcher, a call costs several
times what noting it does.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable
from itertools import takewhile
from typing import Any, cast

import torch
from torch import Tensor, nn

from lateinit._program.labels import called
from lateinit._recording.factories import FillOp
from lateinit._recording.recorder import Recorder
from lateinit._tensors.slots import is_deferred_tensor
from lateinit._torch.arguments import META
from lateinit._torch.callers import is_running
from lateinit._torch.modes import below_python, is_recording_alone
from lateinit._torch.operators import by_name

Handler = Callable[..., Any]
_CPU = torch.device("cpu")
_USUAL = frozenset({"dtype", "device", "requires_grad", "size"})


def _making(fill: FillOp | None) -> Handler:
    """A handler of a factory that takes sizes."""

    def make(recorder: Recorder, func: Handler, args: Any, kwargs: Any) -> Any:
        device = kwargs.get("device")
        device = _CPU if device is None else torch.device(device)
        if device == META or not _USUAL.issuperset(kwargs) or not is_recording_alone():
            return func(*args, **kwargs)
        try:
            with below_python():
                tensor = torch.empty(*args, **(kwargs | {"device": META}))
        except (TypeError, RuntimeError):
            return func(*args, **kwargs)  # for its own message
        return recorder.made(tensor, device, fill)

    return make


def _data(recorder: Recorder, func: Handler, args: Any, kwargs: Any) -> Any:
    """``x.data``: a view, of which nothing is noted but that it exists."""
    if not is_deferred_tensor(args[0]) or not is_recording_alone():
        return func(*args, **kwargs)
    with below_python():
        data = func(*args)
    recorder.born.append(weakref.ref(data))
    return data


def _overwriting(name: str, *keywords: str) -> Handler:
    """A handler of a filling op."""

    def fill(recorder: Recorder, func: Handler, args: Any, kwargs: Any) -> Any:
        tensor, *values = args
        values += [kwargs[key] for key in takewhile(kwargs.__contains__, keywords[len(values) :])]
        usual = 1 + len(values) + ("generator" in kwargs) == len(args) + len(kwargs)
        grad = tensor.requires_grad and torch.is_grad_enabled()
        if not usual or grad or not _filled(recorder, name, tensor, values, kwargs):
            return func(*args, **kwargs)
        return tensor

    return fill


def _initialising(name: str, *keywords: str) -> Handler:
    """Likewise for a function of ``nn.init``, which passes all by name and turns gradients off."""

    def fill(recorder: Recorder, func: Handler, args: Any, kwargs: Any) -> Any:
        if args:
            kwargs = dict(zip(("tensor", *keywords), args, strict=False)) | kwargs
        tensor, values = kwargs["tensor"], [kwargs[key] for key in keywords]
        label = called(func.__name__, kwargs)
        if not _filled(recorder, name, tensor, values, kwargs, label):
            return func(**kwargs)
        return tensor

    return fill


def _filled(
    recorder: Recorder,
    name: str,
    tensor: Any,
    values: list[Any],
    given: Any,
    label: str | None = None,
) -> bool:
    """Note that a tensor is filled, if it is deferred and the values are numbers."""
    for value in values:
        if isinstance(value, Tensor):
            return False
    return recorder.overwrite(by_name(name), tensor, tuple(values), given.get("generator"), label)


class _StandIn:
    """A deferred tensor to an initialiser that asks for its sizes, and then fills it."""

    __slots__ = ("dim", "label", "recorder", "shape", "size", "tensor")

    def __init__(self, recorder: Recorder, tensor: Tensor, label: str | None) -> None:
        self.recorder = recorder
        self.tensor = tensor
        self.label = label
        self.shape = tensor.shape
        self.size = tensor.size
        self.dim = tensor.dim

    def uniform_(self, low: float, high: float, *, generator: Any = None) -> None:
        info = by_name("aten::uniform_")
        self.recorder.overwrite(info, self.tensor, (low, high), generator, self.label)

    def normal_(self, mean: float, std: float, *, generator: Any = None) -> None:
        info = by_name("aten::normal_")
        self.recorder.overwrite(info, self.tensor, (mean, std), generator, self.label)


def _scaled(recorder: Recorder, func: Handler, args: Any, kwargs: Any) -> Any:
    """An initialiser that draws once, in bounds that follow from the sizes."""
    tensor = args[0] if args else kwargs["tensor"]
    if not is_deferred_tensor(tensor) or not tensor.is_floating_point():
        return func(*args, **kwargs)
    if args:
        func(_StandIn(recorder, tensor, None), *args[1:], **kwargs)
    else:
        stand_in = _StandIn(recorder, tensor, called(func.__name__, kwargs))
        func(**(kwargs | {"tensor": stand_in}))
    return tensor


HANDLERS: dict[Any, Handler] = {
    torch.empty: _making(None),
    torch.zeros: _making(("aten::zero_", ())),
    torch.ones: _making(("aten::fill_.Scalar", (1,))),
    torch.Tensor.data.__get__: _data,  # type: ignore[attr-defined]
    torch.Tensor.zero_: _overwriting("aten::zero_"),
    torch.Tensor.fill_: _overwriting("aten::fill_.Scalar", "value"),
    torch.Tensor.normal_: _overwriting("aten::normal_", "mean", "std"),
    torch.Tensor.uniform_: _overwriting("aten::uniform_", "from", "to"),
    nn.init.normal_: _initialising("aten::normal_", "mean", "std"),
    nn.init.uniform_: _initialising("aten::uniform_", "a", "b"),
    nn.init.constant_: _initialising("aten::fill_.Scalar", "val"),
    nn.init.kaiming_uniform_: _scaled,
}
"""The handlers of these functions in ``Masquerade``."""

_INITIALISERS: dict[str, Any] = {
    name: value
    for name, value in vars(nn.init).items()
    if inspect.isfunction(value) and value.__name__ == name
}
_DEEPEST = 4  # frames from a handler up to the initialiser that is running


def initialiser_behind(func: Any) -> Handler | None:
    """The function of ``nn.init`` that is running, where another one has its name just now.

    Libraries put functions of their own there, which then call torch's; that one names itself to
    modes by its name, and so names theirs, which must not run again.
    """
    own: Any = _INITIALISERS.get(getattr(func, "__name__", ""))
    if own is None or getattr(nn.init, own.__name__) is not func:
        return None
    return cast("Handler", own) if is_running(own.__code__, _DEEPEST) else None
