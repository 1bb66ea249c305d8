"""The transforms of ``torch.func``, which wrap tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from lateinit._torch.transforms import (
    is_functorch_running,
    outside_functorch,
    tell_of_wrapped,
    unwrapped,
)


def test_within_a_transform_of_functorch_it_can_be_left() -> None:
    """torch/_functorch/pyfunctorch.py: a factory called in ``grad`` makes a wrapped tensor."""
    found: list[torch.Tensor] = []

    def loss(x: torch.Tensor) -> torch.Tensor:
        with outside_functorch():
            found.append(torch.ones(2) * 2)
        found.append(torch.ones(2) * 2)
        return (x * found[0]).sum()

    assert torch.func.grad(loss)(torch.ones(2)).tolist() == [2, 2]
    outside, inside = map(torch._C._functorch.is_functorch_wrapped_tensor, found)
    assert (outside, inside) == (False, True)
    with outside_functorch():
        assert torch.ones(1) == 1


def test_a_transform_of_torch_func_is_known_to_run_by_what_it_calls() -> None:
    """torch/_functorch/pyfunctorch.py: the stack of interpreters, empty outside of transforms."""
    seen: list[bool] = [is_functorch_running()]

    def f(x: torch.Tensor) -> torch.Tensor:
        seen.append(is_functorch_running())
        return x.sum()

    torch.vmap(f)(torch.ones(2, 3))
    torch.func.grad(f)(torch.ones(3))
    assert seen == [False, True, True]


def test_transforms_of_torch_func_wrap_tensors_one_in_the_other() -> None:
    """aten/src/ATen/functorch/TensorWrapper.h, BatchedTensorImpl.h: ``value`` of a wrapper."""
    x, seen = torch.randn(2, 3), []

    def noted(value: torch.Tensor) -> torch.Tensor:
        seen.append(unwrapped(value))
        return (value**2).sum()

    torch.func.vmap(torch.func.grad(noted))(x)
    assert seen[0] is not None
    assert seen[0].data_ptr() == x.data_ptr()
    assert unwrapped(x) is x


class Listed(Tensor):
    """A class whose tensors are told."""


def test_a_tensor_is_told_before_a_transform_wraps_it() -> None:
    """torch/_functorch/eager_transforms.py: all but vmap wrap by two functions of C++."""
    told: list[Tensor] = []
    tell_of_wrapped((Listed,), told.append)
    listed = torch.ones(2).as_subclass(Listed)
    try:
        torch.func.grad(torch.sum)(listed)
        torch.func.vjp(torch.exp, listed)
        torch.func.jacrev(torch.exp)(listed)
        torch.func.functionalize(torch.exp)(listed)
        torch.func.grad(torch.sum)(torch.ones(2))
        torch.compile(lambda x: torch.func.grad(torch.sum)(x) * 2, backend="eager", fullgraph=True)(
            torch.ones(2)
        )
    finally:
        tell_of_wrapped((Listed,), None)
    torch.func.grad(torch.sum)(listed)
    assert [tensor is listed for tensor in told] == [True] * 4
