"""Handlers of calls on deferred tensors outside blocks: properties, reads, access to memory.

Each handler receives the function of torch, the deferred tensor, and the other arguments. ``guard``
looks a function up in ``ANSWERS`` before it follows the call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lateinit._recording.after_block import device_to, needs_values
from lateinit._recording.argument_checks import EMPTY, check_data
from lateinit._recording.writer import current
from lateinit._tensors import (
    Deferred,
    Slot,
    address_of,
    adopt,
    described,
    is_deferred_tensor,
    is_of_waiting,
    is_parameter,
    realize_now,
    show,
    slot_of,
    waits,
)
from lateinit._torch import (
    Meant,
    base_of,
    below_python,
    device_number,
    is_dcp_writing,
    is_fake,
    is_making_parameter,
    is_pointer_followed,
)
from lateinit.errors import DeferredTensorError


def need_values_of(what: str, tensor: Tensor) -> None:
    """Realise a deferred tensor, or refuse if it waits for ``materialize``."""
    if waits(tensor):
        raise needs_values(what, tensor)
    realize_now(tensor)


def realises_itself(tensor: Tensor) -> bool:
    """Whether a deferred tensor realises itself, at once, when its values are needed."""
    return current() is None and is_deferred_tensor(tensor) and not waits(tensor)


def is_table(tensor: Tensor) -> bool:
    """Whether a deferred tensor realises itself and is held by no module of a block."""
    slot = slot_of(tensor)
    return realises_itself(tensor) and slot is not None and slot.name is None


def mark(tensor: Tensor) -> None:
    """Note that a storage belongs to a parameter, if ``tensor`` is one."""
    slot = slot_of(tensor)
    if slot is not None and is_parameter(tensor):
        slot.waits = True


def _read(func: Any, tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
    for given in (tensor, *args):  # Tensor.map_ takes another tensor
        if isinstance(given, Tensor) and is_deferred_tensor(given):
            need_values_of(func.__name__, given)
    return func(tensor, *args, **kwargs)


def _is_cpu(func: Any, tensor: Tensor) -> bool:
    # torch/distributed/checkpoint/filesystem.py reads it before it writes a tensor.
    if is_dcp_writing(between=1):
        need_values_of("saving a checkpoint", tensor)
    return not waits(tensor) and device_to(Meant.RECORDED, tensor).type == "cpu"


def _is_cuda(func: Any, tensor: Tensor) -> bool:
    return not waits(tensor) and device_to(Meant.RECORDED, tensor).type == "cuda"


def _get_device(func: Any, tensor: Tensor) -> int:
    device = device_to(Meant.RECORDED, tensor)
    known = not waits(tensor) and device.type != "cpu"
    return device_number(device) if known else func(tensor)


def _requires_grad_(func: Any, tensor: Tensor, requires_grad: bool = True) -> Tensor:
    # A graph must begin at the real tensor, and torch.autograd.Function notes its inputs before any
    # op can be intercepted.
    begins = requires_grad and not tensor.requires_grad and realises_itself(tensor)
    if begins and not is_of_waiting(tensor) and not is_making_parameter(between=1):
        realize_now(tensor)
    with below_python():
        func(tensor, requires_grad)
    return tensor


def _grad_fn(func: Any, tensor: Tensor) -> Any:
    if tensor.is_leaf:
        return None
    raise DeferredTensorError(
        f"the autograd graph of {described(tensor)} is not kept when it gets its values, nor are "
        "hooks in it: register them after lateinit.materialize(). What Tensor.register_hook and "
        "register_post_accumulate_grad_hook register is kept"
    )


def _address(func: Any, tensor: Tensor) -> int:
    if is_pointer_followed(between=1):
        need_values_of("reading the memory", tensor)
        return tensor.data_ptr()
    return address_of(tensor)


def shows_the_same(tensor: Tensor, other: Any) -> bool:
    """Whether another tensor is the same window on the same deferred storage."""
    if not isinstance(other, Tensor) or not is_deferred_tensor(other):
        return False
    mine, theirs = Deferred.of(tensor), Deferred.of(other)
    return mine.slot is theirs.slot and mine.ref == theirs.ref


def _backward(func: Any, tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
    if not tensor.is_leaf:  # realising it would lose its graph
        raise needs_values("backward", tensor)
    return _read(func, tensor, *args, **kwargs)


def _reduce(func: Any, tensor: Tensor, proto: Any) -> Any:
    return tensor.__reduce_ex__(proto)


def _deepcopy(func: Any, tensor: Tensor, memo: dict[int, Any]) -> Any:
    return tensor.__deepcopy__(memo)


def _set_grad(func: Any, tensor: Tensor, grad: Any) -> None:
    """``tensor.grad = grad``, which torch refuses if exactly one of them is on meta.

    A gradient could not be kept when the deferred tensor becomes real.
    """
    for given in (tensor, grad):
        if isinstance(grad, Tensor) and is_deferred_tensor(given):
            need_values_of("setting .grad", given)
    func(tensor, grad)


def is_whole_load(target: Any, source: Any = None) -> bool:
    """Whether ``target.copy_(source)`` gives a deferred tensor all of its values."""
    return (
        isinstance(source, Tensor)
        and is_deferred_tensor(target)
        and not source.is_meta
        and not is_fake(source)
        and source.shape == target.shape
    )


def _copy(func: Any, tensor: Tensor, source: Any, *args: Any, **kwargs: Any) -> Any:
    """``tensor.copy_(source)``: a load if the source is real."""
    if is_whole_load(tensor, source):
        owner = base_of(tensor)
        if torch.is_grad_enabled() and owner.requires_grad and owner.is_leaf:
            func(tensor, tensor)  # raises torch's error
        adopt(tensor, source)
        return tensor
    if shows_the_same(tensor, source):
        return tensor
    return NotImplemented


def _module_load(func: Any, tensor: Tensor, other: Any, assign: bool = False) -> Any:
    """``module_load``: ``load_state_dict`` calls it with swap_module_params_on_conversion set."""
    if assign or not is_whole_load(tensor, other):
        return NotImplemented
    return _copy(torch.Tensor.copy_, tensor, other).detach()


def _set_data(func: Any, tensor: Tensor, data: Any) -> None:
    """``tensor.data = data``, which torch refuses if exactly one of them is on meta."""
    slot = slot_of(tensor)
    if slot is not None and slot.lazy is not None and isinstance(data, Tensor):
        data = _data_of_placeholder(slot, tensor, data)
    if not isinstance(data, Tensor) or is_deferred_tensor(data):
        func(tensor, data)
        mark(tensor)
        return
    if data.is_meta or is_fake(data):
        kind = "meta" if data.is_meta else "fake"
        raise DeferredTensorError(
            f"setting .data of {described(tensor)} to a {kind} tensor, which has no values, would "
            "lose its own: do this inside `with lateinit.deferred():`, or after "
            "lateinit.materialize()"
        )
    show(tensor, data.detach())


def _data_of_placeholder(slot: Slot, tensor: Any, data: Tensor) -> Tensor:
    """The data to set for a placeholder of pytorch-pfn-extras; see ``argument_checks.check_data``.

    Its ``materialize`` allocates on the device of its data, which is ``meta`` here.
    """
    check_data(slot, tensor, data)
    converted = slot_of(data)
    if converted is not None and data.size() == EMPTY:
        converted.lazy = slot.lazy
    if converted is None and data.is_meta:
        return torch.empty(data.shape, dtype=data.dtype, device=Deferred.of(tensor).device)
    return data


# Functions that need the values, or the memory itself: no recordable op provides these.
_READERS = (
    torch.Tensor.numpy,
    torch.Tensor.tolist,
    torch.Tensor.__dlpack__,
    torch.Tensor.__dlpack_device__,
    torch.Tensor.share_memory_,
    torch.Tensor.apply_,
    torch.Tensor.map_,
    torch.Tensor.map2_,
)

ANSWERS: dict[Any, Callable[..., Any]] = {
    torch.Tensor.__array__: _read,
    torch.Tensor.__deepcopy__: _deepcopy,
    torch.Tensor.backward: _backward,
    torch.Tensor.__reduce_ex__: _reduce,
    torch.Tensor.data_ptr: _address,
    torch.Tensor.const_data_ptr: _address,  # type: ignore[attr-defined]
    torch.Tensor.grad_fn.__get__: _grad_fn,  # type: ignore[union-attr]
    torch.Tensor.grad.__set__: _set_grad,  # type: ignore[union-attr]
    torch.Tensor.requires_grad_: _requires_grad_,
    torch.Tensor.is_cpu.__get__: _is_cpu,  # type: ignore[attr-defined]
    torch.Tensor.is_cuda.__get__: _is_cuda,  # type: ignore[attr-defined]
    torch.Tensor.get_device: _get_device,
    torch.Tensor.copy_: _copy,
    torch.Tensor.module_load: _module_load,
    torch.Tensor.data.__set__: _set_data,  # type: ignore[attr-defined]
    **dict.fromkeys(_READERS, _read),
}
"""The functions with a handler ``(func, tensor, ...)``, whose calls are not followed.

If a handler returns ``NotImplemented``, the call is followed.
"""

VIEWS = frozenset(
    getattr(torch.Tensor, name).__get__ for name in ("data", "T", "mT", "H", "mH", "real", "imag")
)
"""The attributes that are tensors on the same memory."""

# Functions whose answer comes from the meta tensor alone. Calls of all others are followed.
PLAIN = frozenset(
    {
        torch.Tensor.size,
        torch.Tensor.stride,
        torch.Tensor.storage_offset,
        torch.Tensor.dim,
        torch.Tensor.ndimension,
        torch.Tensor.numel,
        torch.Tensor.nelement,
        torch.Tensor.element_size,
        torch.Tensor.is_contiguous,
        torch.Tensor.is_floating_point,
        torch.Tensor.is_complex,
        torch.Tensor.is_conj,
        torch.Tensor.is_neg,
        torch.Tensor.is_inference,
        torch.Tensor.is_signed,
        torch.Tensor.is_shared,
        torch.Tensor.is_pinned,
        torch.Tensor.untyped_storage,
        torch.Tensor.register_hook,
        torch.Tensor.register_post_accumulate_grad_hook,
        torch.Tensor.__hash__,
        torch.Tensor.__len__,
    }
)
