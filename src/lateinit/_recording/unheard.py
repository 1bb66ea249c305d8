"""Intercept uses of deferred tensors in which torch calls no guard.

- A step of an optimizer: state that it made from parameters when it was built, such as the sums of
  ``Adagrad``, is deferred too. Most steps use it in ops. But torch/optim/optimizer.py may group it
  by device in C++ first (``_group_tensors_by_device_and_dtype``).
- Saving a scripted module: torch/csrc/jit/serialization/export_module.cpp writes the bytes of its
  tensors, and none for those on ``meta``.
- Scripting a module whose tensors are deferred: the scripted module holds their implementations,
  and must be updated when they become real.
- ``torch.func.grad``, ``vjp`` and ``functionalize`` at a tensor: C++ wraps it in another first.

In a block these uses are recorded, by replacements that precede these.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from lateinit._recording.after_block import is_real, needs_values
from lateinit._recording.watched import Watched
from lateinit._recording.writer import current
from lateinit._tensors import Guarded, GuardedShard, is_deferred_tensor, realize_now, waits
from lateinit._torch import (
    constants_of_script,
    held_by_script,
    note_new_scripts,
    tell_of_script_saves,
    tell_of_wrapped,
)

_GUARDED: Any = (Guarded, GuardedShard)


def _before_step(optimizer: Any, args: Any, kwargs: Any) -> None:
    """Realise the state of real parameters; a step skips all others."""
    if current() is not None:
        return
    for parameter, state in optimizer.state.items():
        late = _deferred(state)
        if late and isinstance(parameter, Tensor) and is_real(parameter):
            for tensor in late:
                realize_now(tensor)


def _deferred(state: Any) -> list[Tensor]:
    if isinstance(state, _GUARDED):
        return [state]
    if not isinstance(state, (dict, list, tuple)):
        return []
    parts = state.values() if isinstance(state, dict) else state
    # This runs before each step, mostly on real tensors, which are recognised by their type alone.
    return [t for part in parts if type(part) is not Tensor for t in _deferred(part)]


def _before_save(module: nn.Module, *_: Any, **__: Any) -> None:
    if current() is not None:
        return
    scripts = list(module.modules())
    held = held_by_script(scripts)
    late = [t for one in held for t in one.tensors() if is_deferred_tensor(t)]
    constants = [t for script in scripts for t in constants_of_script(script)]
    # A constant of a graph cannot get values: ``materialize`` refuses it too.
    refused = [*filter(is_deferred_tensor, constants), *filter(waits, late)]
    if refused:
        raise needs_values("torch.jit.save", refused[0])
    for tensor in late:
        realize_now(tensor)
    for one in held if late else ():
        one.put_back()


def _before_wrap(tensor: Any) -> None:
    if current() is None and is_deferred_tensor(tensor) and not waits(tensor):
        realize_now(tensor)


class _Listening:
    """The hooks and replacements in torch; ``begin`` and ``end`` can be called repeatedly."""

    _hook: Any = None

    def begin(self) -> bool:
        # Not twice: a block may have put its own replacements in place of these by now.
        if self._hook is None:
            tell_of_script_saves(_before_save)
            tell_of_wrapped(_GUARDED, _before_wrap)
            note_new_scripts(on=True)
            self._hook = register_optimizer_step_pre_hook(_before_step)
        return True

    def end(self) -> None:
        if self._hook is not None:
            self._hook.remove()
            self._hook = None
        tell_of_script_saves(None)
        tell_of_wrapped(_GUARDED, None)
        note_new_scripts(on=False)


_listening = _Listening()
watch = Watched(_listening.begin, _listening.end).add
"""Intercept these uses for as long as tensors of a program may be deferred.

Called before the first block of a program puts its replacements in place.
"""
