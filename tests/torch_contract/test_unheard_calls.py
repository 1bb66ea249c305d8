"""Calls of C++ that no class of tensors hears of."""

from __future__ import annotations

import torch
from torch import Tensor

from lateinit._torch.unheard_calls import WRAPS, tell_of_unheard_calls


class Listed(Tensor):
    """A class whose tensors are told."""


def test_a_tensor_is_told_before_c_takes_it() -> None:
    """torch/_functorch/eager_transforms.py: all transforms but vmap wrap by two functions."""
    told: list[tuple[str, Tensor]] = []
    listed = torch.ones(2).as_subclass(Listed)
    tell_of_unheard_calls((Listed,), lambda name, tensor: told.append((name, tensor)))
    try:
        torch.func.grad(torch.sum)(listed)
        torch.func.vjp(torch.exp, listed)
        torch.func.jacrev(torch.exp)(listed)
        torch.func.functionalize(torch.exp)(listed)
        Tensor._make_subclass(Listed, data=listed)
        torch.to_dlpack(listed)
        torch.utils.dlpack.to_dlpack(listed)
        torch.func.grad(torch.sum)(torch.ones(2))
        torch.compile(lambda x: torch.func.grad(torch.sum)(x) * 2, backend="eager", fullgraph=True)(
            torch.ones(2)
        )
    finally:
        tell_of_unheard_calls((Listed,), None)
    torch.func.grad(torch.sum)(listed)
    assert "_make_subclass" not in vars(Tensor)
    assert all(tensor is listed for _, tensor in told)
    expected = [WRAPS[0]] * 3 + [WRAPS[1], "_make_subclass", "to_dlpack", "to_dlpack"]
    assert [name for name, _ in told] == expected
