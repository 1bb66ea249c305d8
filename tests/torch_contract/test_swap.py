"""Exchanging what tensor objects show, and making tensors of a class."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lateinit._torch.swap import (
    ASKING_FOR_REFERENCES,
    SWAPPING,
    OthersReferences,
    WeakTensor,
    as_subclass,
    hears_ops,
    make_subclass,
    new_tensor,
    swap,
    swap_implementation,
    swap_with_hooks,
    view_as_subclass,
)
from lateinit.errors import DeferredTensorError
from tests.torch_contract.listeners import Functions, Operators


class WithInit(Tensor):
    """Its ``__init__`` says that it was called."""

    def __init__(self, *_: Any) -> None:
        raise AssertionError


def hooked(tensor: Tensor, called: list[str]) -> Tensor:
    tensor.register_hook(lambda _: called.append("hook"))
    tensor.register_post_accumulate_grad_hook(lambda _: called.append("accumulated"))
    return tensor


def test_swapping_implementations_exchanges_values_and_no_objects() -> None:
    """torch/csrc/autograd/python_variable.cpp: _swap_tensor_impl leaves the objects alone."""
    a, b = nn.Parameter(torch.ones(2)), torch.zeros(3, dtype=torch.int64)
    a.note = "a"
    address = a.data_ptr()
    swap_implementation(a, b)
    assert (a.tolist(), b.tolist(), b.data_ptr()) == ([0, 0, 0], [1, 1], address)
    assert (type(a), type(b), a.note) == (nn.Parameter, Tensor, "a")


@pytest.mark.parametrize("make", ["make", "view"])
def test_no_mode_hears_of_a_tensor_of_another_class(make: str) -> None:
    """torch/csrc/autograd/python_variable.cpp: both stash all modes, and need no patch if not."""
    data = torch.ones(2)
    with Operators() as operators, Functions() as functions:
        made = make_subclass(WithInit, data) if make == "make" else view_as_subclass(data, WithInit)
    assert type(made) is WithInit
    assert made.data_ptr() == data.data_ptr()
    assert (operators.heard, functions.heard) == ([], [])


def test_a_tensor_that_somebody_holds_weakly_can_be_swapped() -> None:
    """torch/utils/__init__.py: swap_tensors refuses weak references, not the function below it."""
    a, b = torch.ones(2), torch.zeros(2)
    held = weakref.ref(a)
    with pytest.raises(RuntimeError, match="weakref"):
        torch.utils.swap_tensors(a, b)
    swap_implementation(a, b)
    assert held() is a
    assert a.tolist() == [0, 0]


def test_swap_tensors_asks_a_module_of_its_own_for_weak_references(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """torch/utils/__init__.py: swap_tensors."""
    a, b = torch.ones(2), torch.zeros(2)
    held = WeakTensor(a)
    monkeypatch.setattr(*ASKING_FOR_REFERENCES, OthersReferences())
    torch.utils.swap_tensors(a, b)
    assert held() is a
    assert a.tolist() == [0, 0]
    others = weakref.ref(b)
    with pytest.raises(RuntimeError, match="t2 because it has weakref"):
        torch.utils.swap_tensors(a, b)
    assert others() is b
    assert OthersReferences().WeakSet is weakref.WeakSet


def test_swap_tensors_exchanges_implementations_by_a_name_in_a_module(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """torch/utils/__init__.py: swap_tensors looks _swap_tensor_impl up in torch._C at each call."""
    heard = []
    monkeypatch.setattr(*SWAPPING, lambda *pair: heard.append(pair))
    a, b = torch.ones(2), torch.zeros(2)
    torch.utils.swap_tensors(a, b)
    assert heard == [(a, b)]


def test_no_tensor_of_a_subclass_is_made_under_a_dispatch_mode() -> None:
    """torch/csrc/autograd/python_variable.cpp: THPVariable_NewWithVar."""
    assert type(new_tensor(WithInit, [1.0])) is WithInit
    with (
        pytest.raises(RuntimeError, match="already associated to a python object of type Tensor"),
        Operators(),
    ):
        new_tensor(WithInit, [1.0])
    with Operators():
        assert type(new_tensor(Tensor, [1.0])) is Tensor


def test_swapping_implementations_leaves_autograd_s_hooks_behind() -> None:
    """torch/csrc/autograd/python_variable.cpp: _swap_tensor_impl swaps AutogradMeta, with hooks."""
    called: list[str] = []
    tensor, other = hooked(torch.ones(2, requires_grad=True), called), torch.zeros(2)
    swap_implementation(tensor, other.requires_grad_())
    tensor.sum().backward()
    assert called == []
    other.sum().backward()
    assert called == ["hook", "accumulated"]


def test_hooks_that_are_set_again_hang_on_the_new_implementation() -> None:
    """torch/csrc/autograd/python_variable.cpp: setting _backward_hooks makes a hook of it."""
    called: list[str] = []
    tensor = hooked(torch.ones(2, requires_grad=True), called)
    swap_with_hooks(tensor, torch.zeros(2, requires_grad=True))
    tensor.sum().backward()
    assert called == ["hook", "accumulated"]
    assert tensor.tolist() == [0, 0]


def test_a_swapped_tensor_keeps_requires_grad_and_whether_it_is_a_leaf() -> None:
    """torch/csrc/autograd/variable.h: is_leaf and requires_grad belong to the implementation."""
    leaf = torch.ones(2, requires_grad=True)
    swap(leaf, torch.zeros(2))
    assert (leaf.is_leaf, leaf.requires_grad, leaf.tolist()) == (True, True, [0, 0])
    frozen = torch.ones(2)
    swap(frozen, torch.zeros(2))
    assert not frozen.requires_grad
    computed = torch.ones(2, requires_grad=True) * 2
    swap(computed, torch.zeros(2))
    assert not computed.is_leaf
    with pytest.raises(DeferredTensorError, match="its graph was not"):
        computed.sum().backward()


@pytest.mark.parametrize("grad", [True, False])
def test_a_swapped_tensor_that_is_no_leaf_can_be_written_in_place(grad: bool) -> None:
    """torch/csrc/autograd/variable.cpp: a view that a custom function returned can not."""
    computed = torch.ones(2, requires_grad=True) * 2
    swap(computed, torch.zeros(2))
    with torch.set_grad_enabled(grad):
        computed.view(-1).add_(1)
        computed.add_(1)
    assert (computed.tolist(), computed.is_leaf, computed.requires_grad) == ([2, 2], False, True)


def test_an_inference_tensor_can_be_swapped_and_is_one_no_more() -> None:
    """c10/core/TensorImpl.h: is_inference is a key of the implementation, like requires_grad."""
    with torch.inference_mode():
        tensor = torch.ones(2)
    swap(tensor, torch.zeros(2))
    assert (tensor.is_inference(), tensor.tolist()) == (False, [0, 0])


@pytest.mark.parametrize("grad", [True, False])
def test_a_subclass_is_made_on_memory_without_calling_its_init(grad: bool) -> None:
    """torch/csrc/autograd/python_variable.cpp: _make_subclass detaches and makes no call."""
    data = torch.ones(2)
    made = as_subclass(WithInit, data, grad)
    assert (type(made), made.requires_grad, made.is_leaf) == (WithInit, grad, True)
    assert made.data_ptr() == data.data_ptr()
    assert made._base is None


def test_an_attribute_makes_a_tensor_of_another_class_a_parameter() -> None:
    """torch/nn/parameter.py: _ParameterMeta.__instancecheck__ asks for ``_is_param``."""
    tensor = as_subclass(type("Own", (Tensor,), {}), torch.ones(2), True)
    assert not isinstance(tensor, nn.Parameter)
    tensor._is_param = True  # type: ignore[attr-defined]
    assert isinstance(tensor, nn.Parameter)
    layer = nn.Module()
    layer.weight = tensor
    assert dict(layer.named_parameters())["weight"] is tensor


class Heard(torch.Tensor):
    """Hears every op on its tensors, and answers with its name."""

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise KeyError(func.name())


def test_the_dispatcher_asks_the_class_that_an_implementation_was_made_with() -> None:
    """torch/csrc/autograd/python_variable.cpp: _make_subclass sets the key Python, once."""
    assigned, exchanged = torch.ones(2), torch.ones(2)
    assigned.__class__ = Heard
    assert (assigned + 1).tolist() == [2, 2]
    left = as_subclass(Heard, exchanged, False)
    swap_implementation(exchanged, left)
    exchanged.__class__ = Heard
    with pytest.raises(KeyError, match="aten::add"):
        exchanged + 1


def test_a_class_that_hears_ops_has_a_method_for_it() -> None:
    """torch/_tensor.py: Tensor has one that stands for none, which subclasses inherit."""
    assert hears_ops(Heard)
    assert not any(map(hears_ops, (Tensor, nn.Parameter, WithInit)))


def test_a_swap_gives_the_object_that_has_the_former_implementation() -> None:
    """torch/csrc/autograd/python_variable.cpp: _swap_tensor_impl; C++ may hold that one."""
    tensor, former = torch.ones(2), torch.zeros(3)
    left = swap(former, tensor)
    assert (former.tolist(), left.tolist()) == ([1, 1], [0, 0, 0])
