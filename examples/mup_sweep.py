"""A muP sweep by init rules: the best learning rate of a narrow model is that of a wide one.

The model's code stays as it is. Yang et al., Tensor Programs V, 2022, table 8, with Adam.
"""

import argparse
import math
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import nn

import lateinit

WIDTHS, INPUTS, POWERS = (32, 128, 512), 16, range(-11, -3)
# The variance of a hidden matrix is in proportion to 1 / width, that of the input weights is not,
# and the output weights start at zero.
RULES = {
    "0.weight": lateinit.init.normal(std=1 / math.sqrt(INPUTS)),
    "[246].weight": lateinit.init.kaiming_normal(nonlinearity="relu"),
    "8.weight": "zeros",
    "*.bias": "zeros",
}


def build(width: int) -> nn.Sequential:
    """A model with the initial values that torch gives."""
    hidden = [layer for _ in range(3) for layer in (nn.Linear(width, width), nn.ReLU())]
    return nn.Sequential(nn.Linear(INPUTS, width), nn.ReLU(), *hidden, nn.Linear(width, 8))


def train(model: nn.Sequential, rate: float, *, mup: bool) -> float:
    """The mean loss of the last five of 30 steps."""
    # With Adam, the rate of matrices whose inputs grow with the width is divided by the width.
    slow = WIDTHS[0] / model[0].out_features if mup else 1
    rates = {layer.weight: rate * slow for layer in model[2::2]}
    groups = [{"params": [p], "lr": rates.get(p, rate)} for p in model.parameters()]
    optimizer = torch.optim.Adam(groups)
    draw = torch.Generator().manual_seed(1)
    teacher = torch.randn(INPUTS, 8, generator=draw) / 2
    losses = []
    for _ in range(30):
        inputs = torch.randn(128, INPUTS, generator=draw)
        loss = nn.functional.mse_loss(model(inputs), torch.sin(inputs @ teacher))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return sum(losses[-5:]) / 5


parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--plot", type=Path, help="draw losses by learning rate into this file")
plot = parser.parse_args().plot
panels = Figure(figsize=(8, 3.5), layout="constrained").subplots(1, 2, sharey=True)
best = {}
for axes, mup in zip(panels, (False, True), strict=True):
    for width in WIDTHS:
        losses = []
        for power in POWERS:
            torch.manual_seed(0)
            model = lateinit.deferred_init(build, width)
            lateinit.materialize(model, init=RULES if mup else None)
            losses.append(train(model, 2.0**power, mup=mup))
        best[mup, width] = POWERS[losses.index(min(losses))]
        axes.plot(POWERS, losses, marker="o", label=f"width {width}")
        axes.plot(best[mup, width], min(losses), "k*", zorder=3)
    title = "init rules of muP" if mup else "torch's initial values"
    print(f"{title}: best rates", *(f"2^{best[mup, width]}" for width in WIDTHS))
    axes.set(title=title, xlabel="learning rate, power of two", ylim=(0.3, 0.6))
panels[0].set_ylabel("loss")
panels[1].legend()
assert best[False, 32] - best[False, 512] >= 2  # a rate that was tuned when narrow is too large
assert abs(best[True, 32] - best[True, 512]) <= 1
if plot is not None:
    panels[0].figure.savefig(plot)
