"""The transforms of ``torch.func``: grad, vjp, jvp, vmap and others."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch._functorch import eager_transforms
from torch.compiler import is_dynamo_compiling

from lateinit._torch.modes import graph_break, set_eval_frame

# The functions by which grad and vjp, and functionalize, wrap each tensor. They call no
# ``__torch_function__``, and give a plain tensor (torch/_functorch/eager_transforms.py).
_WRAPS = {
    name: getattr(eager_transforms, name) for name in ("_wrap_for_grad", "_wrap_functional_tensor")
}


def is_functorch_running() -> bool:
    """Whether ``vmap`` or another transform of ``torch.func`` runs, as Python code sees it."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def unwrapped(tensor: Any) -> Any:
    """The innermost tensor in the nested wrappers of ``torch.func``."""
    while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return tensor


@contextlib.contextmanager
def outside_functorch() -> Iterator[None]:
    """Run a block as if no ``vmap`` or ``torch.func.grad`` were running."""
    if not is_functorch_running():
        yield
        return
    # Slow to import; it is imported already if such a transform is running.
    from torch._functorch import pyfunctorch  # noqa: PLC0415

    with pyfunctorch.temporarily_clear_interpreter_stack():
        yield


def tell_of_wrapped(classes: tuple[type, ...], listener: Callable[[Any], object] | None) -> None:
    """Call ``listener`` with each tensor of some classes before a transform wraps it.

    None ends that.
    """
    for name, wrap in _WRAPS.items():
        told = wrap if listener is None else _telling(classes, listener, wrap)
        setattr(eager_transforms, name, told)


def _telling(
    classes: tuple[type, ...], listener: Callable[[Any], object], wrap: Callable[..., Any]
) -> Callable[..., Any]:
    def told(tensor: Any, level: int) -> Any:
        # torch.compile traces this, as it does the transforms themselves; not the listener.
        if isinstance(tensor, classes):
            if is_dynamo_compiling():
                graph_break()
            compiling = set_eval_frame(None)
            try:
                listener(tensor)
            finally:
                set_eval_frame(compiling)
        return wrap(tensor, level)

    return told
