"""torch's stacks of modes, the guards that leave them, and the flags of its context."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import _get_current_function_mode_stack
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack

from lateinit._torch.modes import (
    AUTOCAST_DEVICES,
    DispatchMode,
    FunctionMode,
    are_functions_disabled,
    autocast_in_force,
    below_python,
    default_device_in_force,
    dispatch_modes,
    enable_functions,
    function_modes,
    functions_state,
    graph_break,
    has_own_dispatch,
    inference_mode,
    is_any_autocast_enabled,
    is_deterministic,
    is_function_mode_in_force,
    is_recording_alone,
    is_tracing,
    outside,
    put_autocast,
    put_determinism,
    put_dispatch_modes,
    put_function_modes,
    read_autocast,
    read_determinism,
    set_eval_frame,
    set_functions_state,
    set_grad_enabled,
    settings_kept,
    takes_default_device,
    untraced,
    with_autograd,
    without_functions,
    without_modes,
    without_subclass_functions,
)
from tests.torch_contract.listeners import Functions, Operators, heard_tensor


def test_without_functions_neither_modes_nor_classes_hear() -> None:
    """torch/csrc/utils/disable_torch_function.cpp: DisableTorchFunction turns off all of it."""
    tensor = heard_tensor(2)
    with Functions() as mode, without_functions():
        tensor.neg()
    assert not mode.heard
    assert not tensor.heard


def test_without_subclass_functions_only_modes_hear() -> None:
    """torch/csrc/utils/disable_torch_function.cpp: DisableTorchFunctionSubclass leaves modes on."""
    tensor = heard_tensor(2)
    with Functions() as mode, without_subclass_functions():
        tensor.neg()
    assert mode.heard == [torch.Tensor.neg]
    assert not tensor.heard


def test_a_function_mode_is_off_its_stack_while_it_hears() -> None:
    """torch/csrc/autograd/init.cpp: _is_torch_function_mode_enabled reads the stack."""
    assert not is_function_mode_in_force()
    with Functions(is_function_mode_in_force) as mode:
        assert is_function_mode_in_force()
        torch.ones(2)
    assert mode.answers == [False]


@pytest.mark.parametrize("device", ["cpu", "cuda", "xpu"])
def test_autocast_of_any_device_type_is_autocast(device: str) -> None:
    """torch/csrc/autograd/init.cpp: _is_any_autocast_enabled asks of every device type."""
    before = torch.is_autocast_enabled(device)
    assert not is_any_autocast_enabled()
    torch.set_autocast_enabled(device, enabled=True)
    try:
        assert is_any_autocast_enabled()
    finally:
        torch.set_autocast_enabled(device, before)


def test_the_deterministic_flag_is_told_without_asking_modes(fresh_memory_of_nan: None) -> None:
    """torch/csrc/Module.cpp: _get_deterministic_algorithms reads the flag of the context."""
    del fresh_memory_of_nan  # it turns the flag on
    with Functions() as mode:
        assert is_deterministic()
        torch.use_deterministic_algorithms(mode=False)
        assert not is_deterministic()
    assert not mode.heard


def test_no_grad_tells_function_modes_that_it_sets_the_grad_mode() -> None:
    """torch/csrc/autograd/init.cpp: set_grad_enabled asks function modes at each use of no_grad."""
    with Functions() as mode, torch.no_grad():
        pass
    assert mode.heard == [set_grad_enabled, set_grad_enabled]


def test_a_dispatch_mode_s_method_is_wrapped_for_the_compiler_unless_it_says_no() -> None:
    """torch/utils/_python_dispatch.py: __init_subclass__ wraps if _should_skip_dynamo says so."""

    def method(self: Any, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))

    plain = type("Plain", (TorchDispatchMode,), {"__torch_dispatch__": method})
    ours = type("Ours", (DispatchMode,), {"__torch_dispatch__": method})
    assert vars(plain)["__torch_dispatch__"] is not method
    assert vars(ours)["__torch_dispatch__"] is method


def test_without_modes_nobody_hears_and_nothing_is_differentiated() -> None:
    """torch/utils/_python_dispatch.py: _disable_current_modes empties the stack for a while."""
    tensor = heard_tensor(2).requires_grad_()
    tensor.heard.clear()
    with Functions() as functions, Operators() as first, Operators() as second:
        stack = _get_current_dispatch_mode_stack()
        with without_modes():
            assert not tensor.mul(2).requires_grad
        assert _get_current_dispatch_mode_stack() == stack == [first, second]
        assert torch.is_grad_enabled()
    assert functions.heard + first.heard + second.heard + tensor.heard == []


def test_outside_no_default_device_or_inference_mode_is_in_force() -> None:
    """torch/overrides.py: _pop_mode takes modes off, default devices too; _push_mode puts back."""
    with torch.inference_mode(), torch.device("meta"), Functions() as mode, Operators() as ops:
        stack = _get_current_function_mode_stack()
        assert mode in stack
        with outside():
            made = torch.ones(2, requires_grad=True)
        assert _get_current_function_mode_stack() == stack
        assert not mode.heard
        assert not ops.heard
        assert torch.is_inference_mode_enabled()
    assert made.device.type == "cpu"
    assert not made.is_inference()


def test_below_python_ops_pass_dispatch_modes_by() -> None:
    """torch/csrc/utils/init.cpp: _DisableTorchDispatch excludes the keys of modes and classes."""
    with Operators() as mode:
        with below_python():
            torch.ones(2).neg()
        assert not mode.heard
        torch.ones(2).neg()
    assert mode.heard == ["aten::ones", "aten::neg"]


def test_a_recording_is_alone_with_one_dispatch_mode_and_no_other_function_mode() -> None:
    """torch/csrc/autograd/init.cpp: the mode that hears is not in _len_torch_function_stack."""
    with Operators(), Functions(lambda: None):
        assert is_recording_alone(functions=1)
        assert not is_recording_alone()
    with Operators(), Functions(is_recording_alone) as mode:
        torch.ones(2)
        with Operators():
            torch.ones(2)
    with Operators(), Functions(is_recording_alone) as below, Functions():
        torch.ones(2)
    with Operators(), torch.device("cpu"), Functions(is_recording_alone) as above:
        torch.ones(2)
    assert (mode.answers, below.answers, above.answers) == ([True, False], [True], [False])


def test_the_default_type_of_tensors_tells_a_default_device_without_a_mode() -> None:
    """torch/csrc/Module.cpp: _get_default_device is the type's; it is where ``empty`` allocates."""
    with Operators(), Functions(is_recording_alone) as mode:
        torch.ones(2)
        torch.use_deterministic_algorithms(mode=True)
        torch.ones(2)
        torch.use_deterministic_algorithms(mode=False)
    assert torch._C._get_default_device() == "cpu"
    assert mode.answers == [True, False]


def test_the_default_device_is_the_device_of_the_innermost_device_context() -> None:
    """torch/utils/_device.py: DeviceContext is a function mode with an attribute ``device``."""
    assert default_device_in_force() is None
    with torch.device("cpu"), torch.device("meta"), Functions():
        assert default_device_in_force() == torch.device("meta")
    before = torch.get_default_device()
    torch.set_default_device("meta")
    try:
        assert default_device_in_force() == torch.device("meta")
    finally:
        torch.set_default_device(None)
    assert torch.get_default_device() == before


def test_settings_of_the_process_survive_a_block_that_changes_them() -> None:
    """torch/__init__.py: set_default_dtype and use_deterministic_algorithms hold process-wide."""
    before = torch.get_default_dtype(), torch.are_deterministic_algorithms_enabled()
    with settings_kept():
        torch.set_default_dtype(torch.float64)
        torch.use_deterministic_algorithms(not before[1])
        assert torch.empty(1).dtype is torch.float64
    assert (torch.get_default_dtype(), torch.are_deterministic_algorithms_enabled()) == before


def _only_warn(before: bool) -> None:
    torch.use_deterministic_algorithms(
        torch.are_deterministic_algorithms_enabled(), warn_only=not before
    )


def _set_cudnn(name: str) -> Any:
    return lambda before: setattr(torch.backends.cudnn, name, not before)


@pytest.mark.parametrize(
    ("read", "write"),
    [
        (torch.is_deterministic_algorithms_warn_only_enabled, _only_warn),
        (lambda: torch.backends.cudnn.benchmark, _set_cudnn("benchmark")),
        (lambda: torch.backends.cudnn.deterministic, _set_cudnn("deterministic")),
        (lambda: torch.backends.cudnn.enabled, _set_cudnn("enabled")),
        (torch.get_num_threads, lambda value: torch.set_num_threads(value + 1)),
    ],
)
def test_other_settings_of_the_process_survive_too(read: Any, write: Any) -> None:
    """torch/backends/cudnn/__init__.py, torch/__init__.py: these flags hold process-wide."""
    before = read()
    # torch/testing/_internal/common_utils.py forbids to set them, for any test that imports it.
    with torch.backends.__allow_nonbracketed_mutation(), settings_kept():
        write(before)
        assert read() != before
    assert read() == before


def test_whether_functions_are_called_can_be_read_and_set() -> None:
    """torch/csrc/utils/disable_torch_function.cpp: the guards set a state of the thread."""
    before = functions_state()
    with without_functions():
        assert are_functions_disabled(functions_state())
        enable_functions()
        with Functions() as mode:
            torch.ones(2)
        assert mode.heard == [torch.ones]
        set_functions_state(before)
        assert not are_functions_disabled(functions_state())


def test_the_stacks_of_modes_can_be_read_and_put_back() -> None:
    """torch/overrides.py, torch/utils/_python_dispatch.py: _pop_mode and _push_mode change them."""
    with Functions() as functions, Operators() as operators:
        stacks = function_modes(), dispatch_modes()
        assert stacks == ([functions], [operators])
        put_function_modes(())
        put_dispatch_modes(())
        torch.ones(2)
        put_function_modes(stacks[0])
        put_dispatch_modes(stacks[1])
        assert (function_modes(), dispatch_modes()) == stacks
    assert not operators.heard


class Silent(FunctionMode):
    """Hears and says nothing."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", [Silent, Operators])
def test_leaving_a_mode_takes_no_other_off_the_stack(kind: Any) -> None:
    """torch/overrides.py, torch/utils/_python_dispatch.py: __exit__ pops whatever is on top."""
    lower, upper = kind(), kind()
    modes = function_modes if kind is Silent else dispatch_modes
    put = put_function_modes if kind is Silent else put_dispatch_modes
    with upper:
        lower.__enter__()
        put([lower, upper])
        lower.__exit__(None, None, None)
        assert modes() == [upper]
        lower.__exit__(None, None, None)
        assert modes() == [upper]
    assert modes() == []
    assert not lower.ended


def test_an_inference_mode_ends_when_it_is_dropped() -> None:
    """torch/csrc/autograd/init.cpp: _InferenceMode holds a guard, which restores what was."""
    with inference_mode(True):
        assert torch.ones(2).is_inference()
    guard = inference_mode(True)
    guard.__enter__()
    assert torch.is_inference_mode_enabled()
    del guard
    assert not torch.is_inference_mode_enabled()


def test_the_dispatcher_asks_the_class_that_a_tensor_was_made_as() -> None:
    """torch/csrc/autograd/python_variable.cpp: _make_subclass sets the Python dispatch key."""

    class Own(torch.Tensor):
        @classmethod
        def __torch_dispatch__(
            cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            return func(*args, **(kwargs or {}))

    assert has_own_dispatch(torch.Tensor._make_subclass(Own, torch.ones(2)))
    renamed = torch.ones(2)
    renamed.__class__ = Own
    assert not has_own_dispatch(renamed)


@pytest.mark.parametrize("chosen", [None, ("cpu", torch.float16)])
def test_autocast_can_be_set_without_counting_its_depth(chosen: Any) -> None:
    """torch/amp/autocast_mode.py: autocast sets these, and counts how deeply it is nested."""
    before = read_autocast()
    assert len(before[0]) == len(AUTOCAST_DEVICES)
    product = torch.ones(2, 2) @ torch.ones(2, 2)
    with torch.autocast("cpu", torch.bfloat16):
        with autocast_in_force(chosen):
            made = torch.ones(2, 2) @ torch.ones(2, 2)
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype is torch.bfloat16
    assert made.dtype is (chosen[1] if chosen else product.dtype)
    assert read_autocast() == before


def test_determinism_and_whether_it_only_warns_are_set_together() -> None:
    """torch/__init__.py: use_deterministic_algorithms takes both, and forgets warn_only else."""
    before = read_determinism()
    put_determinism((True, True))
    try:
        assert read_determinism() == (True, True)
        assert torch.is_deterministic_algorithms_warn_only_enabled()
    finally:
        put_determinism(before)
    assert read_determinism() == before


def test_a_tracer_of_fx_is_in_force_while_a_graph_is_made() -> None:
    """torch/fx/experimental/proxy_tensor.py: get_proxy_mode tells the mode of ``make_fx``."""
    heard: list[bool] = []

    def traced(x: torch.Tensor) -> torch.Tensor:
        heard.append(is_tracing())
        return x + 1

    for mode in ("real", "fake"):
        make_fx(traced, tracing_mode=mode)(torch.ones(2))
    assert heard == [True, True]
    assert not is_tracing()


def test_torch_compile_can_be_told_to_leave_a_call_alone() -> None:
    """torch/_dynamo/decorators.py: graph_break does nothing outside of a trace."""
    graph_break()
    before = set_eval_frame(None)
    assert set_eval_frame(before) is None
    heard: list[bool] = []

    def called(x: torch.Tensor) -> torch.Tensor:
        if torch.compiler.is_dynamo_compiling():
            graph_break()
        compiling = set_eval_frame(None)
        heard.append(compiling is not None)
        set_eval_frame(compiling)
        return x + 1

    def broken(x: torch.Tensor) -> torch.Tensor:
        graph_break()
        return x + 1

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = torch.compile(lambda x: called(x) * 2, backend="eager")(torch.ones(1))
        with pytest.raises(RuntimeError, match=r"lateinit\.materialize\(\) on it first"):
            torch.compile(broken, backend="eager", fullgraph=True)(torch.ones(1))
    assert result == 4
    assert heard == [True]


def test_a_factory_is_given_the_device_of_the_block_around_it() -> None:
    """torch/utils/_device.py: _device_constructors."""
    assert takes_default_device(torch.randn)
    assert not takes_default_device(torch.add)


def test_a_function_can_be_kept_from_the_compiler() -> None:
    """torch/_dynamo/eval_frame.py: skip_code sets the strategy of a code object in this way."""
    heard = []

    def inner() -> None:
        pass

    @untraced
    def outer() -> None:
        inner()

    def hear(frame: Any, *_: object) -> Any:
        heard.append(frame.f_code.co_name)
        return torch._dynamo.types.ConvertFrameReturn()

    def called(function: Any) -> list[str]:
        heard.clear()
        before = set_eval_frame(hear)
        try:
            function()
        finally:
            set_eval_frame(before)
        return [name for name in heard if name in ("outer", "inner")]

    assert called(outer) == []
    assert called(inner) == ["inner"]


def test_autocast_is_put_back_for_each_type_of_device() -> None:
    """torch/amp/autocast_mode.py: it sets three flags, which are read and put here."""
    before = read_autocast()
    torch.set_autocast_enabled("cpu", True)
    torch.set_autocast_dtype("cpu", torch.float16)
    torch.set_autocast_cache_enabled(False)
    assert read_autocast() != before
    put_autocast(before)
    assert read_autocast() == before
    assert not torch.is_autocast_enabled("cpu")


def test_autograd_does_not_follow_what_an_op_calls_unless_it_is_put_in_force() -> None:
    """torch/csrc/autograd/VariableTypeUtils.h: its kernels exclude it for those below them."""
    found = []

    class Computing(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):
            inner = torch.ones(2, requires_grad=True)
            found.append((inner * 2).requires_grad)
            with with_autograd():
                made = inner * 2
                found.append(torch.autograd.grad(made.sum(), inner)[0].tolist())
            return func(*args, **(kwargs or {}))

    x = torch.ones(2, requires_grad=True)
    with Computing():
        made = x + 1
    assert found == [False, [2, 2]]
    assert made.requires_grad
