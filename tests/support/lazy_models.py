"""Whole models, lazily declared or with their sizes: ``sizes(eager)`` is None where lazy."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import lateinit


class Layers:
    """Layers by name: the eager ones, or the lazy ones, which leave out their first argument."""

    def __init__(self, *, lazy: bool) -> None:
        self.lazy = lazy

    def __getattr__(self, name: str) -> Any:
        if not self.lazy:
            return getattr(nn, name)
        made = getattr(lateinit.nn, f"Lazy{name}")
        return lambda _, *args, **kwargs: made(*args, **kwargs)


class Bottleneck(nn.Module):
    def __init__(self, of: Layers, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = of.Conv2d(inputs, width, 1, bias=False)
        self.bn1 = of.BatchNorm2d(width)
        self.conv2 = of.Conv2d(width, width, 3, stride, 1, bias=False)
        self.bn2 = of.BatchNorm2d(width)
        self.conv3 = of.Conv2d(width, 4 * width, 1, bias=False)
        self.bn3 = of.BatchNorm2d(4 * width)
        self.shorten = None
        if stride != 1 or inputs != 4 * width:
            self.shorten = nn.Sequential(
                of.Conv2d(inputs, 4 * width, 1, stride, bias=False), of.BatchNorm2d(4 * width)
            )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = F.relu(self.bn2(self.conv2(y)))
        short = x if self.shorten is None else self.shorten(x)
        return F.relu(self.bn3(self.conv3(y)) + short)


class ResNet50(nn.Module):
    """He et al., 2015; ``width`` scales it down."""

    def __init__(self, *, lazy: bool, width: int = 64) -> None:
        super().__init__()
        of = Layers(lazy=lazy)
        self.stem = nn.Sequential(
            of.Conv2d(3, width, 7, 2, 3, bias=False),
            of.BatchNorm2d(width),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(3, 2, 1),
        )
        blocks, inputs = [], width
        for stage, count in enumerate((3, 4, 6, 3)):
            inner = width * 2**stage
            for number in range(count):
                stride = 2 if stage and not number else 1
                blocks.append(Bottleneck(of, inputs, inner, stride))
                inputs = 4 * inner
        self.blocks = nn.Sequential(*blocks)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = of.Linear(inputs, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.pool(self.blocks(self.stem(x))).flatten(1))


class Block(nn.Module):
    def __init__(self, of: Layers, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.ln_1 = of.LayerNorm(width)
        self.qkv = of.Linear(width, 3 * width)
        self.proj = of.Linear(width, width)
        self.ln_2 = of.LayerNorm(width)
        self.up = of.Linear(width, 4 * width)
        self.down = of.Linear(4 * width, width)
        self.drop = nn.Dropout(0.1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, width = x.shape
        q, k, v = (
            part.view(batch, length, self.heads, -1).transpose(1, 2)
            for part in self.qkv(self.ln_1(x)).split(width, dim=2)
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.drop(self.proj(y.transpose(1, 2).reshape(batch, length, width)))
        return x + self.drop(self.down(F.gelu(self.up(self.ln_2(x)))))


class GPT(nn.Module):
    """A decoder as GPT-2's, whose output may be tied to its embedding once its shape is known."""

    def __init__(
        self, *, lazy: bool, width: int = 32, layers: int = 3, heads: int = 4, words: int = 97
    ) -> None:
        super().__init__()
        of = Layers(lazy=lazy)
        self.wte = nn.Embedding(words, width)
        self.wpe = nn.Embedding(1024, width)
        self.blocks = nn.ModuleList(Block(of, width, heads) for _ in range(layers))
        self.ln = of.LayerNorm(width)
        self.head = of.Linear(width, words, bias=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        places = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.wte(tokens) + self.wpe(places)
        for block in self.blocks:
            x = block(x)
        return self.head(self.ln(x))


def gpt2_xl(*, lazy: bool) -> GPT:
    """1.6 billion parameters."""
    return GPT(lazy=lazy, width=1600, layers=48, heads=25, words=50257)
