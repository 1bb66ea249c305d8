"""Find out which function of torch reads a property of a tensor, and why.

Some functions of torch do something that no mode intercepts, or skip a step on ``meta``. Before
that they read a property of the tensor, such as ``is_meta``. The answer must then depend on which
function reads it, and only its frame identifies that function. The helpers of this file must be
called directly from the property or hook that is read, the *asking* function: see ``frames``.
"""

from __future__ import annotations

import copy
import enum
import functools
from collections.abc import Callable, Mapping
from itertools import islice
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import nn

from lateinit._torch.frames import frame_above, upwards
from lateinit._torch.modules import load_with_counter

_INIT = vars(nn.init)
# Prefixes of the modules whose frames may lie between an initialiser and an op.
_BETWEEN = ("lateinit", "torch.")
_ABOVE = "torch.nn.modules."
_SAVERS = ("_save", "_legacy_save")  # of torch.serialization
_CONVERT = nn.Module._apply.__code__
# torch/_tensor.py: what Tensor.__reduce_ex__ calls for tensors with a storage.
_REDUCE = torch.Tensor._reduce_ex_internal.__code__
_TYPED_STORAGE = torch.Tensor._typed_storage.__code__
_NEW_PARAMETER = nn.Parameter.__new__.__code__
_STEPS = ("step", "_init_group")  # of torch.optim.Optimizer
_ASKS_TO_RUN = "_validate_no_meta_params"  # of FSDPParamGroup
_COMPARING = "_ensure_all_tensors_same_dtype"  # of torch/distributed/distributed_c10d.py
_ITEMS = {torch.TypedStorage._getitem.__code__, torch.TypedStorage._setitem.__code__}
# torch/nn/modules/activation.py and transformer.py: the local variables with the reason why a fused
# kernel is not called, and the reason that they hold in a block.
_REASONS = {
    nn.MultiheadAttention.forward.__code__: "why_not_fast_path",
    nn.TransformerEncoderLayer.forward.__code__: "why_not_sparsity_fast_path",
}
_AS_A_MODE = "some Tensor argument has_torch_function"


class Asked(NamedTuple):
    """Why a function of torch reads ``is_meta`` of a tensor.

    ``why`` is one of:

    - ``"load"``: ``load_state_dict``, to warn that copying into meta does nothing.
    - ``"scatter"``: ``mesh_scatter``, to skip copying this rank's part into it. ``given`` holds
      the local variables of that function.
    - ``"broadcast"``: ``mesh_broadcast``, to send nothing.
    - ``"init"``: an initialiser of ``torch.nn.init``, to do nothing. ``given`` has its name as
      ``function``.
    - None: for another reason.
    """

    why: str | None
    given: Mapping[str, Any]


_NOTHING = Asked(None, {})


def why_is_meta(tensor: Any) -> Asked:
    """Why the caller of the asking function reads ``tensor.is_meta``."""
    asking = frame_above(1)
    if asking.f_code is nn.Module._load_from_state_dict.__code__:
        return Asked("load", {})
    name = asking.f_code.co_name
    if asking.f_globals is _INIT:
        return Asked("init", {"function": f"nn.init.{name.removeprefix('_no_grad_')}"})
    # torch/distributed/tensor/_collective_utils.py
    if name == "mesh_scatter" and tensor is asking.f_locals.get("output"):
        return Asked("scatter", asking.f_locals)
    if name == "mesh_broadcast" and tensor is asking.f_locals.get("tensor"):
        return Asked("broadcast", {})
    return _NOTHING


class Meant(enum.Enum):
    """What the code that reads ``device`` of a deferred tensor needs.

    ``META``: the usual answer, ``meta``. ``RECORDED``: the device that the tensor was recorded for.
    All others: its values; their text names that code in error messages.
    """

    META = "meta"
    RECORDED = "recorded"
    PARALLEL = "DistributedDataParallel"
    INVERSE = "right_inverse of a parametrization"
    FORWARD = "the forward pass of fully_shard"
    OTHERS = "moving to another device"

    @property
    def needs_values(self) -> bool:
        """Whether the values are needed."""
        return self not in (Meant.META, Meant.RECORDED)


# By the module that reads ``device``.
_MEANT = {
    # planner_helpers.py and state_dict.py replace meta tensors in place of loading into them.
    "torch.distributed.checkpoint": Meant.RECORDED,
    # optimizer.py: load_state_dict moves the state to the device of the parameter.
    "torch.optim": Meant.RECORDED,
    # utils.py: broadcast_all makes a tensor of a number there, next to a tensor.
    "torch.distributions": Meant.RECORDED,
    # Observers are made on the device of the weights.
    "torch.ao": Meant.RECORDED,
    # meta_utils.py: the device that a fake tensor reports, as in torch.export.
    "torch._subclasses": Meant.RECORDED,
    # DistributedDataParallel compares shapes across ranks in C++, which calls no hook.
    "torch.nn.parallel": Meant.PARALLEL,
}


def meant_by_device(
    others: Mapping[str, Callable[[Mapping[str, Any]], bool]], recorded: tuple[str, ...]
) -> Meant:
    """What the caller of the asking function needs when it reads a deferred tensor's ``device``.

    Args:
        recorded: the beginnings of the names of modules that need the recorded device.
        others: by the name of a module, whether its function with these local variables needs the
            values.
    """
    asking = frame_above(1)
    # torch/nn/modules/batchnorm.py: if a state dict lacks ``num_batches_tracked``, the module keeps
    # its own counter, unless the counter's device is ``meta``: then it loads a zero.
    if asking.f_code is load_with_counter.__code__:
        return Meant.RECORDED
    # torch/nn/utils/parametrizations.py: _Orthogonal draws a tensor there, for an op that has no
    # kernel for meta and raises NotImplementedError. ParametrizationList of parametrize.py takes
    # that to mean that there is no inverse, and the module is left half done. A user's
    # parametrization may do the same.
    if asking.f_code.co_name == "right_inverse":
        return Meant.INVERSE
    # torch/distributed/fsdp/_fully_shard/_fsdp_param_group.py: its error advises to_empty. It reads
    # the device in a list comprehension, which before Python 3.12 has a frame of its own.
    above = asking.f_back
    if _ASKS_TO_RUN in (asking.f_code.co_name, above and above.f_code.co_name):
        return Meant.FORWARD
    name: str = asking.f_globals.get("__name__", "")
    meant = _meant_by_module(name, recorded)
    if meant is Meant.META and name in others and others[name](asking.f_locals):
        return Meant.OTHERS
    return meant


@functools.cache
def _meant_by_module(name: str, recorded: tuple[str, ...]) -> Meant:
    """What any function of a module needs. Cached: FSDP2 reads it twice for each parameter."""
    if name.startswith("torch."):
        for module, meant in _MEANT.items():
            if name.startswith(module):
                return meant
    return Meant.RECORDED if name.startswith(recorded) else Meant.META


def running_initialiser(names: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]] | None:
    """The name and the local variables of the outermost running function of ``nn.init``.

    Outermost, since initialisers call each other (``xavier_normal_`` calls ``_no_grad_normal_``).
    The search ends at the first frame of another library, so it is short outside initialisers.

    Args:
        names: the initialisers to look for, by name.
    """
    # A plain loop, since this runs for every fill.
    found: FrameType | None = None
    frame: FrameType | None = frame_above(0)
    while frame is not None:
        module = frame.f_globals
        if module is _INIT:
            if frame.f_code.co_name.removeprefix("_no_grad_") in names:
                found = frame
        elif found is not None or not _is_between(module.get("__name__", "")):
            break
        frame = frame.f_back
    if found is None:
        return None
    return found.f_code.co_name.removeprefix("_no_grad_"), found.f_locals


def _is_between(module: str) -> bool:
    """Whether a frame of a module may lie between an op and the initialiser that runs it."""
    return module.startswith(_BETWEEN) and not module.startswith(_ABOVE)


def attention_without_fused_kernel() -> nn.Module | None:
    """The running module that a mode alone keeps from calling a fused kernel of attention."""
    for frame in upwards(frame_above(1)):
        reason = _REASONS.get(frame.f_code)
        if reason is not None and frame.f_locals.get(reason) == _AS_A_MODE:
            module: nn.Module = frame.f_locals["self"]
            return module
    return None


def is_torch_saving(between: int = 0) -> bool:
    """Whether ``torch.save`` pickles the object whose method is the asking function.

    Args:
        between: how many frames lie between the asking function and the pickler.
    """
    frame = frame_above(1 + between)
    in_torch = frame.f_globals.get("__name__") == "torch.serialization"
    return in_torch and frame.f_code.co_name in _SAVERS


def is_storage_pickled(between: int = 0) -> bool:
    """Whether a tensor that is being pickled reads its storage, to pickle that.

    Args:
        between: how many frames lie between the asking function and the method of the tensor.
    """
    frame = frame_above(1 + between)
    reducing = frame.f_back is not None and frame.f_back.f_code is _REDUCE
    return reducing and frame.f_code is _TYPED_STORAGE and not is_copying_shallowly(between)


def is_copying_shallowly(between: int = 0) -> bool:
    """Whether ``copy.copy`` is running a method that pickling runs too.

    Args:
        between: how many frames lie between the asking function and that method.
    """
    frames = islice(upwards(frame_above(1 + between)), 6)
    return any(frame.f_code is copy.copy.__code__ for frame in frames)


def is_dcp_writing(between: int = 0) -> bool:
    """Whether torch's distributed checkpoint reads the asking property, to write a file.

    Args:
        between: how many frames lie between the property and the function of torch.
    """
    name: str = frame_above(1 + between).f_globals.get("__name__", "")
    return name == "torch.distributed.checkpoint.filesystem"


def collective_that_compares() -> str | None:
    """The collective that compares the dtypes of its tensors, if it reads the asking property.

    Each collective that takes a list of tensors compares first. A list of lists cannot be
    intercepted later: the dispatcher looks at no tensor in it
    (aten/src/ATen/core/dispatch/DispatchKeyExtractor.h).
    """
    frame = frame_above(1)
    if frame.f_code.co_name != _COMPARING or frame.f_back is None:
        return None
    return frame.f_back.f_code.co_name


def is_pointer_followed(between: int = 0) -> bool:
    """Whether the caller of the asking function reads memory through ``ctypes``.

    safetensors does so with ``data_ptr()``; most code only compares addresses.

    Args:
        between: how many frames lie between the asking function and its caller.
    """
    code = frame_above(1 + between).f_code
    return "ctypes" in code.co_names or "ctypes" in code.co_varnames


def is_module_converting() -> bool:
    """Whether ``nn.Module._apply``, which ``to_empty`` calls, replaces the tensors of a module."""
    # Between it and the asking function lie the frames of lateinit and, for a shard, those of
    # DTensor's dispatch: 40 is well above their number.
    return any(frame.f_code is _CONVERT for frame in islice(upwards(frame_above(1)), 40))


def is_making_parameter(between: int = 0) -> bool:
    """Whether ``nn.Parameter(data)`` calls the asking function.

    Args:
        between: how many frames lie between the two functions.
    """
    return frame_above(1 + between).f_code is _NEW_PARAMETER


def class_of_new_parameter() -> type[nn.Parameter]:
    """The class of parameter that the caller of the asking function makes."""
    asking = frame_above(1)
    made: type[nn.Parameter] = nn.Parameter
    return asking.f_locals["cls"] if asking.f_code is _NEW_PARAMETER else made


def is_batching() -> bool:
    """Whether ``torch.vmap`` calls the asking method of a tensor that it is about to wrap."""
    return frame_above(1).f_globals.get("__name__") == "torch._functorch.vmap"


def is_differentiating() -> bool:
    """Whether ``torch.func.grad``, ``jvp`` or a similar transform is running.

    The stack of transforms does not show it: an op under a transform reaches the dispatcher only
    after the last transform has been taken off the stack.
    """
    transforms = "torch._functorch.eager_transforms"
    return any(frame.f_globals.get("__name__") == transforms for frame in upwards(frame_above(0)))


def is_typed_storage_indexed() -> bool:
    """Whether ``storage[i]`` of a legacy typed storage reads the asking property."""
    return frame_above(1).f_code in _ITEMS


def is_optimizer_stepping() -> bool:
    """Whether an optimizer that is about to step reads the asking property."""
    for frame in islice(upwards(frame_above(2)), 2):
        steps = frame.f_code.co_name in _STEPS
        if steps and isinstance(frame.f_locals.get("self"), torch.optim.Optimizer):
            return True
    return False


def is_in_torch_optim() -> bool:
    """Whether code of ``torch.optim`` reads the asking property."""
    package = frame_above(1).f_globals.get("__package__") or ""
    return package.startswith("torch.optim")
