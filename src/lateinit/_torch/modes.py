"""torch's function modes and dispatch modes: define one, query the stacks, leave them.

A block runs under a function mode (intercepts Python calls) and a dispatch mode (intercepts
operators). lateinit's own computations must be seen by neither, nor by other libraries' modes.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, TypeVar

import torch
from torch._C import _len_torch_function_stack
from torch._ops import _len_torch_dispatch_stack_pre_dispatch
from torch.overrides import (
    TorchFunctionMode,
    _get_current_function_mode_stack,
    _pop_mode,
    _push_mode,
)
from torch.utils._device import _device_constructors
from torch.utils._python_dispatch import (
    TorchDispatchMode,
    _disable_current_modes,
    _get_current_dispatch_mode_stack,
)
from torch.utils._python_dispatch import _push_mode as _push_dispatch_mode

without_functions = torch._C.DisableTorchFunction
"""A block in which neither function modes nor ``__torch_function__`` of classes are called."""

without_subclass_functions = torch._C.DisableTorchFunctionSubclass
"""A block in which function modes are called, but not ``__torch_function__`` of classes."""

is_function_mode_in_force = torch._C._is_torch_function_mode_enabled
is_any_autocast_enabled = torch._C._is_any_autocast_enabled
is_deterministic = torch._C._get_deterministic_algorithms
set_grad_enabled = torch._C._set_grad_enabled
"""The function behind ``torch.no_grad`` and ``enable_grad``; function modes see each call."""


class DispatchMode(TorchDispatchMode):
    """A dispatch mode that does not import the compiler.

    torch/utils/_python_dispatch.py: __init_subclass__ wraps ``__torch_dispatch__`` in
    ``torch._disable_dynamo``, which imports ``torch._dynamo`` at the first call (measured: 1.2 s)
    and slows each call down. torch leaves it unwrapped if ``_should_skip_dynamo`` returns False.

    ``ended`` marks a mode whose block is over: code that finds it on the stack may take it off.
    """

    ended = False

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False

    def __exit__(self, *error: object) -> None:
        # torch's own pops whatever is on top, and raises if an interrupt has left nothing there.
        modes = dispatch_modes()
        if modes and modes[-1] is self:
            super().__exit__(*error)  # type: ignore[no-untyped-call]
        else:
            put_dispatch_modes([mode for mode in modes if mode is not self])


class FunctionMode(TorchFunctionMode):
    """A function mode of lateinit; ``ended`` and ``__exit__`` as in ``DispatchMode``."""

    ended = False

    def __exit__(self, *error: object) -> None:
        modes = function_modes()
        if modes and modes[-1] is self:
            super().__exit__(*error)  # type: ignore[no-untyped-call]
        else:
            put_function_modes([mode for mode in modes if mode is not self])


functions_state: Callable[[], Any] = torch._C._get_torch_function_state  # type: ignore[attr-defined]
set_functions_state: Callable[[Any], None] = torch._C._set_torch_function_state  # type: ignore[attr-defined]
dispatch_modes: Callable[[], list[Any]] = _get_current_dispatch_mode_stack
function_modes: Callable[[], list[Any]] = _get_current_function_mode_stack
_States: Any = torch._C._TorchFunctionState  # type: ignore[attr-defined]


def are_functions_disabled(state: Any) -> bool:
    """Whether a result of ``functions_state`` means that function modes are not called."""
    return bool(state == _States.ALL_DISABLED)


def enable_functions() -> None:
    """Have function modes and ``__torch_function__`` of classes called in this thread."""
    set_functions_state(_States.ENABLED)


inference_mode = torch._C._InferenceMode
"""The C++ guard of ``torch.inference_mode``: no lines of Python that an interrupt could hit."""


def has_own_dispatch(tensor: Any) -> bool:
    """Whether the dispatcher calls ``__torch_dispatch__`` of a tensor's class for its ops."""
    return bool(torch._C._dispatch_keys(tensor).has(torch._C.DispatchKey.Python))


def put_function_modes(modes: Sequence[Any]) -> None:
    """Have these modes, and no others, on the stack of function modes."""
    while _len_torch_function_stack():
        _pop_mode()
    for mode in modes:
        _push_mode(mode)


def put_dispatch_modes(modes: Sequence[Any]) -> None:
    """Have these modes, and no others, on the stack of dispatch modes."""
    while torch._C._len_torch_dispatch_stack():
        torch._C._pop_torch_dispatch_stack(None)
    for mode in modes:
        _push_dispatch_mode(mode)


class without_modes:  # noqa: N801 - reads as a statement
    """A block without recording, other modes, ``__torch_function__`` and gradients.

    A class, since a generator takes longer to enter, and this is entered often. The state to
    restore is read before the first change, so ``__exit__`` works after an interrupted
    ``__enter__`` too.
    """

    __slots__ = ("_before_dispatch", "_functions", "_grad", "_modes")

    def __enter__(self) -> None:
        self._functions, self._grad = functions_state(), torch.is_grad_enabled()
        # Pre-dispatch modes belong to tracers such as torch.export, and are left to torch.
        early = _len_torch_dispatch_stack_pre_dispatch()
        self._before_dispatch = _disable_current_modes() if early else None
        # Disabling an empty stack takes time too.
        some = torch._C._len_torch_dispatch_stack()
        self._modes = dispatch_modes() if some and not early else ()
        try:
            set_functions_state(_States.ALL_DISABLED)
            if self._before_dispatch is not None:
                self._before_dispatch.__enter__()
            elif self._modes:
                put_dispatch_modes(())
            torch._C._set_grad_enabled(False)
        except BaseException:
            self.__exit__()
            raise

    def __exit__(self, *error: object) -> None:
        torch._C._set_grad_enabled(self._grad)
        if self._before_dispatch is not None:
            self._before_dispatch.__exit__(None, None, None)
        elif self._modes:
            put_dispatch_modes(self._modes)
        set_functions_state(self._functions)


@contextlib.contextmanager
def outside() -> Iterator[None]:
    """Run a block as if no mode were in force, default devices and inference mode included.

    Unlike ``without_modes`` it leaves gradients on and subclasses at work: for users' code.
    """
    # torch has no public way to leave function modes: take them off, and put them back in order.
    functions, operators = function_modes(), dispatch_modes()
    early = _len_torch_dispatch_stack_pre_dispatch()
    try:
        put_function_modes(())
        with _disable_current_modes() if early else contextlib.nullcontext(), inference_mode(False):
            if operators and not early:
                put_dispatch_modes(())
            set_grad_enabled(True)
            yield
    finally:
        if operators and not early:
            put_dispatch_modes(operators)
        # Users' code may have set a default device, which is a mode too.
        put_function_modes([*(m for m in function_modes() if m not in functions), *functions])


def graph_break() -> None:
    """Have ``torch.compile`` run the call that it is tracing outside of its graph.

    If the graph may not break, as in a strict ``torch.export``, torch raises with these words.
    """
    torch._dynamo.graph_break(
        msg="a deferred tensor has no values yet that a graph could hold: call "
        "lateinit.materialize() on it first"
    )


set_eval_frame = torch._C._dynamo.eval_frame.set_eval_frame
"""Set the callback by which ``torch.compile`` intercepts Python frames; returns the previous one.

With None, frames run uncompiled.
"""

_F = TypeVar("_F", bound=Callable[..., Any])


def untraced(function: _F) -> _F:
    """Decorator: ``torch.compile`` traces neither the function nor the functions that it calls.

    torch/_dynamo/eval_frame.py: skip_code does so, and its module takes long to import.
    """
    frames = torch._C._dynamo.eval_frame
    skip = frames._FrameAction.SKIP
    strategy = frames._FrameExecStrategy(skip, skip)
    frames.set_code_exec_strategy(function.__code__, strategy)
    return function


@contextlib.contextmanager
def settings_kept() -> Iterator[None]:
    """A block whose end restores process-wide settings."""
    before = [setting() for setting, _ in _SETTINGS]
    try:
        yield
        _put_settings(before)
    except BaseException:
        _put_settings(before)
        raise


def _put_settings(before: list[Any]) -> None:
    for value, (setting, put) in zip(before, _SETTINGS, strict=True):
        if setting() != value:
            put(value)


def read_determinism() -> tuple[bool, bool]:
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    return torch.are_deterministic_algorithms_enabled(), warn_only


def put_determinism(flags: tuple[bool, bool]) -> None:
    torch.use_deterministic_algorithms(flags[0], warn_only=flags[1])


Autocast = tuple[tuple[tuple[bool, torch.dtype], ...], bool]
AUTOCAST_DEVICES = ("cpu", "cuda")  # the device types whose autocast can be recorded


def read_autocast() -> Autocast:
    """Whether autocast is on and its dtype, for each device type; whether it caches."""
    some = is_any_autocast_enabled()  # one query in place of one per device type: this runs often
    each = [
        (some and torch.is_autocast_enabled(d), torch.get_autocast_dtype(d))
        for d in AUTOCAST_DEVICES
    ]
    return tuple(each), torch.is_autocast_cache_enabled()


def put_autocast(state: Autocast) -> None:
    """Set the state that ``read_autocast`` returns.

    ``torch.autocast`` also counts how deeply it is nested, to empty its cache at the end. A count
    that an interrupt has left wrong would keep the casts of old weights for good.
    """
    for device, (enabled, dtype) in zip(AUTOCAST_DEVICES, state[0], strict=True):
        torch.set_autocast_enabled(device, enabled)
        torch.set_autocast_dtype(device, dtype)
    torch.set_autocast_cache_enabled(state[1])


@contextlib.contextmanager
def autocast_in_force(chosen: tuple[str, torch.dtype] | None) -> Iterator[None]:
    """Run a block with autocast on for one device type, or off.

    Its cache is on, as by default: each cast of a weight is then one node of the graph.
    """
    before, outermost = read_autocast(), not is_any_autocast_enabled()
    on, dtype = chosen or ("", torch.bfloat16)
    found = zip(AUTOCAST_DEVICES, before[0], strict=True)
    each = tuple((d == on, dtype if d == on else known) for d, (_, known) in found)
    try:
        put_autocast((each, chosen is not None))
        yield
    finally:
        put_autocast(before)
        if chosen and outermost:  # otherwise torch empties it at the end of the outermost block
            torch.clear_autocast_cache()


# How each setting is read and put back. Training scripts often switch those of cudnn.
_SETTINGS: tuple[tuple[Callable[[], Any], Callable[[Any], Any]], ...] = (
    (torch.get_default_dtype, torch.set_default_dtype),
    (read_determinism, put_determinism),
    (torch.get_num_threads, torch.set_num_threads),
    *(
        (partial(getattr, torch.backends.cudnn, name), partial(setattr, torch.backends.cudnn, name))
        for name in ("enabled", "benchmark", "deterministic")
    ),
)


below_python: Callable[[], Any] = torch._C._DisableTorchDispatch
"""A block whose ops skip dispatch modes and ``__torch_dispatch__`` on the way to kernels."""


def is_recording_alone(functions: int = 0) -> bool:
    """Whether one recording is the only mode, with the usual default device and determinism.

    Args:
        functions: how many function modes the stack then has. Within the recording's function mode
            it has none, since torch takes a mode off the stack while it runs.
    """
    return (
        torch._C._len_torch_dispatch_stack() == 1
        and torch._C._len_torch_function_stack() == functions
        and torch._C._get_default_device() == "cpu"
        and not torch._C._get_deterministic_algorithms()
    )


def is_tracing() -> bool:
    """Whether ops are traced into a graph, as by ``make_fx``; its module takes long to import."""
    tracer = sys.modules.get("torch.fx.experimental.proxy_tensor")
    return tracer is not None and tracer.get_proxy_mode() is not None


def default_device_in_force() -> torch.device | None:
    """The device of the innermost ``with torch.device(...)``, or None.

    torch/utils/_device.py: DeviceContext is a function mode with an attribute ``device``.
    """
    for mode in reversed(function_modes()):
        device = getattr(mode, "device", None)
        if isinstance(device, torch.device):
            return device
    return None


def takes_default_device(func: Any) -> bool:
    """Whether a function is a factory to which ``with torch.device(...)`` passes its device."""
    return func in _device_constructors()


_AUTOGRAD = tuple(
    getattr(torch._C.DispatchKey, f"Autograd{part}")
    for part in ("Functionality", "Other", "NestedTensor")
)


def with_autograd() -> Any:
    """A block in which autograd records ops, even inside an op at the dispatcher.

    torch/csrc/autograd: the kernel of an op runs below autograd. Without this block, a replay that
    answers a read within a kernel would give tensors without a graph.
    """
    include = torch._C._dispatch_tls_local_include_set()
    exclude = torch._C._dispatch_tls_local_exclude_set()
    for key in _AUTOGRAD:
        exclude = exclude.remove(key)
    return torch._C._ForceDispatchKeyGuard(include, exclude)
