"""What has to be replaced in torch while a block runs, because no mode sees it.

``torch.get_rng_state`` must show the state that eager construction would show; ``manual_seed`` may
give the very state that a stream began with; parameters are made below the dispatcher;
``trunc_normal_`` is a loop in Python that is one op to a program; and torch's own functions in
Python call others below the mode that hears functions. The replacements are in place
while any thread is in a block, and ask whether this one is.
"""

from __future__ import annotations

import threading
import weakref
from typing import Any

import torch
from torch import Tensor, nn

from lateinit._recording import composite_ops, trunc_normal
from lateinit._recording.recorder import current
from lateinit._torch.modes import without_modes

_get_rng_state = torch.random.get_rng_state
_manual_seed = torch.random.manual_seed
_new_parameter = nn.Parameter.__dict__["__new__"]


def _settled_rng_state() -> Tensor:
    recorder = current()
    if recorder is not None:
        recorder.settle()
    with without_modes():
        return _get_rng_state()


def _noted_seed(seed: Any) -> torch.Generator:
    generator = _manual_seed(seed)
    recorder = current()
    if recorder is not None:
        recorder.generators.reseeded(torch.default_generator)
    return generator


def _noted_parameter(cls: type[nn.Parameter], *args: Any, **kwargs: Any) -> Tensor:
    parameter: Tensor = _new_parameter.__func__(cls, *args, **kwargs)
    recorder = current()
    if recorder is not None:
        recorder.born.append(weakref.ref(parameter))
    return parameter


_PATCHES: tuple[tuple[Any, str, Any, Any], ...] = (
    (torch, "get_rng_state", _get_rng_state, _settled_rng_state),
    (torch.random, "get_rng_state", _get_rng_state, _settled_rng_state),
    (torch, "manual_seed", _manual_seed, _noted_seed),
    (torch.random, "manual_seed", _manual_seed, _noted_seed),
    (nn.init, "_no_grad_trunc_normal_", trunc_normal.original, trunc_normal.recorded),
    (nn.Parameter, "__new__", _new_parameter, staticmethod(_noted_parameter)),
    *composite_ops.PATCHES,
)


class Patches:
    """Puts the replacements in place; the last to leave takes them out."""

    _lock = threading.Lock()
    _users = 0

    def __enter__(self) -> None:
        with self._lock:
            Patches._users += 1
            if Patches._users == 1:
                for owner, name, _, replacement in _PATCHES:
                    setattr(owner, name, replacement)

    def __exit__(self, *error: object) -> None:
        with self._lock:
            Patches._users -= 1
            if Patches._users == 0:
                for owner, name, original, _ in _PATCHES:
                    setattr(owner, name, original)
