"""The classes of pytorch-pfn-extras (PPE), known by the name of their module: it is optional."""

from __future__ import annotations

from torch import nn


def is_pfn_class(cls: type) -> bool:
    """Whether a class is one of PPE's own."""
    return cls.__module__.startswith("pytorch_pfn_extras.")


def is_pfn_layer(module: nn.Module) -> bool:
    """Whether a module is of one of PPE's own classes, not of a subclass of them."""
    return is_pfn_class(type(module))
