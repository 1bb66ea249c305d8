"""Modules that initialise themselves in their first call: find which part is initialisation.

Modules of pytorch-pfn-extras create their parameters in ``forward``, others in a hook of their own.
Their first call is run up to the end of the initialisation, on inputs of which only the shape is
known (``known_by_shape``). The end is found by trial (``Noted``): the code that the first call
reaches, and a second call on the initialised module does not, is the initialisation.
"""

from __future__ import annotations

import contextlib
import itertools
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lateinit._lazy.shape_mode import needs_values, on_shapes
from lateinit._tensors import is_placeholder
from lateinit._torch import (
    META,
    CallPath,
    DispatchMode,
    FunctionMode,
    OpOverload,
    call_path,
    kwargs_to_meta,
    map_tensors,
    memory_key,
    op_info,
    stack_depth,
    tensors_in,
    to_meta,
    without_functions,
    without_modes,
)

# An attribute of the storage of an input, and of every tensor computed from it.
_MARK = "_lateinit_unknown"


class EndOfInitialisationError(BaseException):
    """Ends a first call. A ``BaseException``, so that ``except Exception`` does not catch it."""


class Noted(FunctionMode):
    """Function mode: notes, in order, the lines from which a module calls functions of torch."""

    def __init__(self) -> None:
        super().__init__()
        self.paths: list[CallPath] = []
        self._base = 0
        self._last: CallPath | None = None

    def run(self, call: Callable[[], Any]) -> None:
        """Run a call. If it fails, the lines up to the failure are noted."""
        self._base, self._last = stack_depth(), None
        with self:
            call()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        path = call_path(self._base)
        # Repeats are dropped: how many functions of torch one line calls depends on whether it runs
        # with values, since the code of lateinit and torch behind it calls some too.
        if path != self._last:
            self.note(path)
            self._last = path
        return func(*args, **(kwargs or {}))

    def note(self, path: CallPath) -> None:
        """Note a path that differs from the previous one."""
        self.paths.append(path)


class UpToEnd(Noted):
    """Function mode: ends a first call where its initialisation ends.

    Args:
        first: the paths of a first call.
        second: the paths of a second one.
    """

    def __init__(self, first: list[CallPath], second: list[CallPath]) -> None:
        super().__init__()
        common = set(second)
        self._own = Counter(path for path in first if path not in common)
        self._left = 0
        self.initialising = False

    def run(self, call: Callable[[], Any]) -> None:
        """Run a call up to the end of the initialisation."""
        self._left = self._own.total()
        with contextlib.suppress(EndOfInitialisationError):
            super().run(call)

    def note(self, path: CallPath) -> None:
        """End the call at the first function that follows the last one of the initialisation."""
        self.initialising = path in self._own
        if self.initialising:
            self._left -= 1
        elif self._left <= 0 and self._own:
            raise EndOfInitialisationError


@contextlib.contextmanager
def known_by_shape(
    module: nn.Module, device: torch.device, matters: Callable[[], bool]
) -> Iterator[None]:
    """A block that runs code on inputs of which only the shape is known (``mark_unknown``).

    Within, they report ``device``, and tensors made like them are made there. Of tensors computed
    from them, too, only the shape is known. Tensors of the module are written to only by the
    initialisation.

    Args:
        module: the module whose code runs.
        device: the device where the inputs would be.
        matters: returns whether the op that runs belongs to the initialisation.

    Raises:
        NeedsValuesError: the initialisation writes values of its inputs.
    """
    with _SaysDevice(device), _OnShapes(module, device, matters):
        yield


class _SaysDevice(FunctionMode):
    """Function mode: tensors known by shape report the device where they would be."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._answers: dict[Any, Callable[[], Any]] = {
            Tensor.device.__get__: lambda: device,
            Tensor.is_meta.__get__: lambda: device.type == "meta",  # type: ignore[attr-defined]
            Tensor.is_cpu.__get__: lambda: device.type == "cpu",  # type: ignore[attr-defined]
            Tensor.is_cuda.__get__: lambda: device.type == "cuda",  # type: ignore[attr-defined]
        }

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        answer = self._answers.get(func)
        if answer is not None and is_unknown(args[0]):
            return answer()
        return func(*args, **(kwargs or {}))


class _OnShapes(DispatchMode):
    """Dispatch mode: ops on tensors known by shape run on ``meta``, all others unchanged."""

    def __init__(
        self, module: nn.Module, device: torch.device, matters: Callable[[], bool]
    ) -> None:
        super().__init__()
        self._device = device
        self._matters = matters
        held = itertools.chain(module.parameters(), module.buffers())
        self._held = {memory_key(tensor) for tensor in held if not is_placeholder(tensor)}

    def __torch_dispatch__(
        self, func: OpOverload, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        info = op_info(func)
        written = [args[at] for at in info.mutates] + [kwargs.get(n) for n in info.mutates_kw]
        known = [t for t in tensors_in(tuple(written), {}) if not is_unknown(t)]
        drops = not self._matters() and any(memory_key(tensor) in self._held for tensor in known)
        if not drops and not any(is_unknown(tensor) for tensor in tensors_in(args, kwargs)):
            return func(*args, **kwargs)
        if info.allocates in ("like", "new"):  # reads no values
            if kwargs.get("device") == META:
                kwargs = kwargs | {"device": self._device}
            return func(*map_tensors(args, self._known), **kwargs)
        if known and not drops:
            raise needs_values(info.name)
        with without_modes():
            given = to_meta(args)
            made = on_shapes(info, given, kwargs_to_meta(info, kwargs))
        for at in info.mutates:
            if made is given[at]:
                return args[at]
        return map_tensors(made, mark_unknown)

    def _known(self, tensor: Tensor) -> Tensor:
        """A tensor with memory in place of one known by shape."""
        if not is_unknown(tensor):
            return tensor
        return torch.empty_strided(
            tensor.size(), tensor.stride(), dtype=tensor.dtype, device=self._device
        )


def is_unknown(value: Any) -> bool:
    """Whether only the shape of a tensor is known."""
    if not isinstance(value, Tensor):
        return False
    with without_functions():
        return value.is_meta and hasattr(value.untyped_storage(), _MARK)


def mark_unknown(tensor: Tensor) -> Tensor:
    """Note that only the shape of a tensor on ``meta`` is known; returns the tensor."""
    with without_functions():
        setattr(tensor.untyped_storage(), _MARK, True)
    return tensor
