"""``skip_init`` on devices: what is asked for, what is the default, and ``meta``."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lateinit


class Placed(nn.Module):
    """Must be told its device, and remembers it."""

    def __init__(self, width: int, device: torch.device | str) -> None:
        super().__init__()
        self.device = device
        self.weight = nn.Parameter(torch.ones(width, device=device))
        self.register_buffer("steps", torch.arange(width, device=device))


@pytest.mark.parametrize("device", ["cpu", torch.device("cpu"), "meta"])
def test_a_class_that_takes_a_device_is_given_it(device: torch.device | str) -> None:
    module = lateinit.skip_init(Placed, 3, device=device)
    assert module.device == device
    assert {t.device for t in (module.weight, module.steps)} == {torch.device(device)}
    if torch.device(device).type == "cpu":
        assert module.steps.tolist() == [0, 1, 2]


class Unplaced(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 3)
        self.register_buffer("steps", torch.arange(3) * 2)


def test_a_module_may_be_constructed_on_meta_and_away_from_it() -> None:
    before = torch.get_rng_state()
    asked = lateinit.skip_init(Unplaced, device="meta")
    with torch.device("meta"):
        default, away = lateinit.skip_init(Unplaced), lateinit.skip_init(Unplaced, device="cpu")
    for model in (asked, default):
        assert all(t.is_meta for t in (*model.parameters(), *model.buffers()))
        assert not lateinit.is_deferred(model)
    assert away.layer.weight.device.type == "cpu"
    assert away.steps.tolist() == [0, 2, 4]
    assert torch.equal(before, torch.get_rng_state())
