"""The models that are measured. Each builder takes ``tiny``: the same in small, for the tests."""

from __future__ import annotations

import math
import os
from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from collections.abc import Callable

    Initialiser = Callable[[torch.Tensor], object]

os.environ["HF_HUB_OFFLINE"] = "1"


def linears(*, tiny: bool = False) -> nn.Module:
    """24 large linear layers, each weight and bias drawn once."""
    count, width = (3, 33) if tiny else (24, 2048)
    return nn.Sequential(*(nn.Linear(width, width) for _ in range(count)))


def smallest(*, tiny: bool = False) -> nn.Module:
    """The smallest model that someone may have."""
    del tiny
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))


def gpt2(width: int, layers: int, heads: int, *, tiny: bool) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel  # noqa: PLC0415 - slow to import

    if tiny:
        small = {"vocab_size": 97, "bos_token_id": 0, "eos_token_id": 0}
        return GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=2, **small))
    return GPT2LMHeadModel(GPT2Config(n_embd=width, n_layer=layers, n_head=heads))


def small_gpt2(*, tiny: bool = False) -> nn.Module:
    """The size that tests use."""
    del tiny
    return gpt2(0, 0, 0, tiny=True)


def gpt2_medium(*, tiny: bool = False) -> nn.Module:
    return gpt2(1024, 24, 16, tiny=tiny)


def gpt2_xl(*, tiny: bool = False) -> nn.Module:
    return gpt2(1600, 48, 25, tiny=tiny)


def llama(
    width: int, inner: int, layers: int, heads: int, *, kv_heads: int, words: int, tiny: bool
) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM  # noqa: PLC0415 - slow to import

    if tiny:
        width, inner, layers, heads, kv_heads, words = 32, 48, 2, 4, 2, 97
    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=width // heads,
        vocab_size=words,
    )
    return LlamaForCausalLM(config)


def llama_300m(*, tiny: bool = False) -> nn.Module:
    return llama(1024, 2816, 18, 16, kv_heads=16, words=32_000, tiny=tiny)


def llama_1b(*, tiny: bool = False) -> nn.Module:
    return llama(2048, 5632, 22, 32, kv_heads=4, words=32_000, tiny=tiny)


def llama_70b(*, tiny: bool = False) -> nn.Module:
    return llama(8192, 28_672, 80, 64, kv_heads=8, words=128_256, tiny=tiny)


class Bottleneck(nn.Module):
    """A residual block of three convolutions."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        outputs = 4 * width
        self.conv1 = nn.Conv2d(inputs, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, outputs, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.downsample = None
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )


class ResNet(nn.Module):
    """A residual network of He et al., 2015, as vision libraries build and initialise it."""

    def __init__(self, blocks: tuple[int, ...], width: int = 64, classes: int = 1000) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        stages, inputs = [], width
        for stage, count in enumerate(blocks):
            inner = width * 2**stage
            for block in range(count):
                stride = 2 if stage and not block else 1
                stages.append(Bottleneck(inputs, inner, stride))
                inputs = 4 * inner
        self.layers = nn.Sequential(*stages)
        self.fc = nn.Linear(inputs, classes)
        self.apply(self._initialise)

    def _initialise(self, module: nn.Module) -> None:
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.constant_(module.weight, 1)
            nn.init.constant_(module.bias, 0)


def resnet_152(*, tiny: bool = False) -> nn.Module:
    return ResNet((1, 2), 8, 10) if tiny else ResNet((3, 8, 36, 3))


class VisionTransformer(nn.Module):
    """The shape of a ViT-L/16, all its matrices initialised by one function."""

    def __init__(self, initialise: Initialiser, width: int, layers: int, heads: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 16, 16)
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.positions = nn.Parameter(torch.zeros(1, 197, width))
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(width, heads, 4 * width, batch_first=True, norm_first=True)
            for _ in range(layers)
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 1000)
        with torch.no_grad():
            for parameter in self.parameters():
                if parameter.dim() > 1:
                    initialise(parameter)


def by_inverse_error_function(tensor: torch.Tensor) -> None:
    """A truncated normal as older libraries draw it: uniform, erfinv, scale, shift, clamp."""
    std, low, high = 0.02, -2.0, 2.0
    lower, upper = ((1 + math.erf(x / std / math.sqrt(2))) / 2 for x in (low, high))
    tensor.uniform_(2 * lower - 1, 2 * upper - 1)
    tensor.erfinv_()
    tensor.mul_(std * math.sqrt(2))
    tensor.add_(0.0)
    tensor.clamp_(low, high)


def by_wide_bounds(tensor: torch.Tensor) -> None:
    """`trunc_normal_` with its default bounds, a hundred standard deviations out."""
    nn.init.trunc_normal_(tensor, std=0.02)


def by_narrow_bounds(tensor: torch.Tensor) -> None:
    """`trunc_normal_` with bounds that reject one draw in twenty."""
    nn.init.trunc_normal_(tensor, std=0.02, a=-0.04, b=0.04)


def vit(initialise: Initialiser, *, tiny: bool, layers: int = 24) -> nn.Module:
    if tiny:
        return VisionTransformer(initialise, 32, 2, 2)
    return VisionTransformer(initialise, 1024, layers, 16)


def vit_erfinv(*, tiny: bool = False) -> nn.Module:
    return vit(by_inverse_error_function, tiny=tiny)


def vit_wide(*, tiny: bool = False) -> nn.Module:
    return vit(by_wide_bounds, tiny=tiny)


def vit_narrow(*, tiny: bool = False) -> nn.Module:
    # Four layers of it: eager construction of all 24 takes minutes.
    return vit(by_narrow_bounds, tiny=tiny, layers=4)


MODELS: dict[str, Callable[..., nn.Module]] = {
    make.__name__: make
    for make in (
        linears,
        smallest,
        small_gpt2,
        gpt2_medium,
        gpt2_xl,
        llama_300m,
        llama_1b,
        llama_70b,
        resnet_152,
        vit_erfinv,
        vit_wide,
        vit_narrow,
    )
}
