"""Initialisations of what has no shape yet: remembered at their place, and run once it is known.

A constructor may initialise a lazy module before its shape is known: by ``Module.apply(fn)``, or by
a function of ``nn.init`` on a placeholder. In a block a hole keeps the place, as for the lazy
module's own initialisation; ``_lazy.settle`` fills it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedTensorMixin  # type: ignore[attr-defined]

from lateinit._recording.holes import Hole, hole_of, new_hole
from lateinit._recording.writer import current
from lateinit._tensors import is_placeholder
from lateinit._torch import as_subclass, name_of_class, own_buffers, own_parameters, remove_hook
from lateinit.errors import UninitializedError

_ATTRIBUTE = "_lateinit_postponed"
_HOOK = "_lateinit_postponed_hook"
_ADVICE = "initialise it in another deferred() block, after lateinit.infer_shapes(model, ...)"
_GET_DATA = Tensor.data.__get__  # type: ignore[attr-defined]


class Postponed(NamedTuple):
    """What is to be run on a module or a tensor, and where its draws belong."""

    hole: Hole
    run: Callable[[Any], Any]


def postpone(owner: nn.Module | Tensor, run: Callable[[Any], Any]) -> None:
    """Remember to call ``run(owner)`` once the shape of ``owner`` is known."""
    known = owner.__dict__.get(_ATTRIBUTE, ())
    owner.__dict__[_ATTRIBUTE] = (*known, Postponed(new_hole(), run))


def postponed(owner: nn.Module | Tensor) -> tuple[Postponed, ...]:
    """What was postponed for an owner, in its order."""
    found: tuple[Postponed, ...] = owner.__dict__.get(_ATTRIBUTE, ())
    return found


def forget_postponed(owner: nn.Module | Tensor) -> None:
    """Forget what was postponed: it has been run."""
    owner.__dict__.pop(_ATTRIBUTE, None)
    if isinstance(owner, nn.Module) and _HOOK in owner.__dict__:
        remove_hook(owner, owner.__dict__.pop(_HOOK).id)


def _called_too_early(module: nn.Module, args: Any) -> None:
    """Forward pre-hook of a module with something postponed; comes after the one that runs it."""
    del args
    if postponed(module):
        raise UninitializedError(
            f"{name_of_class(module)} was initialised by Module.apply before its shape was known, "
            "which is done when its shape is inferred: call lateinit.infer_shapes(model, ...) "
            "before the first forward pass"
        )


def waits_for_shape(module: nn.Module) -> bool:
    """Whether a module itself is lazy, or holds a tensor that is."""
    held = (*own_parameters(module).values(), *own_buffers(module).values())
    lazy = any(tensor is not None and is_placeholder(tensor) for tensor in held)
    return lazy or "_initialize_hook" in module.__dict__


_apply = nn.Module.apply


def _applied(module: nn.Module, fn: Callable[[nn.Module], Any]) -> nn.Module:
    """``Module.apply``, which runs ``fn`` on children first."""
    if current() is None:
        return _apply(module, fn)
    for child in module.children():
        child.apply(fn)
    if not waits_for_shape(module) or not _is_made_in_block(module):
        fn(module)
        return module
    if not _is_settled(module):
        raise UninitializedError(
            f"Module.apply cannot be postponed for {name_of_class(module)}, which initialises "
            f"itself in its first call: {_ADVICE}"
        )
    postpone(module, fn)
    if _HOOK not in module.__dict__:
        module.__dict__[_HOOK] = module.register_forward_pre_hook(_called_too_early)
    return module


def _is_made_in_block(module: nn.Module) -> bool:
    held = (*own_parameters(module).values(), *own_buffers(module).values())
    return hole_of(module) is not None or any(
        tensor is not None and tensor.__dict__.get("_in_block") for tensor in held
    )


def _is_settled(module: nn.Module) -> bool:
    """Whether lateinit hears of it when a lazy module has its shape."""
    held = (*own_parameters(module).values(), *own_buffers(module).values())
    lazy = [tensor for tensor in held if tensor is not None and is_placeholder(tensor)]
    # `_label`: a part of a lazy module of lateinit's.
    return "_initialize_hook" in module.__dict__ or all(t.__dict__.get("_label") for t in lazy)


def heard(initialiser: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """An initialiser that tells a placeholder that it is called, instead of asking for its shape.

    torch/nn/init.py: only some of them ask ``has_torch_function_variadic`` themselves.
    """

    @functools.wraps(initialiser)
    def called(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if current() is not None and is_placeholder(tensor):
            # Not handle_torch_function: the function mode of the block comes first there, and runs
            # the initialiser.
            kind = type(tensor)
            heard: Tensor = kind.__torch_function__(initialiser, (kind,), (tensor, *args), kwargs)
            return heard
        return initialiser(tensor, *args, **kwargs)

    return called


_function = UninitializedTensorMixin.__dict__["__torch_function__"]


def _refused(cls: type, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
    """Torch's own placeholders in a block: what is written to ``.data`` of one would be lost."""
    if current() is None:
        return _function.__get__(None, cls)(func, types, args, kwargs)
    try:
        result = _function.__get__(None, cls)(func, types, args, kwargs)
    except ValueError as error:
        raise UninitializedError(f"{error}: {_ADVICE}") from error
    if func == _GET_DATA:
        with torch.no_grad():
            return as_subclass(type(args[0]), result, False)
    return result


INITIALISERS = (
    "dirac_",
    "eye_",
    "kaiming_normal_",
    "kaiming_uniform_",
    "orthogonal_",
    "sparse_",
    "trunc_normal_",
    "xavier_normal_",
    "xavier_uniform_",
)
"""The functions of ``nn.init`` that a block hears of, whoever has replaced them: see ``heard``."""

PATCHES: tuple[tuple[Any, str, Any], ...] = (
    (nn.Module, "apply", _applied),
    (UninitializedTensorMixin, "__torch_function__", classmethod(_refused)),
)
