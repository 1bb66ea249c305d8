"""``skip_init``: construct a module with uninitialised parameters."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Container
from typing import Any, ParamSpec, TypeVar, overload

import torch
from torch import nn

from lateinit._identity import IdentityMap
from lateinit._materialize.materialize import materialize
from lateinit._recording import deferred
from lateinit._tensors import adopt_uninitialized, device_of, find_tensors, slot_of
from lateinit._torch import restoring

M = TypeVar("M", bound=nn.Module)
P = ParamSpec("P")


@overload
def skip_init(module_cls: Callable[P, M], /, *args: P.args, **kwargs: P.kwargs) -> M: ...


# For classes that take no `device`: PEP 612 allows no keyword argument beside `P.kwargs`.
@overload
def skip_init(
    module_cls: type[M], /, *args: Any, device: torch.device | str | None, **kwargs: Any
) -> M: ...


# mypy is right: the constructor of a class then cannot have an argument called module_cls.
@restoring  # type: ignore[misc]
def skip_init(
    module_cls: Any, *args: Any, device: torch.device | str | None = None, **kwargs: Any
) -> Any:
    """Construct a module without initialising its parameters.

    Parameters are allocated and hold arbitrary values: fill them before use. Buffers and other
    tensors have their true values. Unlike ``torch.nn.utils.skip_init``, this does not require the
    class to take an argument ``device``, and its constructor may compute with its parameters. The
    global random generators are left as they are.

    Args:
        module_cls: a subclass of ``torch.nn.Module``.
        *args: arguments of its constructor.
        device: the device to allocate on; by default the device that the constructor asks for. If
            the class takes an argument ``device``, it receives this device. On ``meta`` no tensor
            has values.
        **kwargs: keyword arguments of its constructor.

    Returns:
        The module.

    Raises:
        RuntimeError: ``module_cls`` is no subclass of ``torch.nn.Module``, as torch raises it.

    Example:
        >>> layer = lateinit.skip_init(torch.nn.BatchNorm2d, 3)
        >>> layer.running_var
        tensor([1., 1., 1.])
    """
    cls: object = module_cls
    if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
        raise RuntimeError(f"Expected a Module; got {module_cls}")  # noqa: TRY004 - as torch's
    where = None if device is None else torch.device(device)
    if where is not None and "device" in _arguments(cls):
        kwargs["device"] = device
    places = {place.type for place in (where, torch.get_default_device()) if place is not None}
    # Tensors constructed on meta stay there, so the requested device must be the default device.
    inside = where if where is not None and "meta" in places else contextlib.nullcontext()
    with deferred(advance_rng=False), inside:
        module = module_cls(*args, **kwargs)
    where = None if where is None or where.type == "meta" else device_of(where)
    found = [f for f in find_tensors(module) if f.deferred]
    parameters = IdentityMap((parameter, None) for parameter in module.parameters())
    others = {slot_of(f.tensor) for f in found if f.tensor not in parameters}
    # A parameter that shares its storage with a buffer or another tensor must have its true values.
    for item in found:
        if slot_of(item.tensor) not in others:
            adopt_uninitialized(item.tensor, where)
    return materialize(module, device=where)


def _arguments(cls: type) -> Container[str]:
    try:
        return inspect.signature(cls).parameters
    except ValueError:  # a constructor written in C
        return ()
