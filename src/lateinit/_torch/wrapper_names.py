"""The names under which torch's wrappers keep the module that they wrap."""

from __future__ import annotations

_NAMES = frozenset(
    {
        "_orig_mod",  # torch.compile: torch/_dynamo/eval_frame.py, OptimizedModule
        "_checkpoint_wrapped_module",  # torch/.../_checkpoint/checkpoint_wrapper.py
        "_fsdp_wrapped_module",  # FSDP1: torch/distributed/fsdp/_common_utils.py
    }
)
"""Attributes of wrappers that appear in names of parameters, and that no model has itself."""


def without_wrappers(name: str) -> str:
    """A fully qualified name without the parts that wrappers add."""
    if _NAMES.isdisjoint(parts := name.split(".")):
        return name
    return ".".join(part for part in parts if part not in _NAMES)
