"""The transforms of ``torch.func``: grad, vjp, jvp, vmap and their like."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch


def is_functorch_running() -> bool:
    """Whether ``vmap`` or another transform of ``torch.func`` runs, as Python code sees it."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def unwrapped(tensor: Any) -> Any:
    """The tensor that transforms of ``torch.func`` have wrapped, one in the other."""
    while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return tensor


@contextlib.contextmanager
def outside_functorch() -> Iterator[None]:
    """Run a block as if no ``vmap`` or ``torch.func.grad`` were running."""
    if not is_functorch_running():
        yield
        return
    # Slow to import, and whoever has such a transform running has done so.
    from torch._functorch import pyfunctorch  # noqa: PLC0415

    with pyfunctorch.temporarily_clear_interpreter_stack():
        yield
