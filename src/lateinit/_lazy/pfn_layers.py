"""The lazy mixin, placeholder and layers of ``pytorch_pfn_extras`` (PPE), under PPE's protocol.

The originals are in pytorch_pfn_extras/nn/modules/lazy.py and the files lazy_*.py beside it. Names
and arguments are the same, the spelling ``lazy_parmeters_determined`` included.
"""

from __future__ import annotations

import inspect
import warnings
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lateinit._lazy import placeholders
from lateinit._lazy.becoming import become
from lateinit._lazy.lazy_class import Lazy, of_plain
from lateinit._lazy.rules import size
from lateinit._torch import copy_into_state_dict, is_in_torch_optim
from lateinit.errors import UninitializedError


class UninitializedParameter(placeholders.UninitializedParameter):
    """A placeholder as PPE uses it: new tensors can be made from it (``new_ones`` and the like).

    Building an optimizer over it gives a warning, as in PPE.

    Example:
        >>> lateinit.pfn_extras.UninitializedParameter().new_empty(2).shape
        torch.Size([2])
    """

    @property
    def is_leaf(self) -> bool:  # type: ignore[override]
        """True. Warns if an optimizer reads it, which every optimizer does when it is built."""
        if is_in_torch_optim():
            warnings.warn(
                "Use of uninitialized lazy parameter in Optimizer has been detected. Maybe you "
                "forgot to run forward before passing `module.parameters()` to the optimizer?",
                stacklevel=2,
            )
        return True

    _allowed_methods: ClassVar[list[Any]] = [
        *placeholders.Placeholder._allowed_methods,
        Tensor.new_empty,
        Tensor.new_zeros,
        Tensor.new_ones,
        Tensor.new_full,
        Tensor.new_tensor,
    ]


class LazyInitializationMixin:
    """A mixin for modules that create parameters and buffers in ``forward``.

    Name them in ``lazy_parameter_names`` and ``lazy_buffer_names``, and assign them in ``forward``
    while ``isinstance(self.weight, UninitializedParameter)``. Assigning a parameter turns the
    placeholder object into that parameter, so that every reference to it stays valid. The state
    dict leaves out tensors that are not initialised.

    A module that was constructed in a ``deferred()`` block should be initialised by
    ``lateinit.infer_shapes``.

    Example:
        >>> class Scale(lateinit.pfn_extras.LazyInitializationMixin, torch.nn.Module):
        ...     lazy_parameter_names = ("weight",)
        ...     def forward(self, x):
        ...         if not self.lazy_parameters_determined:
        ...             self.weight = torch.nn.Parameter(self.weight.new_ones(x.shape[-1]))
        ...         return x * self.weight
        >>> _ = (scale := Scale())(torch.zeros(2, 3))
        >>> scale.weight.shape
        torch.Size([3])
    """

    lazy_buffer_names: tuple[str, ...] = ()
    lazy_parameter_names: tuple[str, ...] = ()

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        self._lazy_ready = False
        super().__init__(*args, **kwargs)
        for name in self.lazy_buffer_names:
            self.register_buffer(name, torch.Tensor([]))
        for name in self.lazy_parameter_names:
            self.register_parameter(name, UninitializedParameter())
        self._register_load_state_dict_pre_hook(self._lazy_load_hook)
        self._lazy_ready = True

    @property
    def lazy_parmeters_determined(self: Any) -> bool:
        """Whether every lazy parameter has its shape. The name is spelt as in PPE."""
        ready = self.__dict__.get("_lazy_ready", True)
        return ready and not any(is_lazy(self._parameters[n]) for n in self.lazy_parameter_names)

    @property
    def lazy_parameters_determined(self) -> bool:
        """Whether every lazy parameter has its shape."""
        return bool(self.lazy_parmeters_determined)

    def __setattr__(self: Any, name: str, value: Any) -> None:
        """Turn the placeholder into the assigned parameter; PPE would replace the object."""
        old = self.__dict__.get("_parameters", {}).get(name)
        if is_lazy(old) and isinstance(value, nn.Parameter) and not is_lazy(value):
            become(old, value)
        else:
            super().__setattr__(name, value)

    def _save_to_state_dict(self: Any, destination: Any, prefix: str, keep_vars: bool) -> None:
        copy_into_state_dict(self, destination, prefix, keep_vars)
        for name in (*self._parameters, *self._buffers):
            if is_lazy(destination.get(prefix + name)):
                del destination[prefix + name]

    def _lazy_load_hook(self: Any, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        """Adopt the shapes of a checkpoint; an initialised module refuses a lazy checkpoint."""
        self._load_buffers(state_dict, prefix)
        for name in self.lazy_parameter_names:
            parameter: Any = self._parameters[name]
            loaded: Any = state_dict.get(prefix + name)
            if not is_lazy(parameter) and (loaded is None or is_lazy(loaded)):
                raise _refused("parameters", prefix)
            if is_lazy(parameter) and loaded is None:
                state_dict[prefix + name] = parameter
            elif is_lazy(parameter) and not is_lazy(loaded):
                parameter.materialize(loaded.shape)

    def _load_buffers(self: Any, state_dict: dict[str, Any], prefix: str) -> None:
        for name in self.lazy_buffer_names:
            buffer, loaded = self._buffers[name], state_dict.get(prefix + name)
            # PPE's lazy buffers are `torch.Tensor([])` until they are initialised.
            ready = loaded is not None and not is_lazy(loaded) and tuple(loaded.shape) != (0,)
            if is_lazy(buffer):
                if not ready:
                    state_dict[prefix + name] = buffer
            elif tuple(buffer.shape) != (0,) and not ready:
                raise _refused("buffers", prefix)
            elif tuple(buffer.shape) == (0,) and loaded is not None and ready:
                self._buffers[name] = torch.empty_like(buffer).new_empty(loaded.shape)


def _refused(kind: str, prefix: str) -> UninitializedError:
    where = f" ({prefix.rstrip('.')})" if prefix else ""
    return UninitializedError(
        f"Can't load uninitialized {kind} in already initialized modules{where}: load a state that "
        "was saved after the first forward pass"
    )


class _LazyLayer(LazyInitializationMixin, Lazy):
    """A layer whose first argument may be None, to be inferred; its class stays as it is."""

    _parameter_kind = UninitializedParameter

    def __init__(self: Any, first: int | None, *args: Any, **kwargs: Any) -> None:
        (name,) = self._rules
        if first is None:
            Lazy.__init__(self, *args, **kwargs)
        else:
            self._plain.__init__(self, first, *args, **kwargs)
        self.__dict__.pop("_load_hook", None)  # without its handle the hook stays, as in PPE
        if first is not None:
            self._register_load_state_dict_pre_hook(self._lazy_load_hook)
        self.lazy_parameter_names = tuple(n for n, p in self._parameters.items() if p is not None)
        self.lazy_buffer_names = tuple(
            n for n, b in self._buffers.items() if b is not None and n != "num_batches_tracked"
        )
        if first is None:
            setattr(self, name, None)
        self._lazy_ready = True

    def _lazy_load_hook(self: Any, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        found = [state_dict.get(prefix + name) for name in self.lazy_parameter_names]
        if self.is_initialized or all(value is None or is_lazy(value) for value in found):
            LazyInitializationMixin._lazy_load_hook(self, state_dict, prefix, *rest)
            self._leave_lazy(state_dict, prefix)
        else:
            Lazy._lazy_load_hook(self, state_dict, prefix, *rest)

    def _leave_lazy(self: Any, state_dict: dict[str, Any], prefix: str) -> None:
        """Ignore the tensors of an uninitialised state (such as a bias): no size follows."""
        if not self.is_initialized:
            for name, tensor in (*self._parameters.items(), *self._buffers.items()):
                if is_lazy(tensor):
                    state_dict[prefix + name] = tensor


def _layer(cls: type[nn.Module], name: str, rule: size) -> type[Any]:
    """PPE's lazy version of a ``torch.nn`` class, whose argument ``name`` may be None."""
    lazy = inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    others = list(inspect.signature(cls).parameters.values())[1:]
    body: dict[str, Any] = {
        **of_plain(cls),
        "_plain": cls,
        "_rules": {name: rule},
        "cls_to_become": None,
        "__module__": __name__,
        "__signature__": inspect.Signature([lazy, *others]),
        "__doc__": f"``torch.nn.{cls.__name__}``; ``{name}`` may be None, and is then inferred.",
    }
    return type(f"Lazy{cls.__name__}", (_LazyLayer, cls), body)


LazyLinear = _layer(nn.Linear, "in_features", size(-1))
LazyConv1d = _layer(nn.Conv1d, "in_channels", size(-2, ndim=(2, 3)))
LazyConv2d = _layer(nn.Conv2d, "in_channels", size(-3, ndim=(3, 4)))
LazyConv3d = _layer(nn.Conv3d, "in_channels", size(-4, ndim=(4, 5)))
LazyBatchNorm1d = _layer(nn.BatchNorm1d, "num_features", size(1, ndim=(2, 3)))
LazyBatchNorm2d = _layer(nn.BatchNorm2d, "num_features", size(1, ndim=4))
LazyBatchNorm3d = _layer(nn.BatchNorm3d, "num_features", size(1, ndim=5))
