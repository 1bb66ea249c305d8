"""Functions that ``torch.compile`` has made, called in a constructor: they run uncompiled."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor

import lateinit

if TYPE_CHECKING:
    from collections.abc import Callable

FUNCTIONS: dict[str, tuple[Callable[[Any], Tensor], Callable[[], Any]]] = {
    "in place": (lambda w: w.uniform_(-1, 1), lambda: torch.empty(4, 5)),
    "factories": (lambda n: torch.rand(n) + torch.arange(n), lambda: 9),
    "a read": (lambda w: w * w.abs().max().item() + torch.randn(3), lambda: torch.randn(3)),
    "a state": (lambda w: w + torch.get_rng_state()[9], lambda: torch.randn(3)),
    "redrawn": (lambda w: torch.nn.init.trunc_normal_(w, a=-1, b=1), lambda: torch.empty(7, 3)),
}


@pytest.mark.parametrize("backend", ["aot_eager", "eager"])
@pytest.mark.parametrize("name", sorted(FUNCTIONS))
@pytest.mark.filterwarnings("ignore")
def test_a_compiled_function_draws_in_a_constructor_where_it_draws_eagerly(
    name: str, backend: str
) -> None:
    function, given = FUNCTIONS[name]

    def build() -> list[Tensor]:
        compiled = torch.compile(function, backend=backend)
        return [torch.randn(3), compiled(given()), torch.randn(3)]

    torch.manual_seed(0)
    expected = [torch.randn(3), function(given()), torch.randn(3)]
    ended = torch.get_rng_state()
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = lateinit.deferred_init(build)
    assert torch.equal(ended, torch.get_rng_state())
    assert all(map(torch.equal, lateinit.materialize(model), expected))
