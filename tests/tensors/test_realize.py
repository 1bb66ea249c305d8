"""A realised tensor is written, shown and copied as its eager twin is."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lateinit
from lateinit.errors import DeferredTensorError


def without_grad(act: Callable[[Tensor], Any]) -> Callable[[Tensor], Any]:
    def acted(w: Tensor) -> Any:
        with torch.no_grad():
            return act(w)

    return acted


WRITES: dict[str, Callable[[Tensor], Any]] = {
    "initialiser": nn.init.uniform_,
    "without grad": without_grad(lambda w: w.add_(1)),
    "view without grad": without_grad(lambda w: w[0].zero_()),
    "with grad": lambda w: w.add_(1),
    "view with grad": lambda w: w[0].zero_(),
    "transposed": lambda w: w.t().zero_(),
    "data": lambda w: w.data.fill_(1),
    "detached": lambda w: w.detach().fill_(1),
    "in inference mode": torch.inference_mode()(lambda w: w.mul_(2)),
    "new data": lambda w: setattr(w, "data", torch.ones(4, 3)),
    "to a leaf": lambda w: w.detach_(),
    "requires_grad": lambda w: w.requires_grad_(False),
}


def normed() -> nn.Module:
    torch.manual_seed(2)
    return nn.utils.weight_norm(nn.Linear(3, 4))


def shown(write: Callable[[Tensor], Any], module: nn.Module) -> list[Any]:
    w = module.weight
    torch.manual_seed(3)
    found: list[Any] = []
    for act in (write, repr, copy.deepcopy, lambda w: w.detach().tolist(), lambda w: w[1:].sum()):
        try:
            result = act(w)
        except RuntimeError as error:
            result = type(error), str(error)
        found.append(str(result).split(", grad_fn")[0])
    return [*found, w.requires_grad, w.is_leaf, w.grad_fn is None, w._is_view()]


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm`")
@pytest.mark.parametrize("write", WRITES)
def test_a_tensor_with_a_graph_is_written_as_its_eager_twin_is(write: str) -> None:
    late = lateinit.materialize(lateinit.deferred_init(normed))
    assert shown(WRITES[write], late) == shown(WRITES[write], normed())
    if late.weight.grad_fn is not None and write != "new data":
        with pytest.raises(DeferredTensorError, match="graph was not recorded"):
            late.weight.sum().backward()
    late(torch.ones(2, 3)).sum().backward()
    assert late.weight_v.grad is not None


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=str)
def test_parameter_made_of_a_view_from_before_is_a_parameter(dtype: torch.dtype | None) -> None:
    layer = lateinit.deferred_init(nn.Linear, 4, 4)
    state, data, row = layer.state_dict(), layer.weight.data, layer.weight.detach()[1:]
    lateinit.materialize(layer, dtype=dtype)
    weight = layer.weight
    layer.load_state_dict(state, assign=True)
    made = [nn.Parameter(data), nn.Parameter(row, requires_grad=False), layer.weight]
    assert [type(parameter) for parameter in made] == [nn.Parameter] * 3
    assert [parameter.requires_grad for parameter in made] == [True, False, True]
    assert made[0].data_ptr() == weight.data_ptr()
    assert torch.equal(made[1], weight[1:])
