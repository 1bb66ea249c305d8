"""``LazyModuleMixin``: torch's protocol of lazy modules, with the eager twin's draws.

``initialising`` decides where a lazy module is initialised: in its hole, as a trial, or for real.
``finish`` makes it an ordinary module. ``check_known`` compares a checkpoint's shapes with the
known sizes. ``lazy_class.py`` builds on these.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import lazy as torch_lazy
from torch.nn.parameter import is_lazy

from lateinit._lazy.placeholders import mismatch, show
from lateinit._lazy.settle import recorded_in, settle
from lateinit._recording import holes
from lateinit._torch import (
    here,
    name_of_class,
    own_buffers,
    own_parameters,
    remove_hook,
    restoring,
)
from lateinit.errors import UninitializedError


@contextlib.contextmanager
def trying(real: bool = False) -> Iterator[None]:
    """A block in which lazy modules are initialised as a trial, outside the model's program.

    Args:
        real: initialise with values. By default in a recording that is discarded.
    """
    before = here.trial
    try:
        here.trial = "real" if real else "aside"
        yield
    finally:
        here.trial = before


@contextlib.contextmanager
def initialising(module: nn.Module) -> Iterator[None]:
    """The block in which a lazy module is initialised.

    If the module was declared in a ``deferred()`` block, it records into the hole that was reserved
    there. Otherwise it runs eagerly, or as a trial in a ``trying`` block.
    """
    held = itertools.chain(module.parameters(), module.buffers())
    with recorded_in(holes.hole_of(module), held):
        yield


class LazyModuleMixin(torch_lazy.LazyModuleMixin):
    """A mixin for modules that initialise parameters when they see their first input.

    The protocol is that of ``torch.nn.modules.lazy.LazyModuleMixin``: register placeholders in
    ``__init__``, give them their shape in ``initialize_parameters``, and name the class to become
    in ``cls_to_become``. If the module is constructed in a ``deferred()`` block, its parameters
    become deferred and their draws take the eager twin's place in the random stream. Elsewhere they
    are allocated and drawn at the first forward call.

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

    @restoring
    def _infer_parameters(self: Any, module: Any, args: Any, kwargs: Any = None) -> None:
        """The forward pre-hook: initialise the module from the arguments of its first call."""
        if not hasattr(module, "_initialize_hook"):
            return
        loaded = is_loaded(module)
        with module._initialising():
            module.initialize_parameters(*args, **(kwargs or {}))
        finish_whole(module, loaded=loaded)

    def _initialising(self: Any) -> contextlib.AbstractContextManager[None]:
        return initialising(self)

    @restoring
    def _lazy_load_hook(self: Any, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        """Let placeholders adopt those shapes of a checkpoint that fit the known sizes."""
        wrong = check_known(self, state_dict, prefix)
        rest[-1].extend(wrong.values())  # the error messages
        for name, tensor in itertools.chain(self._parameters.items(), self._buffers.items()):
            key = prefix + name
            # torch would try to copy, and report a second error. Copying the placeholder into
            # itself prevents that.
            if is_lazy(tensor) and key in wrong:
                state_dict[key] = tensor
            elif is_lazy(tensor) and key in state_dict and not is_lazy(state_dict[key]):
                with torch.no_grad():
                    tensor.materialize(state_dict[key].shape)

    def _replicate_for_data_parallel(self: Any) -> Any:
        """Called by ``torch.nn.parallel.replicate``; refuses, as torch's own mixin does."""
        raise UninitializedError(
            f"{self._get_name()} has uninitialized parameters and can't be used with "
            "`DataParallel`: call lateinit.infer_shapes(model, ...) or run a forward pass first"
        )


def is_loaded(module: Any) -> bool:
    """Whether a lazy module has its shape already, such as from a load hook of torch's mixin."""
    return "_spec" not in module.__dict__ and not module.has_uninitialized_params()


def finish_whole(module: Any, *, loaded: bool) -> None:
    """``finish`` a module; raises if one of its tensors has no shape."""
    if module.has_uninitialized_params():
        left = [n for n, t in own_parameters(module).items() if is_lazy(t)]
        left += [n for n, t in own_buffers(module).items() if is_lazy(t)]
        raise UninitializedError(
            f"module {name_of_class(module)} has not been fully initialized: "
            f"initialize_parameters left {', '.join(left) or 'something'} without a shape"
        )
    finish(module, loaded=loaded)


def finish(module: Any, *, loaded: bool = False) -> None:
    """Remove the hooks and the hole of an initialised module, and give it its final class.

    Args:
        module: the module.
        loaded: whether it has its values from a checkpoint, so that postponed calls are not run.
    """
    final = _class_to_become(type(module)) or type(module)
    try:
        _finish(module, final)
    except BaseException:
        _finish(module, final)  # after an interrupt: half done, it is neither lazy nor ordinary
        raise
    settle(module, loaded=loaded)


def _finish(module: Any, final: type[nn.Module]) -> None:
    for name in ("_initialize_hook", "_load_hook"):
        handle = module.__dict__.get(name)
        if handle is not None:
            remove_hook(module, handle.id)
    holes.close(module)
    module.__class__ = final
    for name in ("_initialize_hook", "_load_hook"):
        module.__dict__.pop(name, None)


def _class_to_become(cls: Any) -> Any:
    """The class to become, or None; a user's subclass of a lazy layer keeps its class."""
    named = next(base for base in cls.__mro__ if "cls_to_become" in base.__dict__)
    of_layer = "_plain" in named.__dict__
    return None if of_layer and named is not cls else named.cls_to_become


def check_known(module: nn.Module, state_dict: Mapping[str, Any], prefix: str) -> dict[str, str]:
    """Compare a checkpoint's shapes with the known sizes of placeholders.

    Returns:
        A message for each key of the checkpoint whose shape contradicts its placeholder.
    """
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
    """The parameters and buffers of a module, under all of their names."""
    yield from module.named_parameters(remove_duplicate=False)
    yield from module.named_buffers(remove_duplicate=False)
