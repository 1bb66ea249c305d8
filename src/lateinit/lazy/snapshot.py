"""Lending a model's modules to a forward pass, and putting everything back.

For the time of the pass each tensor of the model has a stand-in, so that nothing which the
pass does to tensors, attributes, hooks or flags is seen afterwards.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedTensorMixin  # type: ignore[attr-defined]

from lateinit.errors import RecordingError
from lateinit.lazy.placeholders import Placeholder
from lateinit.lazy.shapes import readable
from lateinit.lazy.values import real_stand_in
from lateinit.tensors import is_deferred_tensor, original_class
from lateinit.walk import is_placeholder

_CONTAINERS = (dict, list, set)
StandIn = Callable[[Tensor], Tensor]


class Snapshot:
    """All that modules hold, by object: attributes, and what is in containers, however deep."""

    def __init__(self, root: nn.Module) -> None:
        self.modules = list(root.modules())
        self._classes = [type(module) for module in self.modules]
        self._held: dict[int, tuple[Any, Any]] = {}
        for module in self.modules:
            self._keep(module.__dict__)

    def _keep(self, container: Any) -> None:
        if id(container) in self._held:
            return
        self._held[id(container)] = container, copy.copy(container) if container else None
        values = container.values() if isinstance(container, dict) else container
        for value in values:
            if isinstance(value, _CONTAINERS):
                self._keep(value)

    def restore(self) -> None:
        """Put everything back."""
        for container, held in self._held.values():
            if held is None and not container:
                continue
            container.clear()
            if held is not None:
                container.extend(held) if isinstance(container, list) else container.update(held)
        for module, cls in zip(self.modules, self._classes, strict=True):
            module.__class__ = cls


class Lending:
    """Puts stand-ins in the place of tensors; one for each tensor, wherever it is met."""

    def __init__(self, stand_in: StandIn) -> None:
        self._stand_in = stand_in
        self._made: dict[int, tuple[Tensor, Tensor]] = {}
        self._ours: set[int] = set()

    def of(self, tensor: Tensor) -> Tensor:
        """The stand-in of a tensor."""
        if id(tensor) in self._ours and not is_deferred_tensor(tensor):
            return tensor
        known = self._made.get(id(tensor))
        if known is None:
            made = self.make(tensor)
            known = self._made[id(tensor)] = tensor, made
            self._ours.add(id(made))
        return known[1]

    def make(self, tensor: Tensor) -> Tensor:
        """A stand-in for a tensor that is met for the first time."""
        return clone_placeholder(tensor) if is_placeholder(tensor) else self._stand_in(tensor)

    def lend(self, root: nn.Module) -> None:
        """Put stand-ins in a module and all below it."""
        for module in root.modules():
            self._replace(module.__dict__, set())

    def _replace(self, container: Any, seen: set[int]) -> None:
        seen.add(id(container))
        items = list(container.items() if isinstance(container, dict) else enumerate(container))
        for key, value in items:
            if isinstance(value, Tensor):
                container[key] = self.of(value)
            elif type(value) is tuple and any(isinstance(item, Tensor) for item in value):
                container[key] = tuple(
                    self.of(item) if isinstance(item, Tensor) else item for item in value
                )
            elif isinstance(value, (dict, list)) and value and id(value) not in seen:
                self._replace(value, seen)


def clone_placeholder(placeholder: Any) -> Any:
    """A placeholder like another one."""
    if isinstance(placeholder, Placeholder):
        return copy.deepcopy(placeholder)
    if isinstance(placeholder, UninitializedTensorMixin):
        made = original_class(placeholder)
        return made(placeholder.requires_grad, "cpu", placeholder.dtype)
    return original_class(placeholder)(torch.empty(0, dtype=placeholder.dtype))


def on_meta(tensor: Tensor) -> Tensor:
    """A stand-in without memory."""
    with torch._C.DisableTorchFunctionSubclass():
        shape, grad = tensor.size(), tensor.requires_grad
        try:
            made = torch.empty_strided(shape, tensor.stride(), dtype=tensor.dtype, device="meta")
        except RuntimeError:  # layouts that have no strides
            made = torch.empty(shape, dtype=tensor.dtype, device="meta")
        is_parameter = isinstance(tensor, nn.Parameter)
        return nn.Parameter(made, grad) if is_parameter else made.requires_grad_(grad)


def on_shapes(tensor: Tensor) -> Tensor:
    """A stand-in without memory; of a counter one with its value, which steers a forward pass.

    A batch norm that averages over all batches reads how many there were.
    """
    with torch._C.DisableTorchFunctionSubclass():
        counts = tensor.dim() == 0 and not (tensor.is_floating_point() or tensor.is_complex())
    if not counts or (tensor.is_meta and not is_deferred_tensor(tensor)):
        return on_meta(tensor)
    try:
        return readable(real_stand_in(tensor, past_holes=False))
    except RecordingError:  # it depends on what lazy modules will draw
        return on_meta(tensor)


class RandomStates:
    """The states of the global random generators, kept and put back."""

    def __init__(self) -> None:
        self._python, self._numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
        self._torch = torch.default_generator.get_state()
        ready = torch.cuda.is_available() and torch.cuda.is_initialized()
        self._cuda = torch.cuda.get_rng_state_all() if ready else []

    def restore(self) -> None:
        """Put them back."""
        random.setstate(self._python)
        np.random.set_state(self._numpy)  # noqa: NPY002
        torch.default_generator.set_state(self._torch)
        if self._cuda:
            torch.cuda.set_rng_state_all(self._cuda)
