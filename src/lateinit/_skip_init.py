"""``skip_init``: construct a module with uninitialised parameters."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import nn

from lateinit._identity import IdentityMap
from lateinit._materialize.materialize import materialize
from lateinit._recording import deferred
from lateinit._tensors import adopt_uninitialized, cast_to, find_tensors, slot_of
from lateinit._torch import restoring

M = TypeVar("M", bound=nn.Module)


@restoring
def skip_init(
    module_cls: type[M], *args: Any, device: torch.device | str | None = None, **kwargs: Any
) -> M:
    """Construct a module without initialising its parameters.

    Parameters are allocated and hold arbitrary values: fill them before use. Buffers and other
    tensors have their true values. Unlike ``torch.nn.utils.skip_init``, this does not require the
    class to take an argument ``device``, and its constructor may compute with its parameters. The
    global random generators are left as they are.

    Args:
        module_cls: a subclass of ``torch.nn.Module``.
        *args: arguments of its constructor.
        device: the device to allocate on; by default the one that the constructor asks for.
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
    where = cast_to(device, None).device
    with deferred(advance_rng=False):
        module = module_cls(*args, **kwargs)
    found = [f for f in find_tensors(module) if f.deferred]
    parameters = IdentityMap((parameter, None) for parameter in module.parameters())
    others = {slot_of(f.tensor) for f in found if f.tensor not in parameters}
    # A parameter that shares its storage with a buffer or another tensor must have true values.
    for item in found:
        if slot_of(item.tensor) not in others:
            adopt_uninitialized(item.tensor, where)
    return materialize(module, device=where)
