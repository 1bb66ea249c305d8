"""Postpone initialisations of tensors without a shape: keep their place, run them once it is known.

A constructor may initialise a lazy module before its shape is known: by ``Module.apply(fn)``, or by
a function of ``nn.init`` on a placeholder. In a block a hole keeps the place, as for the lazy
module's own initialisation; ``_lazy.settle`` fills it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from operator import methodcaller
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.parameter import UninitializedTensorMixin  # type: ignore[attr-defined]

from lateinit._integrations import is_pfn_class
from lateinit._recording.argument_checks import NOT_YET, check_kept
from lateinit._recording.holes import FIRST_CALL, Hole, hole_of, new_hole
from lateinit._recording.writer import current
from lateinit._tensors import is_placeholder, slot_of
from lateinit._torch import (
    Rerouted,
    as_subclass,
    here,
    name_of_class,
    own_buffers,
    own_parameters,
    remove_hook,
    tensors_in,
)
from lateinit.errors import UninitializedError

_ATTRIBUTE = "_lateinit_postponed"
_HOOK = "_lateinit_postponed_hook"
_GET_DATA = Tensor.data.__get__  # type: ignore[attr-defined]


class Postponed(NamedTuple):
    """A call to run on a module or a tensor later, and the hole of its draws."""

    hole: Hole
    run: Callable[[Any], Any]


def postpone(owner: nn.Module | Tensor, run: Callable[[Any], Any]) -> None:
    """Have ``run(owner)`` called once the shape of ``owner`` is known."""
    known = owner.__dict__.get(_ATTRIBUTE, ())
    owner.__dict__[_ATTRIBUTE] = (*known, Postponed(new_hole(), run))


def postponed(owner: nn.Module | Tensor) -> tuple[Postponed, ...]:
    """The postponed calls for an owner, in their order."""
    found: tuple[Postponed, ...] = owner.__dict__.get(_ATTRIBUTE, ())
    return found


def forget_postponed(owner: nn.Module | Tensor) -> None:
    """Forget the postponed calls for an owner, which have been run."""
    owner.__dict__.pop(_ATTRIBUTE, None)
    if isinstance(owner, nn.Module) and _HOOK in owner.__dict__:
        remove_hook(owner, owner.__dict__.pop(_HOOK).id)


def check_not_postponed(module: nn.Module) -> None:
    """Raise if a call was postponed for a module, since its first call would leave it out."""
    held = (*own_parameters(module).values(), *own_buffers(module).values())
    if any(postponed(owner) for owner in (module, *held) if owner is not None):
        raise UninitializedError(
            f"{name_of_class(module)} was initialised by Module.apply or reset_parameters before "
            "its shape was known, which is done when its shape is inferred: call "
            "lateinit.infer_shapes(model, ...) before the first forward pass"
        )


def _called_too_early(module: nn.Module, args: Any) -> None:
    """Forward pre-hook of a module with a postponed call; follows the hook that runs the call."""
    del args
    if not (here.trial or here.initialising):
        check_not_postponed(module)


def first_of_hooks(module: nn.Module, hook: Callable[..., None]) -> None:
    """Register a hook for the first call of a module with a hole, before the module's own hooks."""
    if FIRST_CALL not in module.__dict__:
        module.__dict__[FIRST_CALL] = module.register_forward_pre_hook(
            hook, prepend=True, with_kwargs=True
        )


def waits_for_shape(module: nn.Module) -> bool:
    """Whether a module itself is lazy, or holds a lazy tensor."""
    return "_initialize_hook" in module.__dict__ or has_placeholders(module)


def has_placeholders(module: nn.Module) -> bool:
    """Whether a module itself holds a tensor that has no shape yet."""
    held = (*own_parameters(module).values(), *own_buffers(module).values())
    return any(tensor is not None and is_placeholder(tensor) for tensor in held)


def _postpone_call(module: nn.Module, run: Callable[[Any], Any]) -> None:
    """Postpone a call for a module, whose ``forward`` must not run before it."""
    postpone(module, run)
    if _HOOK not in module.__dict__:
        module.__dict__[_HOOK] = module.register_forward_pre_hook(_called_too_early)


_apply = nn.Module.apply


def _applied(module: nn.Module, fn: Callable[[nn.Module], Any]) -> nn.Module:
    """``Module.apply``, which runs ``fn`` on children first."""
    if current() is None:
        return _apply(module, fn)
    for child in module.children():
        child.apply(fn)
    if waits_for_shape(module) and _is_made_in_block(module):
        _postpone_call(module, fn)
    else:
        fn(module)
    return module


def _is_made_in_block(module: nn.Module) -> bool:
    held = (*own_parameters(module).values(), *own_buffers(module).values())
    return hole_of(module) is not None or any(
        tensor is not None and tensor.__dict__.get("_in_block") for tensor in held
    )


reset = methodcaller("reset_parameters")
"""Reset a module that has its sizes."""


def resets_of(cls: type) -> list[tuple[type, Callable[[Any], None]]]:
    """Replacements of a ``reset_parameters`` that does nothing while a foreign module is lazy.

    In a block it is run once the shapes are known, since the eager twin draws there.

    Returns:
        Each class among the bases of ``cls`` that has such a method, and the replacement.
    """
    lazy = [base for base in cls.__mro__ if is_pfn_class(base) or _is_lazy_class_of_torch(base)]
    return [(base, _reset_later(base)) for base in lazy if "reset_parameters" in vars(base)]


def _is_lazy_class_of_torch(cls: type) -> bool:
    return issubclass(cls, LazyModuleMixin) and cls.__module__.startswith("torch.nn.")


def _reset_later(cls: Any) -> Callable[[Any], None]:
    original = cls.reset_parameters

    @functools.wraps(original)
    def later(module: Any) -> None:
        if current() is None or hole_of(module) is None or not has_placeholders(module):
            original(module)
        else:
            _postpone_call(module, reset)

    return later


def _initialised(called: Rerouted, tensor: Any, *args: Any, **kwargs: Any) -> Any:
    """Call an initialiser; a placeholder intercepts it, and its shape is not read.

    torch/nn/init.py: only some initialisers check ``has_torch_function_variadic`` themselves.
    """
    if current() is not None and is_placeholder(tensor):
        check_kept(slot_of(tensor))
        # Not handle_torch_function, where the function mode of the block comes first and runs the
        # initialiser.
        kind = type(tensor)
        return kind.__torch_function__(called.function, (kind,), (tensor, *args), kwargs)
    return called.found(tensor, *args, **kwargs)


_function = UninitializedTensorMixin.__dict__["__torch_function__"]


def _refused(cls: type, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
    """Refuse writes to torch's own placeholders, or their ``.data``, in a block: they are lost."""
    if current() is None:
        return _function.__get__(None, cls)(func, types, args, kwargs)
    if func == Tensor.copy_ and not is_placeholder(args[1]):
        check_kept(slot_of(args[0]))
    try:
        result = _function.__get__(None, cls)(func, types, args, kwargs)
    except ValueError as error:
        slots = [slot_of(t) for t in tensors_in(args, kwargs or {}) if is_placeholder(t)]
        label = next((slot.lazy for slot in slots if slot is not None and slot.lazy), cls.__name__)
        raise UninitializedError(f"{error} ({label}): {NOT_YET}") from error
    if func == _GET_DATA:
        with torch.no_grad():
            return as_subclass(type(args[0]), result, False)
    return result


INITIALISERS = tuple(
    Rerouted(getattr(nn.init, name), _initialised)
    for name in (
        "dirac_",
        "eye_",
        "kaiming_normal_",
        "orthogonal_",
        "sparse_",
        "trunc_normal_",
        "xavier_normal_",
        "xavier_uniform_",
    )
)
"""The functions of ``nn.init`` that a block intercepts, by whatever name they are called."""

PATCHES: tuple[tuple[Any, str, Any], ...] = (
    (nn.Module, "apply", _applied),
    (UninitializedTensorMixin, "__torch_function__", classmethod(_refused)),
)
