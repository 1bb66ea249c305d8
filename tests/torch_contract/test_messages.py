"""What torch says when memory runs out, when there is none, and when a checkpoint does not fit."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

from lateinit._torch.messages import (
    asks_for_values,
    is_lazy_misuse,
    is_misfit,
    is_of_legacy_type,
    is_of_mixed_graph,
    is_out_of_memory,
    reaches_for_memory,
)
from lateinit._torch.modes import DispatchMode

if TYPE_CHECKING:
    from collections.abc import Callable

READS: dict[str, Callable[[torch.Tensor], Any]] = {
    "aten/src/ATen/native/Scalar.cpp": lambda t: t[0].item(),
    "torch/csrc/autograd/python_variable_methods.cpp": lambda t: bool(t[0]),
    "torch/csrc/utils/tensor_numpy.cpp": lambda t: t.numpy(),
    "aten/src/ATen/native/TensorConversions.cpp": lambda t: t.cpu(),
    "aten/src/ATen/native/Copy.cpp": lambda t: torch.ones(2).copy_(t),
    "torch/_meta_registrations.py": lambda t: t.nonzero(),
    "aten/src/ATen/core/dispatch (no kernel)": lambda t: torch.equal(t, t),
    "torch/storage.py": lambda t: t.untyped_storage().tolist(),
}


class WithoutCopies(DispatchMode):
    """A mode that gives what was to be copied to the CPU as it is."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._to_copy.default:
            return args[0]
        return func(*args, **(kwargs or {}))


def said_by(call: Callable[[], Any]) -> Exception:
    with pytest.raises(Exception, match=r".") as caught:
        call()
    return caught.value


def test_the_cpu_allocator_says_that_it_cannot_allocate_in_a_bare_runtime_error() -> None:
    """c10/core/impl/alloc_cpu.cpp: ``DefaultCPUAllocator: can't allocate memory``."""
    error = said_by(lambda: torch.empty(1 << 62, dtype=torch.uint8))
    assert type(error) is RuntimeError
    assert is_out_of_memory(error)
    assert is_out_of_memory(MemoryError())
    assert not is_out_of_memory(said_by(lambda: torch.ones(2) @ torch.ones(3)))


def test_a_device_out_of_memory_is_a_runtime_error_too() -> None:
    """torch/csrc/Exceptions.cpp: torch.OutOfMemoryError is a RuntimeError."""
    assert issubclass(torch.OutOfMemoryError, RuntimeError)
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"))


@pytest.mark.cuda
def test_cuda_says_that_it_is_out_of_memory() -> None:
    """c10/cuda/CUDACachingAllocator.cpp: ``CUDA out of memory. Tried to allocate``."""
    error = said_by(lambda: torch.empty(1 << 48, dtype=torch.uint8, device="cuda"))
    assert isinstance(error, torch.OutOfMemoryError)
    assert is_out_of_memory(error)


@pytest.mark.parametrize("read", READS.values(), ids=READS)
def test_whatever_reads_a_tensor_on_meta_says_meta(read: Callable[..., Any]) -> None:
    """The files that the cases are named by: each error has the device's name in its text."""
    assert asks_for_values(said_by(lambda: read(torch.empty(2, device="meta"))))


def test_a_list_of_a_tensor_without_memory_is_refused_for_its_storage() -> None:
    """torch/csrc/utils/tensor_list.cpp: ``tolist() shouldn't ... with unallocated storage``."""

    def listed() -> None:
        with WithoutCopies():
            torch.empty(2, device="meta").tolist()

    error = said_by(listed)
    assert "unallocated storage" in str(error)
    assert asks_for_values(error)


def test_shapes_that_do_not_fit_say_nothing_of_meta() -> None:
    """torch/_refs/__init__.py, torch/_meta_registrations.py: errors name sizes, not the device."""
    x = torch.empty(2, 3, device="meta")
    for call in (lambda: x @ x, lambda: x + x.t(), lambda: x.view(4)):
        assert not asks_for_values(said_by(call))


def test_load_state_dict_begins_with_the_name_of_what_does_not_fit() -> None:
    """torch/nn/modules/module.py: load_state_dict raises ``Error(s) in loading state_dict for``."""
    layer = nn.Linear(2, 2)
    for state in ({}, nn.Linear(2, 3).state_dict(), {**layer.state_dict(), "more": torch.ones(1)}):
        error = said_by(lambda state=state: layer.load_state_dict(state))
        assert type(error) is RuntimeError
        assert is_misfit(error)
    assert not is_misfit(said_by(lambda: layer(torch.ones(3))))


def test_torchs_placeholders_say_that_they_have_no_shape() -> None:
    """torch/nn/parameter.py: ``UninitializedTensorMixin.__torch_function__``."""
    assert is_lazy_misuse(said_by(lambda: torch.add(nn.UninitializedParameter(), 1)))
    assert not is_lazy_misuse(said_by(lambda: torch.add(torch.ones(2), torch.ones(3))))


def test_a_kernel_for_real_tensors_says_that_meta_has_no_data() -> None:
    """c10/core/TensorImpl.h: data_impl; such as that of _sobol_engine_initialize_state_."""
    state = torch.empty(3, 30, dtype=torch.int64, device="meta")
    with pytest.raises(RuntimeError, match="not allocated") as caught:
        torch._sobol_engine_initialize_state_(state, 3)
    assert reaches_for_memory(caught.value)
    assert not reaches_for_memory(RuntimeError("of any other kind"))


def test_a_graph_of_real_and_meta_tensors_has_an_invalid_gradient() -> None:
    """torch/csrc/autograd/engine.cpp: validate_outputs compares the devices."""

    class Crossing(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x.to("meta")

        @staticmethod
        def backward(ctx: Any, grad: Any) -> Any:
            return grad

    x = torch.ones(2, requires_grad=True)
    error = said_by(lambda: Crossing.apply(x).sum().backward())  # type: ignore[no-untyped-call]
    assert is_of_mixed_graph(error)
    assert not is_of_mixed_graph(RuntimeError("expected device cpu but got meta"))


def test_a_legacy_type_says_that_it_was_given_a_tensor_on_meta() -> None:
    """torch/csrc/utils/tensor_new.cpp: legacy_tensor_generic_ctor_new."""
    with pytest.raises(TypeError, match="expected TensorOptions") as found:
        torch.FloatTensor(torch.empty(3, device="meta"))
    assert is_of_legacy_type(found.value)
    with pytest.raises(TypeError, match="expected TensorOptions") as found:
        torch.FloatTensor(torch.empty(3, dtype=torch.int64))
    assert not is_of_legacy_type(found.value)
