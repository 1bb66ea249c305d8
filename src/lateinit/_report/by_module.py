"""Totals of each module, and its calls in a forward pass of an example."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.jit import ScriptModule
from torch.utils.flop_counter import FlopCounterMode

from lateinit._identity import IdentityMap
from lateinit._lazy import observe_forward, show
from lateinit._report.name_folding import fold
from lateinit._torch import map_leaves
from lateinit._units import format_bytes, format_count
from lateinit.errors import listing

HEADS = ("module", "class", "parameters", "bytes")
HEADS_OF_PASS = ("input", "output", "FLOPs")
Shapes = tuple[tuple[int, ...], ...]


@dataclass(frozen=True, slots=True)
class Module:
    """One module with its submodules. A tensor with several names counts once.

    Attributes:
        name: its first name; empty for the model itself.
        kind: the name of its class.
        parameters: elements of its parameters.
        buffers: elements of its buffers.
        nbytes: bytes of its tensors, shared memory once.
        inputs: the shapes of the tensor arguments of its first call; None without an example, or if
            the pass did not call it.
        outputs: the shapes of the results of its first call.
        flops: floating-point operations of all its calls, as ``torch.utils.flop_counter`` counts.
        calls: how often the pass called it.
    """

    name: str
    kind: str
    parameters: int
    buffers: int
    nbytes: int
    inputs: Shapes | None = None
    outputs: Shapes | None = None
    flops: int | None = None
    calls: int | None = None

    @property
    def alike(self) -> tuple[Any, ...]:
        """The key that modules on one printed line have in common."""
        return self.kind, self.parameters, self.nbytes, self.inputs, self.outputs, self.flops


@dataclass(slots=True)
class Calls:
    """The calls of one module in a forward pass."""

    inputs: Shapes
    outputs: Shapes = ()
    flops: int = 0
    calls: int = 0


@dataclass(slots=True)
class Observer:
    """Notes the calls of modules in one forward pass.

    Attributes:
        met: the modules that were called.
        _open: the calls that have not returned, with the operations counted before each.
    """

    met: IdentityMap[nn.Module, Calls] = field(default_factory=IdentityMap)
    _open: list[tuple[nn.Module, int]] = field(default_factory=list)

    @contextlib.contextmanager
    def watch(self, model: nn.Module) -> Iterator[None]:
        """Count within the block. The caller removes the hooks when it restores the model."""
        with FlopCounterMode(display=False) as counter:

            def before(module: nn.Module, args: Any, kwargs: Any) -> None:
                self.met.setdefault(module, Calls(_shapes((args, kwargs))))
                self._open.append((module, counter.get_total_flops()))

            def after(module: nn.Module, args: Any, result: Any) -> None:
                if not self._is_open(module):  # a hook of the module itself failed before this one
                    return
                part, start = self._open.pop()
                while part is not module:
                    part, start = self._open.pop()
                found = self.met[module]
                if not self._is_open(module):  # a recursive call is part of the outer one
                    found.flops += counter.get_total_flops() - start
                found.outputs = found.outputs if found.calls else _shapes(result)
                found.calls += 1

            for part in model.modules():
                if not isinstance(part, ScriptModule):  # it refuses hooks that are Python functions
                    part.register_forward_pre_hook(before, with_kwargs=True)
                    # Also after a call that failed, since the model may catch the error.
                    part.register_forward_hook(after, always_call=True)
            yield

    def _is_open(self, module: nn.Module) -> bool:
        return any(part is module for part, _ in self._open)


def observed(model: nn.Module, example: Any, *, real: bool) -> IdentityMap[nn.Module, Calls]:
    """The calls of each module in a forward pass of an example; the model stays as it is.

    Args:
        model: the model; lazy modules are initialised as a trial.
        example: the arguments: a tensor, a tuple or list of them, or a mapping by name.
        real: compute with values.

    Raises:
        TypeError: the example holds no tensor.
    """
    if not _tensors(example):
        raise TypeError(
            f"example={example!r} holds no tensor: give the inputs of forward, such as "
            "torch.empty(1, 3, 224, 224, device='meta'), several as a tuple, or a dict by name"
        )
    observer = Observer()
    if isinstance(example, Mapping):
        args, kwargs = (), dict(example)
    else:
        # A named tuple, such as a PackedSequence, is one argument.
        args, kwargs = tuple(example) if type(example) in (tuple, list) else (example,), {}
    observe_forward(model, args, kwargs, observer.watch, real=real)
    return observer.met


def _tensors(values: Any) -> list[Tensor]:
    found: list[Tensor] = []

    def note(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            found.append(leaf)
        return leaf  # the containers are rebuilt, and some check their items

    map_leaves(note, values)
    return found


def _shapes(values: Any) -> Shapes:
    return tuple(tuple(tensor.shape) for tensor in _tensors(values))


def folded(modules: tuple[Module, ...]) -> list[tuple[str, list[Module]]]:
    """The modules of each line, under one name."""
    return fold(modules, lambda module: module.name, lambda module: module.alike)


def cells(name: str, rows: list[Module], *, of_pass: bool) -> tuple[str, ...]:
    """The line of some modules."""
    first = rows[0]
    times = f"  x{len(rows)}" if len(rows) > 1 else ""
    shown = (
        f"{name or '(model)'}{times}",
        first.kind,
        f"{sum(row.parameters for row in rows):,}",
        format_bytes(sum(row.nbytes for row in rows)),
    )
    if not of_pass:
        return shown
    if first.calls is None:
        return (*shown, "not called", "", "")
    flops = format_count(sum(row.flops or 0 for row in rows))
    again = f" (x{first.calls})" if first.calls > 1 else ""
    return (*shown, _told(first.inputs) + again, _told(first.outputs), flops)


def _told(shapes: Shapes | None) -> str:
    return listing([show(shape) for shape in shapes or ()], 3) or "no tensor"
