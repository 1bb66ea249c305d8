"""Architectures of other libraries, those of them that are installed: name -> how it is built."""

from __future__ import annotations

import importlib.util
import inspect
import re
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from collections.abc import Callable

# Of a family of architectures the first name that says it is small, else the first one.
_SMALL = re.compile(r"atto|femto|pico|nano|tiny|xxs|_xs|_s\b|small|_050|b0|18")


@cache
def architectures() -> dict[str, Callable[[], nn.Module]]:
    """The architectures, by names such as ``timm/resnet18``."""
    found: dict[str, Callable[[], nn.Module]] = {}
    for library, named in LIBRARIES.items():
        if importlib.util.find_spec(library) is not None:
            found |= {f"{library}/{name}": build for name, build in sorted(named().items())}
    return found


def _timm() -> dict[str, Callable[[], nn.Module]]:
    import timm

    families = [timm.list_models(module=module) for module in timm.list_modules()]
    names = [_smallest(family) for family in families if family]
    return {name: partial(timm.create_model, name, pretrained=False) for name in names}


def _torchvision() -> dict[str, Callable[[], nn.Module]]:
    from torchvision import models

    families: dict[str, list[str]] = {}
    for name in models.list_models():
        families.setdefault(models.get_model_builder(name).__module__, []).append(name)
    found = {}
    for family in families.values():
        name = _smallest(family)
        takes = inspect.signature(models.get_model_builder(name)).parameters
        given = dict.fromkeys(takes.keys() & {"weights", "weights_backbone"})
        found[name] = partial(models.get_model, name, **given)
    return found


def _declare_operators_of_torchvision() -> None:
    """Let torchvision be imported beside a torch that its C++ operators were not built for."""
    found = importlib.util.find_spec("torchvision")
    if found is None or found.origin is None or hasattr(torch.ops.torchvision, "nms"):
        return
    source = (Path(found.origin).parent / "_meta_registrations.py").read_text()
    for name in set(re.findall(r'(?:register_meta\("|torchvision::)(\w+)', source)):
        torch.library.define(f"torchvision::{name}", "(Tensor x) -> Tensor")


def _diffusers() -> dict[str, Callable[[], nn.Module]]:
    import diffusers

    found: dict[str, Callable[[], nn.Module]] = {}
    for name in dir(diffusers):
        cls = getattr(diffusers, name, None)
        own = inspect.isclass(cls) and issubclass(cls, nn.Module)
        if own and all(p.default is not p.empty for p in _arguments(cls)):
            found[name] = cls
    return found


def _arguments(cls: type) -> list[inspect.Parameter]:
    parameters = list(inspect.signature(cls).parameters.values())
    return [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]


def _peft() -> dict[str, Callable[[], nn.Module]]:
    import peft

    return {
        name.removesuffix("Config"): partial(_adapted, getattr(peft, name))
        for name in dir(peft)
        if name.endswith("Config") and name != "PeftConfig"
    }


def _adapted(config: Any) -> nn.Module:
    """A small language model with an adapter."""
    import peft
    from transformers import GPT2Config, GPT2LMHeadModel

    base = GPT2LMHeadModel(
        GPT2Config(vocab_size=97, n_positions=24, n_embd=36, n_layer=2, n_head=3)
    )
    takes = set(inspect.signature(config).parameters)
    given = {
        "task_type": "CAUSAL_LM",
        "target_modules": ["c_attn"],
        "r": 3,
        "num_virtual_tokens": 4,
    }
    given |= {"token_indices": [0, 5], "total_step": 10, "feedforward_modules": []}
    return peft.get_peft_model(base, config(**{k: v for k, v in given.items() if k in takes}))


def _smallest(family: list[str]) -> str:
    return next((name for name in family if _SMALL.search(name)), family[0])


LIBRARIES: dict[str, Callable[[], dict[str, Callable[[], nn.Module]]]] = {
    "diffusers": _diffusers,
    "peft": _peft,
    "timm": _timm,
    "torchvision": _torchvision,
}
_declare_operators_of_torchvision()  # before any library imports it, transformers included
