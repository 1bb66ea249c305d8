"""Who is calling: the one place that looks at Python frames.

A few of torch's functions ask a tensor something in order to do a thing that no mode is told of, or
leave out a step on ``meta``. Which function asks is then all that there is to go by.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import CodeType, FrameType
from typing import Any, NamedTuple

import torch
from torch import nn

from lateinit._torch.modules import load_with_counter

_INIT = vars(nn.init)
_BETWEEN = frozenset({"lateinit", "torch"})
_LIBRARIES = (f"{Path(torch.__file__).parent}{os.sep}", f"{Path(__file__).parents[1]}{os.sep}")
_NO_FILES = ("<frozen", "<eval_with_key")
_SAVERS = ("_save", "_legacy_save")  # of torch.serialization
_STEPS = ("step", "_init_group")  # of torch.optim.Optimizer
# What torch's attention finds of tensors in a block, in place of its fused kernel.
_AS_A_MODE = "some Tensor argument has_torch_function"


def callers(skip: int = 0) -> Iterator[FrameType]:
    """The frames above the function that asks, innermost first, less the first ``skip``."""
    frame: FrameType | None = sys._getframe(skip + 2)
    while frame is not None:
        yield frame
        frame = frame.f_back


class Asked(NamedTuple):
    """Why a tensor is asked whether it is on ``meta``.

    ``why`` is ``"load"`` (``load_state_dict`` would warn that its copy does nothing),
    ``"distribute"`` (a ``DTensor`` is made of it), ``"scatter"`` (a part of each rank's is to be
    copied into it, which torch leaves out on meta; ``given`` holds the arguments) or None.
    """

    why: str | None
    given: Mapping[str, Any]


_NOTHING = Asked(None, {})


def why_is_meta(tensor: Any) -> Asked:
    """Why ``tensor.is_meta`` is read by whoever called the function that asks."""
    caller = sys._getframe(2)
    if caller.f_code is nn.Module._load_from_state_dict.__code__:
        return Asked("load", {})
    name = caller.f_code.co_name
    if name in ("distribute_tensor", "from_local"):
        return Asked("distribute", {})
    if name == "mesh_scatter" and tensor is caller.f_locals.get("output"):
        return Asked("scatter", caller.f_locals)
    return _NOTHING


def is_batch_norm_loading() -> bool:
    """Whether a batch norm's ``_load_from_state_dict`` reads what the function that asks answers.

    It loads a state dict that lacks its counter as if it had the one that there is, but a zero in
    place of one on meta (torch/nn/modules/batchnorm.py).
    """
    return sys._getframe(2).f_code is load_with_counter.__code__


def running_initialiser(names: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]] | None:
    """The outermost function of ``nn.init`` that is running, and its arguments.

    Args:
        names: the initialisers that count, by name.
    """
    found: FrameType | None = None
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_globals is _INIT:
            if frame.f_code.co_name.removeprefix("_no_grad_") in names:
                found = frame
        elif (
            found is not None
            or frame.f_globals.get("__name__", "").partition(".")[0] not in _BETWEEN
        ):
            break
        frame = frame.f_back
    if found is None:
        return None
    return found.f_code.co_name.removeprefix("_no_grad_"), found.f_locals


def _is_between(frame: FrameType) -> bool:
    """Whether a frame may stand between an op and the initialiser that runs it."""
    return frame.f_globals.get("__name__", "").partition(".")[0] in _BETWEEN


def is_running(code: CodeType, within: int) -> bool:
    """Whether a function is among the nearest ``within`` callers of the one that asks."""
    frame: FrameType | None = sys._getframe(2)
    for _ in range(within):
        frame = frame.f_back if frame is not None else None
        if frame is None:
            return False
        if frame.f_code is code:
            return True
    return False


def attention_without_fused_kernel() -> nn.Module | None:
    """The ``nn.MultiheadAttention`` that is running, if a mode alone keeps it off its kernel."""
    code = nn.MultiheadAttention.forward.__code__
    frame = next((frame for frame in callers() if frame.f_code is code), None)
    if frame is None or frame.f_locals.get("why_not_fast_path") != _AS_A_MODE:
        return None
    module: nn.Module = frame.f_locals["self"]
    return module


def is_torch_saving() -> bool:
    """Whether it is ``torch.save`` that pickles the object whose method asks."""
    frame = sys._getframe(2)
    in_torch = frame.f_globals.get("__name__") == "torch.serialization"
    return in_torch and frame.f_code.co_name in _SAVERS


def is_optimizer_stepping() -> bool:
    """Whether the property that asks is read by an optimizer that is about to step."""
    for _, frame in zip(range(2), callers(2), strict=False):
        steps = frame.f_code.co_name in _STEPS
        if steps and isinstance(frame.f_locals.get("self"), torch.optim.Optimizer):
            return True
    return False


def is_in_torch_optim() -> bool:
    """Whether the property that asks is read by code of ``torch.optim``."""
    package = sys._getframe(2).f_globals.get("__package__") or ""
    return package.startswith("torch.optim")


def is_library(file: str) -> bool:
    """Whether a file is torch's or lateinit's own."""
    return file.startswith(_LIBRARIES)


def innermost_foreign_line() -> str | None:
    """``file.py:12 in forward``: the innermost running line that is neither torch's nor ours."""
    for frame in callers():
        code = frame.f_code
        if not is_library(code.co_filename) and not code.co_filename.startswith(_NO_FILES):
            return f"{code.co_filename}:{frame.f_lineno} in {code.co_name}"
    return None
