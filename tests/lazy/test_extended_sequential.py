"""``ExtendedSequential.repeat`` of pytorch-pfn-extras, with lazy layers of ours inside."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

import lateinit

if TYPE_CHECKING:
    from collections.abc import Callable

LAYERS: dict[str, tuple[Callable[[], nn.Module], Callable[[], nn.Module]]] = {
    "attention": (
        lambda: lateinit.nn.LazyMultiheadAttention(1),
        lambda: nn.MultiheadAttention(3, 1),
    ),
    "batch norm": (lateinit.nn.LazyBatchNorm1d, lambda: nn.BatchNorm1d(3)),
    "linear": (lambda: lateinit.nn.LazyLinear(3), lambda: nn.Linear(3, 3)),
    "pfn linear": (lambda: lateinit.pfn_extras.LazyLinear(None, 3), lambda: nn.Linear(3, 3)),
}
CONTAINERS: dict[str, Callable[[list[nn.Module]], nn.Module]] = {
    "dict": lambda layers: nn.ModuleDict({str(i): layer for i, layer in enumerate(layers)}),
    "list": nn.ModuleList,
    "sequence": lambda layers: nn.Sequential(*layers),
}


class All(nn.Module):
    """Calls every layer, whatever the container."""

    def __init__(self, held: nn.Module) -> None:
        super().__init__()
        self.held = held

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for part in self.held.modules():
            if isinstance(part, nn.MultiheadAttention):
                part(x, x, x)
            elif isinstance(part, (nn.Linear, nn.BatchNorm1d)):
                part(x)
        return x


def repeated(container: str, layer: Callable[[], nn.Module], mode: str) -> Any:
    extended = pytest.importorskip("pytorch_pfn_extras").nn.ExtendedSequential
    inner = CONTAINERS[container]([layer(), nn.Linear(3, 3)])
    return extended(inner, nn.ReLU(), nn.Linear(3, 3)).repeat(2, mode=mode)


@pytest.mark.parametrize("mode", ["copy", "init", "share"])
@pytest.mark.parametrize("container", sorted(CONTAINERS))
@pytest.mark.parametrize("layer", sorted(LAYERS))
def test_a_repeated_sequence_in_a_block_equals_its_eager_twin(
    layer: str, container: str, mode: str
) -> None:
    lazy, eager = LAYERS[layer]
    torch.manual_seed(0)
    twin = repeated(container, eager, mode)
    torch.manual_seed(0)
    model = lateinit.deferred_init(repeated, container, lazy, mode)
    assert lateinit.infer_shapes(All(model), torch.empty(2, 3, device="meta")) == []
    found, expected = lateinit.materialize(model).state_dict(), twin.state_dict()
    assert [*found] == [*expected]
    assert [name for name in found if not torch.equal(found[name], expected[name])] == []


@pytest.mark.parametrize("mode", ["copy", "init", "share"])
@pytest.mark.parametrize("container", sorted(CONTAINERS))
@pytest.mark.parametrize("layer", sorted(LAYERS))
def test_outside_a_block_layers_are_shared_or_not_as_the_mode_says(
    layer: str, container: str, mode: str
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = repeated(container, LAYERS[layer][0], mode)
    first, second = (next(part.children()) for part in model)
    assert (first is second) is (mode == "share")
    assert lateinit.infer_shapes(All(model), torch.ones(2, 3)) == []
    found = [dict(part.named_parameters()) for part in model]
    for name, parameter in found[0].items():
        other = found[1][name]
        assert (parameter is other) is (mode == "share"), name
        # Each is drawn when its shape is known; what has its values already is copied.
        copied = name.startswith("2.") and mode == "copy"
        assert not copied or torch.equal(parameter, other), name
    assert len(model) == 2
    assert len(model.repeat(0, mode=mode)) == 0
