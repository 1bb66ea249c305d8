"""``LazyModuleMixin``: torch's protocol, with the eager twin's place in the random stream."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules import lazy as torch_lazy
from torch.nn.parameter import is_lazy

from lateinit._lazy.placeholders import mismatch, show
from lateinit._lazy.scratch_recording import aside
from lateinit._recording import holes
from lateinit._recording.block import fill
from lateinit._tensors.guard import guard
from lateinit._tensors.slots import is_deferred_tensor
from lateinit._torch.modes import outside
from lateinit._torch.modules import name_of_class, own_buffers, own_parameters, remove_hook
from lateinit.errors import UninitializedError

TrialKind = Literal["aside", "real"]

_trial: ContextVar[TrialKind | None] = ContextVar("trial", default=None)


@contextlib.contextmanager
def trying(real: bool = False) -> Iterator[None]:
    """Initialise lazy modules, in this block, by way of trial: in their own program or for real."""
    token = _trial.set("real" if real else "aside")
    try:
        yield
    finally:
        _trial.reset(token)


@contextlib.contextmanager
def initialising(module: nn.Module) -> Iterator[None]:
    """Where a lazy module is initialised: in its hole if it has one, else for real."""
    hole = None if _trial.get() else holes.hole_of(module)
    with aside() if _trial.get() == "aside" else outside():
        if hole is None:
            yield
        else:
            with fill(hole):
                yield
    for tensor in itertools.chain(module.parameters(), module.buffers()):
        if is_deferred_tensor(tensor):
            guard(tensor)


class LazyModuleMixin(torch_lazy.LazyModuleMixin):
    """A mixin for modules that initialise parameters when they see their first input.

    The protocol is that of ``torch.nn.modules.lazy.LazyModuleMixin``: register placeholders in
    ``__init__``, give them their shape in ``initialize_parameters``, name the class to become in
    ``cls_to_become``. In a ``deferred()`` block the initialisation takes the eager twin's place in
    the random stream; elsewhere it draws when it happens.

    Example:
        >>> class Scale(lateinit.nn.LazyModuleMixin, torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.weight = lateinit.nn.UninitializedParameter(known_shape=(None,))
        ...     def initialize_parameters(self, x):
        ...         if self.has_uninitialized_params():
        ...             self.weight.materialize(x.shape[-1:])
        ...             torch.nn.init.normal_(self.weight)
        ...     def forward(self, x):
        ...         return x * self.weight
        >>> _ = (scale := Scale())(torch.zeros(2, 3))
        >>> scale.weight.shape
        torch.Size([3])
    """

    def _infer_parameters(self: Any, module: Any, args: Any, kwargs: Any = None) -> None:
        if not hasattr(module, "_initialize_hook"):
            return
        with module._initialising():
            module.initialize_parameters(*args, **(kwargs or {}))
        self._finish(module)

    def _finish(self: Any, module: Any) -> None:
        """Make an initialised module one that never was lazy."""
        if module.has_uninitialized_params():
            left = [n for n, t in own_parameters(module).items() if is_lazy(t)]
            left += [n for n, t in own_buffers(module).items() if is_lazy(t)]
            raise UninitializedError(
                f"module {name_of_class(module)} has not been fully initialized: "
                f"initialize_parameters left {', '.join(left) or 'something'} without a shape"
            )
        finish(module)

    def _initialising(self: Any) -> contextlib.AbstractContextManager[None]:
        return initialising(self)

    def _lazy_load_hook(self: Any, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        """Let placeholders adopt the shapes of a checkpoint that agree with what is known."""
        wrong = check_known(self, state_dict, prefix)
        rest[-1].extend(wrong.values())  # the error messages
        for name, tensor in itertools.chain(self._parameters.items(), self._buffers.items()):
            key = prefix + name
            if is_lazy(tensor) and key in wrong:
                state_dict[key] = tensor
            elif is_lazy(tensor) and key in state_dict and not is_lazy(state_dict[key]):
                with torch.no_grad():
                    tensor.materialize(state_dict[key].shape)

    def _replicate_for_data_parallel(self: Any) -> Any:
        raise UninitializedError(
            f"{self._get_name()} has uninitialized parameters and can't be used with "
            "`DataParallel`: call lateinit.infer_shapes(model, ...) or run a forward pass first"
        )


def finish(module: Any) -> None:
    """Take what makes a module lazy off it, and make it the class that it is to become."""
    for name in ("_initialize_hook", "_load_hook"):
        handle = module.__dict__.pop(name, None)
        if handle is not None:
            remove_hook(module, handle.id)
    holes.close(module)
    become = _class_to_become(type(module))
    if become is not None:
        module.__class__ = become


def _class_to_become(cls: Any) -> Any:
    """What a class names in ``cls_to_become``; a user's subclass of a lazy layer stays itself."""
    named = next(base for base in cls.__mro__ if "cls_to_become" in base.__dict__)
    of_layer = "_plain" in named.__dict__
    return None if of_layer and named is not cls else named.cls_to_become


def check_known(module: nn.Module, state_dict: Mapping[str, Any], prefix: str) -> dict[str, str]:
    """What disagrees between a checkpoint and what is known of the shapes of placeholders."""
    wrong = {}
    for name, tensor in named_tensors(module):
        found = state_dict.get(prefix + name)
        if is_lazy(tensor) and isinstance(found, Tensor) and not is_lazy(found):
            known = tensor.__dict__.get("_known")
            if reason := mismatch(known, tuple(found.shape)):
                wrong[prefix + name] = (
                    f"{prefix}{name}: the checkpoint has {show(tuple(found.shape))}, but {reason}"
                )
    return wrong


def named_tensors(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """Parameters and buffers by all of their names."""
    yield from module.named_parameters(remove_duplicate=False)
    yield from module.named_buffers(remove_duplicate=False)
