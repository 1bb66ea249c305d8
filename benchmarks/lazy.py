"""Inferring the shapes of lazy models: on shapes alone, and by a real first forward pass.

The measured step takes a lazily declared model and an example input, and ends when every shape is
known. Ours leaves deferred parameters; a real dry run allocates them, draws them and computes. As
a module of its own, it runs one way in a fresh process and prints the time and the peak memory.
"""

from __future__ import annotations

import json
import sys
import time
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn

import lateinit
from benchmarks.harness import MB, Goal, Row, Run, assert_equal, in_process
from benchmarks.memory import forget, highest, resident
from tests.support.lazy_architectures import ARCHITECTURES, inputs_of
from tests.support.lazy_models import Layers as OfTests

if TYPE_CHECKING:
    from collections.abc import Callable


LONG = ("gpt-1.6b",)  # a real dry run takes more than a minute


class Layers:
    """Layers by name, without the size that comes first where they are lazy."""

    def __init__(self, source: Any = None) -> None:
        self.source = source

    def __getattr__(self, name: str) -> Callable[..., nn.Module]:
        if self.source is None:
            return getattr(nn, name)
        made = getattr(self.source, f"Lazy{name}", None)
        if made is None:  # torch has no lazy layer norm
            return getattr(nn, name)
        return lambda _, *args, **kwargs: made(*args, **kwargs)


class Bottleneck(nn.Module):
    def __init__(self, of: Layers, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        outputs = 4 * width
        self.body = nn.Sequential(
            of.Conv2d(inputs, width, 1, bias=False),
            of.BatchNorm2d(width),
            nn.ReLU(),
            of.Conv2d(width, width, 3, stride, 1, bias=False),
            of.BatchNorm2d(width),
            nn.ReLU(),
            of.Conv2d(width, outputs, 1, bias=False),
            of.BatchNorm2d(outputs),
        )
        self.short = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.short = nn.Sequential(
                of.Conv2d(inputs, outputs, 1, stride, bias=False), of.BatchNorm2d(outputs)
            )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.body(x) + self.short(x))


def resnet_50(of: Layers, *, tiny: bool) -> nn.Module:
    width, counts = (4, (1, 1)) if tiny else (64, (3, 4, 6, 3))
    layers: list[nn.Module] = [
        of.Conv2d(3, width, 7, 2, 3, bias=False),
        of.BatchNorm2d(width),
        nn.ReLU(),
        nn.MaxPool2d(3, 2, 1),
    ]
    inputs = width
    for stage, count in enumerate(counts):
        for block in range(count):
            inner = width * 2**stage
            layers.append(Bottleneck(of, inputs, inner, 2 if stage and not block else 1))
            inputs = 4 * inner
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), of.Linear(inputs, 1000))


class Block(nn.Module):
    def __init__(self, of: Layers, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.ln_1, self.ln_2 = of.LayerNorm(width), of.LayerNorm(width)
        self.qkv, self.proj = of.Linear(width, 3 * width), of.Linear(width, width)
        self.up, self.down = of.Linear(width, 4 * width), of.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, width = x.shape
        parts = self.qkv(self.ln_1(x)).split(width, dim=2)
        q, k, v = (p.view(batch, length, self.heads, -1).transpose(1, 2) for p in parts)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)
        x = x + self.proj(y.reshape(batch, length, width))
        return x + self.down(F.gelu(self.up(self.ln_2(x))))


class GPT(nn.Module):
    def __init__(self, of: Layers, width: int, layers: int, heads: int, words: int) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(words, width), nn.Embedding(1024, width)
        self.blocks = nn.Sequential(*(Block(of, width, heads) for _ in range(layers)))
        self.ln, self.head = of.LayerNorm(width), of.Linear(width, words, bias=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        places = torch.arange(tokens.shape[1], device=tokens.device)
        return self.head(self.ln(self.blocks(self.words(tokens) + self.places(places))))


def gpt_1b(of: Layers, *, tiny: bool) -> nn.Module:
    return GPT(of, 32, 2, 2, 97) if tiny else GPT(of, 1600, 48, 25, 50257)


def image(*, tiny: bool) -> torch.Tensor:
    side = 64 if tiny else 224
    return torch.zeros(1, 3, side, side)


def tokens(*, tiny: bool) -> torch.Tensor:
    return torch.zeros(1, 16 if tiny else 1024, dtype=torch.long)


MODELS = {"resnet-50": (resnet_50, image), "gpt-1.6b": (gpt_1b, tokens)}


def declared(model: str, of: Layers, *, tiny: bool) -> nn.Module:
    """A model that is declared with one kind of layers; batch norms need no batch."""
    torch.manual_seed(0)
    return MODELS[model][0](of, tiny=tiny).eval()


def ours(model: str, *, tiny: bool) -> tuple[nn.Module, float]:
    with lateinit.deferred():
        lazy = declared(model, Layers(lateinit.nn), tiny=tiny)
    example = MODELS[model][1](tiny=tiny)
    started = time.perf_counter()
    lateinit.infer_shapes(lazy, example)
    return lazy, time.perf_counter() - started


def dry_run(model: str, *, tiny: bool) -> tuple[nn.Module, float]:
    """torch's own lazy layers and a first forward pass with values."""
    lazy = declared(model, Layers(nn), tiny=tiny)
    example = MODELS[model][1](tiny=tiny)
    started = time.perf_counter()
    with torch.no_grad():
        lazy(example)
    return lazy, time.perf_counter() - started


WAYS = {"ours": ours, "dry run": dry_run}


def inference(model: str, goal: Goal | None) -> Callable[[Run], list[Row]]:
    """A case: the time and the memory of inferring one model, both ways in turn."""

    def case(run: Run) -> list[Row]:
        measured: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
        for _ in range(run.times(1 if model in LONG else None)):
            for way, done in measured.items():
                done.append(in_process("benchmarks.lazy", way, model, str(int(run.tiny))))
        seconds = {way: [d["seconds"] for d in done] for way, done in measured.items()}
        memory = {way: [d["peak_mb"] for d in done] for way, done in measured.items()}
        equal = same_as_eager(model) if run.tiny or model == "resnet-50" else None
        rows = ((seconds, "infer shapes", "s", goal), (memory, "peak memory of that", "MB", None))
        return [
            Row(model, what, found["ours"], "dry run", found["dry run"], unit, aim, equal)
            for found, what, unit, aim in rows
        ]

    return case


def same_as_eager(model: str) -> bool:
    """Whether the lazy model, in small, has the bits of the model with sizes."""
    lazy, _ = ours(model, tiny=True)
    assert_equal(declared(model, Layers(), tiny=True), lateinit.materialize(lazy))
    return True


def architectures(run: Run) -> list[Row]:
    """A case: the architectures that the tests hold against eager, at 100 million parameters."""
    return [_architecture(name, run) for name in sorted(ARCHITECTURES)]


def _architecture(name: str, run: Run) -> Row:
    make, _ = ARCHITECTURES[name]
    width = 6 if run.tiny else _wide(make)
    seconds: dict[str, list[float]] = {"ours": [], "dry run": []}
    for _ in range(run.times()):
        lazy = lateinit.deferred_init(make, OfTests(lazy=True), width)
        inputs = inputs_of(name, "meta")
        started = time.perf_counter()
        lateinit.infer_shapes(lazy, *inputs)
        seconds["ours"].append(time.perf_counter() - started)
        real, inputs = make(OfTests(lazy=True), width).eval(), inputs_of(name, "cpu")
        started = time.perf_counter()
        with torch.no_grad():
            real(*inputs)
        seconds["dry run"].append(time.perf_counter() - started)
    # Of a backbone that is not lazy a dry run initialises nothing, and it computes little for ten
    # tokens (at 4 x 128 of them it takes ten times as long). What is left is the backbone's own
    # Python code on meta, which infer_shapes has to run too.
    goal = None if name == "transformers backbone" else Goal(10, faster=True)
    return Row(name, "infer shapes", seconds["ours"], "dry run", seconds["dry run"], "s", goal)


def _wide(make: Callable[..., nn.Module]) -> int:
    """A width at which an architecture has more than 100 million parameters."""
    width, count = 16, 0
    while count < 10**8:
        width = width * 5 // 8 * 2
        model = lateinit.deferred_init(make, OfTests(lazy=False), width)
        count = sum(p.numel() for p in model.parameters())
    return width


def main(way: str, model: str, tiny: str) -> None:
    forget()  # a new process starts with what was the most of the one that started it
    before = resident()
    _, seconds = WAYS[way](model, tiny=tiny == "1")
    peak = (highest() - before) / MB
    sys.stdout.write(json.dumps({"seconds": seconds, "peak_mb": peak}) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
