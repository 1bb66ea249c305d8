"""A lazy U-Net: no number of input channels is written down, also where a skip is joined."""

from itertools import pairwise

import torch
from torch import nn

import lateinit


def lazy_level(width: int) -> nn.Sequential:
    """Two convolutions that take the channels of what they are given."""
    conv, norm = lateinit.nn.LazyConv2d, lateinit.nn.LazyBatchNorm2d
    first, second = (conv(width, 3, padding=1, bias=False) for _ in range(2))
    return nn.Sequential(first, norm(), nn.ReLU(), second, norm(), nn.ReLU())


def level(channels: int, width: int) -> nn.Sequential:
    """The same with sizes by hand."""
    first, second = (nn.Conv2d(c, width, 3, padding=1, bias=False) for c in (channels, width))
    norms = (nn.BatchNorm2d(width) for _ in range(2))
    return nn.Sequential(first, next(norms), nn.ReLU(), second, next(norms), nn.ReLU())


class LazyUNet(nn.Module):
    """Down through the widths, and up again, each level joined with its twin on the way down."""

    def __init__(self, widths: list[int], classes: int) -> None:
        super().__init__()
        upward = widths[-2::-1]
        self.down = nn.ModuleList(lazy_level(width) for width in widths)
        self.up = nn.ModuleList(lateinit.nn.LazyConvTranspose2d(w, 2, stride=2) for w in upward)
        self.join = nn.ModuleList(lazy_level(width) for width in upward)
        self.head = lateinit.nn.LazyConv2d(classes, 1)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Scores of shape (batch, classes, height, width)."""
        skips = [self.down[0](images)]
        for down in self.down[1:]:
            skips.append(down(nn.functional.max_pool2d(skips[-1], 2)))
        x = skips.pop()
        for up, join in zip(self.up, self.join, strict=True):
            x = join(torch.cat([skips.pop(), up(x)], dim=1))
        return self.head(x)


class UNet(LazyUNet):
    """The same with sizes by hand: each one follows from others, and all must agree."""

    def __init__(self, channels: int, widths: list[int], classes: int) -> None:
        nn.Module.__init__(self)
        upward = list(pairwise(widths[::-1]))
        self.down = nn.ModuleList(level(c, width) for c, width in pairwise([channels, *widths]))
        self.up = nn.ModuleList(nn.ConvTranspose2d(c, width, 2, stride=2) for c, width in upward)
        self.join = nn.ModuleList(level(2 * width, width) for _, width in upward)
        self.head = nn.Conv2d(widths[0], classes, 1)


WIDTHS, CLASSES = [12, 24, 48, 96], 5
torch.manual_seed(0)
eager = UNet(3, WIDTHS, CLASSES)

torch.manual_seed(0)
model = lateinit.deferred_init(LazyUNet, WIDTHS, CLASSES)
weights = [model.down[0][0].weight, model.join[0][0].weight, model.head.weight]
print("declared:", *map(repr, weights))
lateinit.infer_shapes(model, torch.empty(1, 3, 64, 64, device="meta"))  # no memory, no arithmetic
print("inferred:", *(tuple(weight.shape) for weight in weights))
lateinit.materialize(model)

expected, found = eager.state_dict(), model.state_dict()
assert expected.keys() == found.keys()
for name, tensor in expected.items():
    assert torch.equal(tensor, found[name]), name
images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
assert torch.equal(eager(images), model(images))
print(f"equal to eager: {len(found)} tensors, and scores of shape {(*model(images).shape,)}")
