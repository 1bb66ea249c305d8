"""Function mode: let deferred tensors answer Python code as the materialised tensors would.

Inside a block a deferred tensor is a ``meta`` tensor. Third-party constructors look at ``device``
and ``is_meta``, and skip their own initialisation on ``meta``. ``Masquerade`` reports the recorded
device instead. It also handles the calls that never reach the dispatcher: reads (``tolist``,
``numpy``, ``repr``) and exchanges of storage between real and deferred tensors. ``_HANDLERS`` maps
functions of torch to handlers.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lateinit._recording import composite_ops, conversions, fast_paths
from lateinit._recording.argument_checks import EMPTY, check_data
from lateinit._recording.autocast import casts_of_autocast
from lateinit._recording.conversions import computed, of_deferred
from lateinit._recording.second_tries import by_running, try_again
from lateinit._recording.sharding import call_on_shards
from lateinit._recording.writer import ProgramWriter, current
from lateinit._tensors import (
    PLAIN_CLASSES,
    GuardedShard,
    address_of,
    copied_by_deepcopy,
    is_deferred_tensor,
    is_placeholder,
    slot_of,
)
from lateinit._torch import (
    META,
    FunctionMode,
    WeakTensor,
    as_subclass,
    default_device_in_force,
    device_number,
    is_any_autocast_enabled,
    is_copying_shallowly,
    is_pointer_followed,
    is_storage_pickled,
    operators,
    set_grad_enabled,
    swap_implementation,
    takes_default_device,
    untraced,
    view_as_subclass,
    without_modes,
)

Handler = Callable[..., Any]


class Masquerade(FunctionMode):
    """Function mode of a block: calls the handler of a torch function, if it has one."""

    def __init__(self, writer: ProgramWriter) -> None:
        super().__init__()
        self.writer = writer

    @untraced
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        writer = self.writer
        handler = _HANDLERS.get(func)
        # Within an op (busy) the caller is torch's own Python code, which must see meta tensors.
        if handler is _asks or writer.busy:
            return func(*args, **kwargs) if kwargs else func(*args)
        if types and func not in _OF_DEVICES and any(issubclass(t, GuardedShard) for t in types):
            return call_on_shards(func, args, kwargs or {})
        writer.call = args, kwargs
        if kwargs and "out" in kwargs:
            kwargs = _on_the_device_of_out(writer, func, kwargs)
        if handler is None:
            func = fast_paths.initialiser_behind(func) or func
            handler = _HANDLERS.get(func)
        if is_any_autocast_enabled():
            with casts_of_autocast():
                return (handler or _asks)(writer, func, args, kwargs or {})
        if handler is None:
            recorded = len(writer.program.ops)
            try:
                return func(*args, **kwargs) if kwargs else func(*args)
            except RuntimeError as error:
                return try_again(writer, func, args, kwargs or {}, recorded, error)
        return handler(writer, func, args, kwargs or {})


def _on_the_device_of_out(writer: ProgramWriter, func: Any, kwargs: Any) -> Any:
    """The keywords of a factory, with ``meta`` for the device that a deferred ``out`` reports.

    torch/csrc/utils/out_types.cpp: check_out_type_matches compares it with the device of ``out``.
    The device may come from a ``with torch.device(...)`` around the call or the block.
    """
    out, device = kwargs["out"], kwargs.get("device")
    if device is None and takes_default_device(func):
        device = default_device_in_force()
    if device is None or not isinstance(out, Tensor) or not is_deferred_tensor(out):
        return kwargs
    return kwargs | {"device": META} if torch.device(device) == writer.device_of(out) else kwargs


def _asks(writer: ProgramWriter, func: Handler, args: Any, kwargs: Any) -> Any:
    """Handler of the most frequent functions, for which torch's own answer is right.

    They are recognised first, to skip the bookkeeping of ``__torch_function__``.
    """
    return func(*args, **kwargs)


def _device(writer: ProgramWriter, func: Handler, args: Any, kwargs: Any) -> torch.device:
    return writer.device_of(args[0])


def _is_meta(writer: ProgramWriter, func: Handler, args: Any, kwargs: Any) -> bool:
    return False


def _is_on(kind: str) -> Handler:
    def answer(writer: ProgramWriter, func: Handler, args: Any, kwargs: Any) -> bool:
        return writer.device_of(args[0]).type == kind

    return of_deferred(answer)


def _get_device(writer: ProgramWriter, func: Handler, args: Any, kwargs: Any) -> int:
    device = writer.device_of(args[0])
    return -1 if device.type == "cpu" else device_number(device)


def _data_ptr(writer: ProgramWriter, func: Handler, args: Any, kwargs: Any) -> int:
    followed = is_pointer_followed(between=2)  # of_deferred and __torch_function__
    if followed or writer.shared.has(writer.ref(args[0])):
        with without_modes():
            return writer.expose(args[0]).data_ptr()
    return address_of(args[0])


def _untyped_storage(writer: ProgramWriter, func: Handler, args: Any, kwargs: Any) -> Any:
    """The storage of a deferred tensor; a real one with its values if it is being pickled."""
    if is_storage_pickled(between=2):
        with without_modes():
            return writer.read(args[0]).untyped_storage()
    return func(*args, **kwargs)


def _reduce(writer: ProgramWriter, func: Handler, args: Any, kwargs: Any) -> Any:
    """Pickle a deferred tensor of a user's class, or with attributes; others read a storage."""
    tensor = args[0]
    if is_copying_shallowly(between=2):
        return _alike, (type(tensor), tensor.detach(), tensor.requires_grad, tensor.__dict__)
    with without_modes():
        value = as_subclass(type(tensor), writer.read(tensor), tensor.requires_grad)
        value.__dict__.update(tensor.__dict__)
        return func(value, *args[1:], **kwargs)


def _alike(cls: type[Tensor], data: Tensor, requires_grad: bool, attributes: Any) -> Tensor:
    """A shallow copy of a tensor: another object on its memory."""
    made = as_subclass(cls, data, requires_grad)
    made.__dict__.update(attributes)
    writer = current()
    if writer is not None:
        writer.born.append(WeakTensor(made))
    return made


def _by_value(writer: ProgramWriter, func: Handler, args: Any, kwargs: Any) -> Any:
    """Run a sparse constructor on real values: it reads its arguments below the dispatcher."""

    def value(item: Any) -> Any:
        deferred = isinstance(item, Tensor) and is_deferred_tensor(item)
        return computed(writer, item) if deferred else item

    real = [value(item) for item in args], {key: value(item) for key, item in kwargs.items()}
    with without_modes():
        return func(*real[0], **real[1])


def _read(writer: ProgramWriter, func: Handler, args: Any, kwargs: Any) -> Any:
    """Answer a read, such as ``tolist`` or ``repr``, from the computed values."""
    value = computed(writer, args[0])
    with without_modes():
        value.requires_grad_(args[0].requires_grad)
        if type(args[0]) not in PLAIN_CLASSES:
            value = view_as_subclass(value, type(args[0]))
        return func(value, *args[1:], **kwargs)


def _numpy(writer: ProgramWriter, func: Handler, args: Any, kwargs: Any) -> Any:
    with without_modes():
        exposed = writer.expose(args[0])
        return exposed.requires_grad_(args[0].requires_grad).numpy(*args[1:], **kwargs)


def _shared(writer: ProgramWriter, func: Handler, args: Any, kwargs: Any) -> Any:
    """Run ``apply_``, ``__dlpack__`` and similar methods on memory that both sides share."""
    with without_modes():
        real = [_exposed(writer, value) for value in args]
        result = func(*real, **kwargs)
    return args[0] if result is real[0] else result


def _exposed(writer: ProgramWriter, value: Any) -> Any:
    deferred = isinstance(value, Tensor) and is_deferred_tensor(value)
    return writer.expose(value) if deferred else value


def _array(writer: ProgramWriter, func: Handler, args: Any, kwargs: Any) -> Any:
    array = _numpy(writer, func, args[:1], {})
    dtype = args[1] if len(args) > 1 else kwargs.get("dtype")
    return array if dtype is None else array.astype(dtype, copy=False)


def _deepcopy(writer: ProgramWriter, func: Handler, args: Any, kwargs: Any) -> Tensor:
    tensor, memo = args
    if is_deferred_tensor(tensor):
        return copied_by_deepcopy(tensor, memo)
    with without_modes():
        copied: Tensor = func(tensor, memo)
    return copied


def _set_data(writer: ProgramWriter, func: Handler, args: Any, kwargs: Any) -> Any:
    """``a.data = b``, which torch refuses if exactly one of them is on meta."""
    target, source = args
    if "_in_block" in target.__dict__:  # a placeholder of lateinit, which raises
        return func(*args)
    if type(target) not in PLAIN_CLASSES and is_placeholder(target):
        return _set_data_of_placeholder(writer, func, target, source)
    return _set_any_data(writer, func, target, source)


def _set_any_data(writer: ProgramWriter, func: Handler, target: Tensor, source: Tensor) -> Any:
    if target.is_meta == source.is_meta:
        return func(target, source)
    return _become(writer, target, source.detach())


def _set_data_of_placeholder(
    writer: ProgramWriter, func: Handler, target: Any, source: Tensor
) -> Any:
    """The same for another library's placeholder, which may get data only from ``materialize``.

    ``Module._apply`` also sets converted data, as empty as before.
    """
    slot = slot_of(target)
    as_empty = is_placeholder(source) or source.size() == EMPTY
    if not as_empty:
        check_data(slot, target, source)
    result = _set_any_data(writer, func, target, source)
    converted = slot_of(target)
    if as_empty and slot is not None and converted is not None:
        converted.lazy = slot.lazy
    return result


def _become(writer: ProgramWriter, target: Tensor, source: Tensor) -> None:
    """Swap the implementation of ``source`` into ``target``, which keeps ``requires_grad``."""
    with without_modes():
        source.requires_grad_(target.requires_grad)
    swap_implementation(target, source)
    writer.born.append(WeakTensor(target))


_tensor = torch.Tensor
_OF_DEVICES = frozenset(
    {
        _tensor.device.__get__,
        _tensor.is_meta.__get__,  # type: ignore[attr-defined]
        _tensor.is_cpu.__get__,  # type: ignore[attr-defined]
        _tensor.is_cuda.__get__,  # type: ignore[attr-defined]
        _tensor.get_device,
        torch.get_device,
    }
)
"""The handlers that apply to shards too: they report the recorded device."""


def _observe(writer: ProgramWriter, func: Handler, args: Any, kwargs: Any) -> Any:
    """Give the statistics of channels their shape, which the kernel does, but not on ``meta``.

    aten/src/ATen/native/quantized/cpu/fused_obs_fake_quant.cpp
    """
    names = operators.by_name("aten::_fused_moving_avg_obs_fq_helper").arguments
    given = dict(zip(names, args, strict=False)) | kwargs
    if given.get("per_row_fake_quant") and given["running_min"].numel() == 0:
        channels = given["self"].shape[given["ch_axis"]]
        given["running_min"].resize_(channels).fill_(math.inf)
        given["running_max"].resize_(channels).fill_(-math.inf)
        given["scale"].resize_(channels)
        given["zero_point"].resize_(channels)
    return func(*args, **kwargs)


_HANDLERS: dict[Any, Handler] = {
    set_grad_enabled: _asks,
    _tensor.grad_fn.__get__: _asks,  # type: ignore[union-attr]
    _tensor.requires_grad.__get__: _asks,  # type: ignore[attr-defined]
    _tensor.dtype.__get__: _asks,  # type: ignore[attr-defined]
    _tensor.shape.__get__: _asks,  # type: ignore[attr-defined]
    _tensor.dim: _asks,
    _tensor.size: _asks,
    _tensor.device.__get__: of_deferred(_device),
    _tensor.is_meta.__get__: of_deferred(_is_meta),  # type: ignore[attr-defined]
    _tensor.is_cpu.__get__: _is_on("cpu"),  # type: ignore[attr-defined]
    _tensor.is_cuda.__get__: _is_on("cuda"),  # type: ignore[attr-defined]
    _tensor.data.__set__: _set_data,  # type: ignore[attr-defined]
    _tensor.get_device: of_deferred(_get_device),
    torch.get_device: of_deferred(_get_device),
    _tensor.data_ptr: of_deferred(_data_ptr),
    _tensor.untyped_storage: of_deferred(_untyped_storage),
    _tensor.__reduce_ex__: of_deferred(_reduce),
    _tensor.tolist: of_deferred(_read),
    _tensor.__repr__: of_deferred(_read),
    _tensor.__format__: of_deferred(_read),
    _tensor.numpy: of_deferred(_numpy),
    _tensor.__array__: of_deferred(_array),
    _tensor.apply_: of_deferred(_shared),
    _tensor.map_: of_deferred(_shared),
    _tensor.map2_: of_deferred(_shared),
    _tensor.__dlpack__: of_deferred(_shared),
    _tensor.__dlpack_device__: of_deferred(_shared),
    _tensor.__deepcopy__: _deepcopy,
    torch.nn.functional.one_hot: of_deferred(by_running),
    torch.fused_moving_avg_obs_fake_quant: _observe,
    torch.sparse_coo_tensor: _by_value,
    torch.sparse_csr_tensor: _by_value,
    torch.sparse_csc_tensor: _by_value,
    torch.sparse_bsr_tensor: _by_value,
    torch.sparse_bsc_tensor: _by_value,
    torch.sparse_compressed_tensor: _by_value,
    **conversions.HANDLERS,
    **composite_ops.HANDLERS,
    **fast_paths.HANDLERS,
}
