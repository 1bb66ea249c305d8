"""Give the state of an optimizer its values before a step that needs them.

What an optimizer makes of parameters when it is built, such as the sums of ``Adagrad``, is deferred
as they are. Most steps use it in ops, which are heard. torch/optim/optimizer.py groups it by device
in C++ first (``torch._C._group_tensors_by_device_and_dtype``), where no hook is asked.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_pre_hook

from lateinit._recording.after_block import is_real
from lateinit._recording.watched import Watched
from lateinit._tensors import is_deferred_tensor, realize_now


def _realise_state(optimizer: Any, args: Any, kwargs: Any) -> None:
    """Realise the state that belongs to real parameters: no other is stepped over."""
    for parameter, state in optimizer.state.items():
        if isinstance(parameter, Tensor) and is_real(parameter):
            _realise(state)


def _realise(state: Any) -> None:
    if isinstance(state, Tensor):
        if is_deferred_tensor(state):
            realize_now(state)
    elif isinstance(state, dict):
        _realise(tuple(state.values()))
    elif isinstance(state, (list, tuple)):
        for part in state:
            _realise(part)


class _Hook:
    """The one hook before the steps of all optimizers."""

    handle: Any = None

    def register(self) -> bool:
        if self.handle is None:
            self.handle = register_optimizer_step_pre_hook(_realise_state)
        return True

    def remove(self) -> None:
        self.handle.remove()
        self.handle = None


_hook = _Hook()
watch_optimizers = Watched(_hook.register, _hook.remove).add
"""Give the state that is made of the tensors of a program its values when it is needed."""
