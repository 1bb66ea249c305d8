"""A small model for the ways of other libraries, each of which has lost one of its parts."""

from __future__ import annotations

import torch
from torch import nn

X = torch.ones(2, 3)


class Net(nn.Module):
    """A tied weight, and a buffer and a bias that only the constructor knows."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(3, 3)
        self.down = nn.Linear(3, 3)
        self.down.weight = self.up.weight
        nn.init.constant_(self.up.bias, 7.0)
        self.register_buffer("table", torch.arange(3.0), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.up(x)) + self.table
