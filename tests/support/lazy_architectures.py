"""Architectures that people declare lazily, each with its sizes or without; ``width`` scales them.

``ARCHITECTURES[name]`` is ``(make, inputs)``: ``make(of, width)`` builds the model out of
``Layers``, and ``inputs`` are the shapes of its inputs, or the inputs themselves.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from tests.support.lazy_models import Layers


def conv(of: Layers, inputs: int, width: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        of.Conv2d(inputs, width, 3, stride, 1, bias=False), of.BatchNorm2d(width), nn.ReLU()
    )


class UNet(nn.Module):
    """Ronneberger et al., 2015: what goes up meets what came down."""

    def __init__(self, of: Layers, w: int) -> None:
        super().__init__()
        self.down = nn.ModuleList(
            [conv(of, 3, w), conv(of, w, 2 * w, 2), conv(of, 2 * w, 4 * w, 2)]
        )
        self.up = nn.ModuleList(
            [of.ConvTranspose2d(4 * w, 2 * w, 2, 2), of.ConvTranspose2d(2 * w, w, 2, 2)]
        )
        self.merge = nn.ModuleList([conv(of, 4 * w, 2 * w), conv(of, 2 * w, w)])
        self.out = of.Conv2d(w, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        kept = []
        for down in self.down:
            x = down(x)
            kept.append(x)
        kept.pop()
        for up, merge in zip(self.up, self.merge, strict=True):
            x = merge(torch.cat([up(x), kept.pop()], 1))
        return self.out(x)


class Pyramid(nn.Module):
    """A detection neck: Lin et al., 2017, and shared heads over its levels."""

    def __init__(self, of: Layers, w: int) -> None:
        super().__init__()
        self.body = nn.ModuleList(
            [conv(of, 3, w, 2), conv(of, w, 2 * w, 2), conv(of, 2 * w, 3 * w, 2)]
        )
        self.lateral = nn.ModuleList(of.Conv2d(n * w, w, 1) for n in (1, 2, 3))
        self.smooth = nn.ModuleList(of.Conv2d(w, w, 3, padding=1) for _ in range(3))
        self.boxes, self.classes = of.Conv2d(w, 4, 1), of.Conv2d(w, 9, 1)

    def forward(self, x: Tensor) -> list[tuple[Tensor, Tensor]]:
        levels = []
        for body in self.body:
            x = body(x)
            levels.append(x)
        sides = [lateral(level) for lateral, level in zip(self.lateral, levels, strict=True)]
        for i in (1, 0):
            sides[i] = sides[i] + F.interpolate(sides[i + 1], size=sides[i].shape[-2:])
        smooth = [each(side) for each, side in zip(self.smooth, sides, strict=True)]
        return [(self.boxes(level), self.classes(level)) for level in smooth]


class Mixer(nn.Module):
    """Tolstikhin et al., 2021: one layer mixes over patches, the next over channels."""

    def __init__(self, of: Layers, w: int) -> None:
        super().__init__()
        self.patches = of.Conv2d(3, w, 4, 4)
        self.norms = nn.ModuleList(of.LayerNorm(w) for _ in range(4))
        self.tokens = nn.ModuleList(
            nn.Sequential(of.Linear(16, 2 * w), nn.GELU(), of.Linear(2 * w, 16)) for _ in range(2)
        )
        self.channels = nn.ModuleList(
            nn.Sequential(of.Linear(w, 4 * w), nn.GELU(), of.Linear(4 * w, w)) for _ in range(2)
        )
        self.head = of.Linear(w, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        for i in range(2):
            x = x + self.tokens[i](self.norms[2 * i](x).transpose(1, 2)).transpose(1, 2)
            x = x + self.channels[i](self.norms[2 * i + 1](x))
        return self.head(x.mean(1))


class RNNEncoder(nn.Module):
    """A bidirectional encoder over packed sequences, and attention pooling."""

    def __init__(self, of: Layers, w: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, w)
        self.rnn = of.LSTM(w, w, 2, batch_first=True, bidirectional=True)
        self.score, self.head = of.Linear(2 * w, 1), of.Linear(2 * w, 3)

    def forward(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        packed = pack_padded_sequence(
            self.embed(tokens), lengths, batch_first=True, enforce_sorted=False
        )
        y, _ = pad_packed_sequence(self.rnn(packed)[0], batch_first=True)
        mask = torch.arange(y.shape[1]) >= lengths[:, None]
        weights = self.score(y).squeeze(-1).masked_fill(mask, -torch.inf).softmax(-1)
        return self.head((weights[..., None] * y).sum(1))


class GraphNet(nn.Module):
    """Messages along edges, added up at nodes; as many nodes as the edges name."""

    def __init__(self, of: Layers, w: int) -> None:
        super().__init__()
        self.message = nn.ModuleList([of.Linear(6 + 2, w), of.Linear(w + 2, w)])
        self.update = nn.ModuleList([of.GRUCell(w, w), of.GRUCell(w, w)])
        self.enter, self.read = of.Linear(6, w), of.Linear(w, 2)

    def forward(self, x: Tensor, edges: Tensor, weights: Tensor) -> Tensor:
        h = self.enter(x)
        for i in range(2):
            source = (x if i == 0 else h)[edges[0]]
            sent = self.message[i](torch.cat([source, weights], -1))
            h = self.update[i](h.new_zeros(h.shape).index_add(0, edges[1], sent), h)
        return self.read(h[: int(edges.max()) + 1].mean(0))


class Attention(nn.Module):
    def __init__(self, of: Layers, w: int) -> None:
        super().__init__()
        self.norm_1, self.norm_2 = of.LayerNorm(w), of.LayerNorm(w)
        self.qkv, self.out = of.Linear(w, 3 * w), of.Linear(w, w)
        self.up, self.down = of.Linear(w, 4 * w), of.Linear(4 * w, w)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm_1(x)).chunk(3, -1)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v))
        return x + self.down(F.gelu(self.up(self.norm_2(x))))


class ViT(nn.Module):
    """Dosovitskiy et al., 2021."""

    def __init__(self, of: Layers, w: int, depth: int = 2) -> None:
        super().__init__()
        self.patches = of.Conv2d(3, w, 4, 4)
        self.token = nn.Parameter(torch.randn(1, 1, w) * 0.02)
        self.blocks = nn.Sequential(*(Attention(of, w) for _ in range(depth)))
        self.norm, self.head = of.LayerNorm(w), of.Linear(w, 7)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1)
        return self.head(self.norm(self.blocks(x))[:, 0])


class PointNet(nn.Module):
    """Qi et al., 2017, with the transform that it learns of its input."""

    def __init__(self, of: Layers, w: int) -> None:
        super().__init__()
        self.local = nn.Sequential(of.Conv1d(3, w, 1), of.BatchNorm1d(w), nn.ReLU())
        self.turn = nn.Sequential(of.Linear(w, w), nn.ReLU(), of.Linear(w, 9))
        self.deep = nn.Sequential(of.Conv1d(w, 2 * w, 1), nn.ReLU())
        self.head = of.Linear(2 * w, 4)

    def forward(self, x: Tensor) -> Tensor:
        turn = self.turn(self.local(x).amax(-1)).view(-1, 3, 3) + torch.eye(3)
        return self.head(self.deep(self.local(turn @ x)).amax(-1))


class WaveNet(nn.Module):
    """van den Oord et al., 2016: dilated, gated, with skips."""

    def __init__(self, of: Layers, w: int) -> None:
        super().__init__()
        self.enter = of.Conv1d(1, w, 1)
        self.gates = nn.ModuleList(of.Conv1d(w, 2 * w, 2, dilation=2**i) for i in range(3))
        self.skips = nn.ModuleList(of.Conv1d(w, 3 * w, 1) for _ in range(3))
        self.leave = nn.Sequential(nn.ReLU(), of.Conv1d(2 * w, 8, 1), nn.PReLU())

    def forward(self, x: Tensor) -> Tensor:
        x, total = self.enter(x), torch.zeros(())
        for i, (gate, skip) in enumerate(zip(self.gates, self.skips, strict=True)):
            a, b = gate(F.pad(x, (2**i, 0))).chunk(2, 1)
            rest, kept = skip(a.tanh() * b.sigmoid()).split([x.shape[1], 2 * x.shape[1]], 1)
            x, total = x + rest, total + kept
        return self.leave(total)


class VAE(nn.Module):
    """Kingma and Welling, 2014: draws in its forward pass."""

    def __init__(self, of: Layers, w: int) -> None:
        super().__init__()
        self.encode = nn.Sequential(conv(of, 3, w, 2), conv(of, w, 2 * w, 2), nn.Flatten())
        self.mean, self.log = of.Linear(2 * w * 16, w), of.Linear(2 * w * 16, w)
        self.decode = of.Linear(w, 2 * w * 16)
        self.grow = nn.Sequential(
            of.ConvTranspose2d(2 * w, w, 4, 2, 1), nn.ReLU(), of.ConvTranspose2d(w, 3, 4, 2, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        h = self.encode(x)
        z = self.mean(h) + torch.randn_like(self.log(h)) * self.log(h).exp()
        return self.grow(self.decode(z).view(len(x), -1, 4, 4))


class Seq2Seq(nn.Module):
    """Bahdanau et al., 2015: a decoder that attends, step by step."""

    def __init__(self, of: Layers, w: int) -> None:
        super().__init__()
        self.encoder = of.GRU(5, w, batch_first=True)
        self.query, self.key, self.energy = of.Linear(w, w), of.Linear(w, w), of.Linear(w, 1)
        self.cell, self.out = of.GRUCell(6 + w, w), of.Linear(w, 6)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        memory, h = self.encoder(x)
        h, found = h[0], []
        for step in y.unbind(1):
            energy = self.energy((self.key(memory) + self.query(h)[:, None]).tanh())
            context = (energy.softmax(1) * memory).sum(1)
            h = self.cell(torch.cat([step, context], -1), h)
            found.append(self.out(h))
        return torch.stack(found, 1)


class Siamese(nn.Module):
    """Two views through one body, compared."""

    def __init__(self, of: Layers, w: int) -> None:
        super().__init__()
        self.body = nn.Sequential(conv(of, 3, w, 2), conv(of, w, w, 2), nn.Flatten())
        self.project = nn.Sequential(of.Linear(w * 16, w), of.BatchNorm1d(w), nn.ReLU())
        self.compare = of.Bilinear(w, w, 1) if not of.lazy else of.Bilinear(w, 1)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.compare(self.project(self.body(a)), self.project(self.body(b)))


class Backbone(nn.Module):
    """A model of transformers, and a lazy head on what it gives."""

    def __init__(self, of: Layers, w: int) -> None:
        super().__init__()
        from transformers import BertConfig, BertModel

        self.body = BertModel(
            BertConfig(
                hidden_size=4 * w,
                num_hidden_layers=2,
                num_attention_heads=2,
                intermediate_size=8 * w,
                vocab_size=60,
                max_position_embeddings=16,
            )
        )
        self.head = nn.Sequential(of.Linear(4 * w, w), nn.Tanh(), of.Linear(w, 3))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.body(tokens).last_hidden_state[:, 0])


IMAGE = (2, 3, 16, 16)
TOKENS = torch.arange(10).view(2, 5)
EDGES = torch.tensor([[0, 1, 2, 3], [1, 2, 0, 4]])
Make = Callable[[Layers, int], nn.Module]
ARCHITECTURES: dict[str, tuple[Make, tuple[Any, ...]]] = {
    "detection neck": (Pyramid, (IMAGE,)),
    "graph network": (GraphNet, ((5, 6), EDGES, (4, 2))),
    "mixer": (Mixer, (IMAGE,)),
    "pointnet": (PointNet, ((2, 3, 9),)),
    "rnn encoder": (RNNEncoder, (TOKENS, torch.tensor([3, 5]))),
    "seq2seq": (Seq2Seq, ((2, 4, 5), (2, 3, 6))),
    "siamese": (Siamese, (IMAGE, IMAGE)),
    "transformers backbone": (Backbone, (TOKENS,)),
    "u-net": (UNet, (IMAGE,)),
    "vae": (VAE, (IMAGE,)),
    "vision transformer": (ViT, (IMAGE,)),
    "wavenet": (WaveNet, ((2, 1, 12),)),
}


def inputs_of(name: str, device: str) -> list[Tensor]:
    """The inputs of an architecture; those of floating point are ones on ``device``."""
    given = ARCHITECTURES[name][1]
    return [i if isinstance(i, Tensor) else torch.ones(i, device=device) for i in given]
