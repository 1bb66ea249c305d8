"""The protocols of lazy modules: lateinit's, torch's, pytorch-pfn-extras' (PPE's), and others'.

lateinit's and torch's modules initialise themselves in ``initialize_parameters``, called by a
forward pre-hook. PPE's create their parameters in ``forward`` itself, and others, which hold
torch's placeholders without torch's mixin, in a hook of their own. ``infer_shapes`` uses all of
them through ``is_lazy_module`` and ``initialise``.
"""

from __future__ import annotations

import contextlib
import itertools
from typing import Any

from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin

from lateinit._lazy.becoming import become, device_of
from lateinit._lazy.first_call import Noted, UpToEnd, is_unknown, known_by_shape
from lateinit._lazy.mixin import LazyModuleMixin as OurMixin
from lateinit._lazy.mixin import finish, finish_whole, initialising, is_loaded
from lateinit._lazy.scratch_recording import aside
from lateinit._lazy.settle import settle
from lateinit._recording import draw_again, holes
from lateinit._tensors import is_placeholder
from lateinit._torch import here, is_lazy_misuse, name_of_class, own_buffers, own_parameters
from lateinit.errors import NeedsValuesError, UninitializedError


def is_lazy_module(module: nn.Module) -> bool:
    """Whether a module waits for its first input, by any of the protocols."""
    if isinstance(module, LazyModuleMixin):
        return hasattr(module, "_initialize_hook")
    return waits_for_call(module)


def waits_for_call(module: nn.Module) -> bool:
    """Whether a module initialises itself somewhere in its first call, and has not done so."""
    # The misspelling is that of pytorch_pfn_extras/nn/modules/lazy.py.
    determined = getattr(module, "lazy_parmeters_determined", None)
    if determined is None:
        held = itertools.chain(own_parameters(module).values(), own_buffers(module).values())
        return any(tensor is not None and is_placeholder(tensor) for tensor in held)
    return determined is False


def initialise(module: Any, args: Any, kwargs: Any, end: UpToEnd | None = None) -> None:
    """Initialise a lazy module as its first call would.

    Args:
        module: any module; one that is not lazy is left alone.
        args: the arguments of the call, on ``meta`` and marked as unknown.
        kwargs: its keyword arguments.
        end: ends the call after the initialisation, for a module that ``waits_for_call``.

    Raises:
        NeedsValuesError: the module initialises a tensor with values of its input.
    """
    if not is_lazy_module(module):
        return
    if "_spec" in module.__dict__:  # its rules read only shapes
        module._infer_parameters(module, args, kwargs)
        return
    before = {**own_parameters(module), **own_buffers(module)}
    lazy = {name for name, tensor in before.items() if _is_waiting(tensor)}
    try:
        if end is not None:
            _by_call(module, args, kwargs, end)
        else:
            _by_method(module, args, kwargs)
    except NeedsValuesError as error:
        raise _needs_values(module, str(error)) from error
    _check_known(module, before, lazy)


def _by_method(module: Any, args: Any, kwargs: Any) -> None:
    """Call ``initialize_parameters``, and make the module an ordinary one."""
    ours = isinstance(module, OurMixin)
    held = [*own_parameters(module).values(), *own_buffers(module).values()]
    loaded = is_loaded(module)
    with (
        module._initialising() if ours else initialising(module),
        known_by_shape(module, device_of(held), lambda: True),
    ):
        module.initialize_parameters(*args, **kwargs)
        if loaded and not ours and not here.trial:
            draw_again(module)
    (finish_whole if ours else finish)(module, loaded=loaded)


def close_holes(module: nn.Module) -> None:
    """Fill the holes of modules that got their shapes in another way, such as from a checkpoint."""
    for part in module.modules():
        hole = holes.hole_of(part)
        if hole is None or is_lazy_module(part):
            continue
        program, number, _ = hole.resolve()
        if program.holes[number] is None:
            with initialising(part):
                draw_again(part)
        holes.close(part)
        settle(part, loaded=True)


def _by_call(module: Any, args: Any, kwargs: Any, end: UpToEnd) -> None:
    """Run a call up to the end of the initialisation."""
    before = dict(own_parameters(module))
    with (
        _evaluating(module),
        initialising(module),
        known_by_shape(module, device_of(before.values()), lambda: end.initialising),
    ):
        end.run(lambda: called(module)(*args, **kwargs))
    # PPE's modules replace their placeholders by new parameters. An optimizer may hold the
    # placeholder objects, so these become the parameters.
    for name, placeholder in before.items():
        made = own_parameters(module).get(name)
        if made is not None and placeholder is not None and made is not placeholder:
            become(placeholder, made)
            own_parameters(module)[name] = placeholder
    holes.close(module)
    settle(module)


def end_of_initialisation(module: nn.Module, args: Any, kwargs: Any, *, real: bool) -> UpToEnd:
    """Find out, by two calls, where the initialisation ends in the first call of a module.

    The caller must undo the effects of the calls.

    Args:
        module: a module that ``waits_for_call``.
        args: the arguments of the call; marked as unknown, unless ``real``.
        kwargs: its keyword arguments.
        real: whether to run the calls with values.
    """
    first, second = Noted(), Noted()
    for noted in (first, second):
        with (
            _evaluating(module),
            contextlib.nullcontext() if real else aside(),
            known_by_shape(module, device_of(own_parameters(module).values()), lambda: False),
        ):
            try:
                noted.run(lambda: called(module)(*args, **kwargs))
            except Exception as error:
                # An error after the initialisation does not matter here: the call itself raises it.
                if not waits_for_call(module):
                    continue
                if not is_lazy_misuse(error):
                    raise
                raise UninitializedError(
                    f"{name_of_class(module)} holds tensors without a shape, and neither its "
                    f"forward nor a hook of its own gives them one: {error}"
                ) from error
    return UpToEnd(first.paths, second.paths)


def called(module: Any) -> Any:
    """The function to run as a module's first call: ``forward``, or the module with its hooks."""
    return module.forward if hasattr(module, "lazy_parmeters_determined") else module


@contextlib.contextmanager
def _evaluating(module: nn.Module) -> Any:
    """A block in which a module is called to be initialised.

    The module is in eval mode: in training a batch norm would count this batch.
    """
    training, before = {part: part.training for part in module.modules()}, here.initialising
    here.initialising = True
    try:
        for part in training:
            part.__dict__["training"] = False
        yield
    finally:
        here.initialising = before
        for part, flag in training.items():
            part.__dict__["training"] = flag


def _is_waiting(tensor: Any) -> bool:
    """Whether a first call may initialise a tensor; PPE's lazy buffers are ``Tensor([])``."""
    return tensor is None or is_placeholder(tensor) or tuple(tensor.shape) == (0,)


def _check_known(module: nn.Module, before: dict[str, Any], lazy: set[str]) -> None:
    """Put back the tensors that a call replaced by ones without values; raise for lazy ones."""
    for held in (own_parameters(module), own_buffers(module)):
        for name in [name for name, tensor in held.items() if is_unknown(tensor)]:
            if name in lazy or name not in before:
                raise _needs_values(module, name)
            held[name] = before[name]


def _needs_values(module: nn.Module, what: str) -> NeedsValuesError:
    return NeedsValuesError(
        f"{name_of_class(module)} initialises itself with values of its input, and infer_shapes "
        f"knows only the shape: run a forward pass with real inputs instead ({what})"
    )
