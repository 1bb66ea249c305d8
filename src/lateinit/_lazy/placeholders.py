"""Placeholders: parameters and buffers whose shape is not, or not wholly, known yet.

They are instances of torch's own placeholder classes, so that torch recognises them, and also hold
the known part of their shape (``known_shape``). When the rest is known, the placeholder object
itself becomes the tensor (``become``), so that every reference to it stays valid.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn import parameter as torch_placeholders
from torch.nn.parameter import UninitializedTensorMixin  # type: ignore[attr-defined]

from lateinit._lazy.becoming import become, device_of
from lateinit._lazy.initialisers import initialised_by
from lateinit._recording import current
from lateinit._recording.postponed import postpone
from lateinit._tensors import is_placeholder
from lateinit._torch import (
    ALLOWED_OF_PLACEHOLDERS,
    as_subclass,
    is_optimizer_stepping,
    is_torch_saving,
    without_modes,
    without_subclass_functions,
)
from lateinit.errors import ShapeError, UninitializedError

Shape = tuple[int | None, ...]
_ADVICE = "call lateinit.infer_shapes(model, ...) or run a forward pass first"
_GET_DATA = torch.Tensor.data.__get__  # type: ignore[attr-defined]
_SET_DATA = torch.Tensor.data.__set__  # type: ignore[attr-defined]
# The methods that `Module.to`, `half` and others call on each parameter: a placeholder notes the
# cast and stays a placeholder.
_CONVERSIONS = (
    torch.Tensor.half,
    torch.Tensor.bfloat16,
    torch.Tensor.float,
    torch.Tensor.double,
    torch.Tensor.cuda,
    torch.Tensor.cpu,
    torch.Tensor.to,
)


def show(shape: Shape | None) -> str:
    """``(10, ?)``: a shape for messages, with a question mark for each unknown size."""
    if shape is None:
        return "(unknown shape)"
    sizes = ["?" if size is None else str(size) for size in shape]
    return f"({sizes[0]},)" if len(sizes) == 1 else f"({', '.join(sizes)})"


def known_shape(tensor: Tensor) -> Shape | None:
    """The known part of a tensor's shape.

    Args:
        tensor: any tensor, or a placeholder.

    Returns:
        A tuple with None for each unknown size, or None if not even the rank is known.

    Example:
        >>> from lateinit._lazy.placeholders import known_shape
        >>> known_shape(lateinit.nn.LazyLinear(10).weight)
        (10, None)
    """
    if is_placeholder(tensor):
        shape: Shape | None = tensor.__dict__.get("_known")
        return shape
    return tuple(tensor.shape)


def mismatch(known: Shape | None, found: Sequence[int]) -> str | None:
    """How ``found`` contradicts the known part of a shape, in words; None if it does not."""
    if known is None:
        return None
    if len(known) != len(found):
        return (
            f"expected {len(known)} dims, {show(known)}, found {len(found)}, {show(tuple(found))}"
        )
    for dim, (size, other) in enumerate(zip(known, found, strict=True)):
        if size is not None and size != other:
            return f"dim {dim} must be {size}, as in {show(known)}, found {show(tuple(found))}"
    return None


class Placeholder(UninitializedTensorMixin):  # type: ignore[misc]
    """The base of the two placeholder classes."""

    def describe(self) -> str:
        state = self.__dict__
        label = state.get("_label")
        return f"{f'{label} ' if label else ''}{show(state.get('_known'))}"

    @property
    def known_shape(self) -> Shape | None:
        """The known part of the shape, with None for each unknown size."""
        return known_shape(cast(Tensor, self))

    def materialize(self, shape: Any, device: Any = None, dtype: torch.dtype | None = None) -> None:
        """Become a parameter or buffer of a shape, in place; the object stays the same.

        Memory is allocated and its values are not set; nothing is drawn. In a ``deferred()`` block
        the tensor is deferred instead.

        Args:
            shape: the whole shape; an int is the length of a vector.
            device: the device to allocate on, by default the device of the placeholder.
            dtype: the dtype, by default the dtype of the placeholder.

        Raises:
            ShapeError: ``shape`` contradicts ``known_shape``.

        Example:
            >>> p = lateinit.nn.UninitializedParameter(known_shape=(10, None))
            >>> p.materialize((10, 3))
            >>> p.shape
            torch.Size([10, 3])
        """
        shape = (shape,) if isinstance(shape, int) else tuple(shape)
        wrong = mismatch(self.known_shape, shape)
        if wrong:
            raise ShapeError(f"{self.describe()}: {wrong}")
        me = cast(Tensor, self)
        if device is None:
            device = device_of([me])
        new = torch.empty(shape, device=device, dtype=dtype or me.data.dtype)
        kind = self.cls_to_become
        become(me, kind(new, me.requires_grad) if kind is nn.Parameter else new)

    @property
    def shape(self) -> Any:
        """Raises ``UninitializedError``: only ``known_shape`` can be read.

        ``Module._load_from_state_dict`` (torch/nn/modules/module.py) relies on that to refuse a
        lazy state for an initialised module.
        """
        raise UninitializedError(
            f"Can't access the shape of an uninitialized parameter or buffer: the shape of "
            f"{self.describe()} is not known yet (if this is load_state_dict: an "
            f"uninitialised state cannot be loaded into an initialised module); {_ADVICE}"
        )

    def share_memory_(self) -> Any:
        """Raises ``UninitializedError``: there is no memory to share."""
        raise UninitializedError(
            f"Can't share memory on an uninitialized parameter or buffer, {self.describe()}: "
            f"{_ADVICE}"
        )

    @property
    def grad(self) -> Any:
        """None. Raises if an optimizer reads it in order to step: it would skip the parameter."""
        _refuse_step(self)
        return None

    @grad.setter
    def grad(self, value: Any) -> None:
        if value is not None:
            raise UninitializedError(f"{self.describe()} cannot have a gradient: {_ADVICE}")

    def detach(self) -> Any:
        """The placeholder itself.

        ``Module._save_to_state_dict`` detaches the tensors that it saves. torch's lazy mixin leaves
        placeholders out of that, but a module that holds one may not have the mixin.
        """
        return self

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {show(self.known_shape)}>"

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        if id(self) not in memo:
            memo[id(self)] = _rebuild(type(self), *_state(cast(Tensor, self)))
        return memo[id(self)]

    def __reduce_ex__(self, proto: Any) -> Any:
        # pickle and copy keep the known shape and the casts; torch's own method would keep
        # `requires_grad` alone.
        if is_torch_saving():
            raise UninitializedError(
                f"torch.save cannot save {self.describe()}, which has no values: {_ADVICE} "
                "(pickle keeps lazy models as they are)"
            )
        return _rebuild, (type(self), *_state(cast(Tensor, self)))

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # Getters of attributes arrive as method wrappers; torch's own mixin allows them by the same
        # test (torch/nn/parameter.py).
        allowed = func in cls._allowed_methods or type(func).__name__ == "method-wrapper"
        if allowed and not _is_lost(func, args):
            with without_subclass_functions():
                result = func(*args, **(kwargs or {}))
            if func == _GET_DATA:  # `.data` may be cast, moved and initialised like the parameter
                made = _alike(args[0], result)
                made.__dict__["_root"] = _root(args[0])
                return made
            if func == _SET_DATA and isinstance(args[1], Placeholder):
                # `Module._apply` writes `param.data = converted`: copy the casts of the converted
                # placeholder to the one that stays.
                args[0].__dict__["_casts"] = args[1].__dict__.get("_casts", ())
            return _converted(args[0], result) if func in _CONVERSIONS else result
        initialised = initialised_by(func, args, kwargs or {})
        if initialised is not None and _remembers(initialised[0]):
            postpone(_root(initialised[0]), initialised[1])
            return initialised[0]
        given = (*args, *(kwargs or {}).values())
        found = next((a for a in given if isinstance(a, Placeholder)), None)
        named = found.describe() if found is not None else cls.__name__
        raise UninitializedError(
            f"{getattr(func, '__name__', func)} was given {named}, an uninitialized parameter or "
            f"buffer: {_ADVICE}"
        )

    _allowed_methods: ClassVar[list[Any]] = [
        *ALLOWED_OF_PLACEHOLDERS,
        *_CONVERSIONS,
        torch.Tensor.requires_grad_,
        torch.Tensor.register_hook,
        torch.Tensor.register_post_accumulate_grad_hook,
        torch.Tensor.is_shared,
        torch.Tensor.__len__,
    ]


class UninitializedParameter(  # type: ignore[misc, override]
    Placeholder, torch_placeholders.UninitializedParameter
):
    """A parameter whose shape is not, or not wholly, known yet.

    It may be moved, cast, copied, pickled and given to an optimizer; any other use raises
    ``UninitializedError``. ``materialize(shape)`` makes this very object a ``torch.nn.Parameter``.

    Args:
        requires_grad: whether the parameter will require gradients.
        device: the device of the parameter, by default the default device.
        dtype: its dtype, by default the default dtype.
        known_shape: its shape, with None for each unknown size; by default not even the rank is
            known.

    Example:
        >>> lateinit.nn.UninitializedParameter(known_shape=(10, None))
        <UninitializedParameter (10, ?)>
    """

    cls_to_become = nn.Parameter

    def __new__(
        cls,
        requires_grad: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        known_shape: Shape | None = None,
    ) -> UninitializedParameter:
        """An empty tensor of this class; it becomes the parameter."""
        return cast(UninitializedParameter, _empty(cls, requires_grad, device, dtype, known_shape))


class UninitializedBuffer(  # type: ignore[misc, override]
    Placeholder, torch_placeholders.UninitializedBuffer
):
    """A buffer whose shape is not, or not wholly, known yet.

    It may be moved, cast, copied and pickled; any other use raises ``UninitializedError``.
    ``materialize(shape)`` makes this very object a ``torch.Tensor``.

    Args:
        requires_grad: whether the buffer will require gradients.
        device: the device of the buffer, by default the default device.
        dtype: its dtype, by default the default dtype.
        persistent: whether the buffer is in the state dict once it is assigned to a module.
        known_shape: its shape, with None for each unknown size; by default not even the rank is
            known.

    Example:
        >>> lateinit.nn.UninitializedBuffer(known_shape=(None,))
        <UninitializedBuffer (?,)>
    """

    cls_to_become = torch.Tensor

    def __new__(
        cls,
        requires_grad: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
        persistent: bool = True,
        *,
        known_shape: Shape | None = None,
    ) -> UninitializedBuffer:
        """An empty tensor of this class; it becomes the buffer."""
        made = _empty(cls, requires_grad, device, dtype, known_shape)
        # torch/nn/parameter.py: `isinstance(x, nn.Buffer)` reads `_is_buffer`, and a module
        # registers such a tensor when it is assigned.
        made.__dict__.update(persistent=persistent, _is_buffer=True)
        return cast(UninitializedBuffer, made)


def _empty(
    cls: type, requires_grad: bool, device: Any, dtype: torch.dtype | None, known: Shape | None
) -> Tensor:
    """Make a placeholder. In a block its own empty data is on the CPU, and is not recorded."""
    asked = torch.device(device) if device is not None else torch.get_default_device()
    place = torch.device("cpu") if current() is not None else asked
    dtype = dtype or torch.get_default_dtype()
    with without_modes():
        data = torch.empty(0, device=place, dtype=dtype)
        made = as_subclass(cls, data, requires_grad)
        made.__dict__.update(_known=known, _label=None, _origin=(asked, data.device, dtype))
        made.__dict__["_in_block"] = current() is not None
    return made


def _converted(placeholder: Tensor, result: Tensor) -> Tensor:
    """The placeholder that a move or a cast of a placeholder returns."""
    if isinstance(result, Placeholder):
        return result
    made = _alike(placeholder, result)
    made.__dict__.pop("_root", None)
    if made.dtype != placeholder.dtype:
        made.__dict__["_casts"] = (*placeholder.__dict__.get("_casts", ()), result.dtype)
    return made


def _root(placeholder: Tensor) -> Tensor:
    """The placeholder of which another one is an alias (``.data``)."""
    root: Tensor = placeholder.__dict__.get("_root", placeholder)
    return root


def _remembers(placeholder: Any) -> bool:
    """Whether a placeholder can remember an initialisation: in a block, and made in one.

    A placeholder that was cast before cannot: it would be initialised in its dtype of now.
    """
    state = _root(placeholder).__dict__ if isinstance(placeholder, Placeholder) else {}
    return current() is not None and bool(state.get("_in_block")) and not state.get("_casts")


def _is_lost(func: Any, args: Any) -> bool:
    """Whether a call that torch's placeholders allow writes values, or reads the shape."""
    if func in (_SET_DATA, Tensor.copy_):
        return not isinstance(args[1], Placeholder)
    return bool(func == Tensor.size)


def _alike(placeholder: Tensor, data: Tensor) -> Tensor:
    """A placeholder of the same kind, with the device and dtype of other empty data."""
    with without_subclass_functions(), torch.no_grad():
        made = as_subclass(type(placeholder), data.detach(), placeholder.requires_grad)
    made.__dict__.update(placeholder.__dict__)
    return made


def _state(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.requires_grad, tensor.data.device, tensor.data.dtype, dict(tensor.__dict__)


def _rebuild(
    cls: type, requires_grad: bool, device: Any, dtype: torch.dtype, state: dict[str, Any]
) -> Tensor:
    with without_modes():
        data = torch.empty(0, device=device, dtype=dtype)
        made = as_subclass(cls, data, requires_grad)
        made.__dict__.update(state)
    return made


def _refuse_step(placeholder: Placeholder) -> None:
    """Raise if an optimizer is about to step, which would silently skip a placeholder."""
    if is_optimizer_stepping():
        raise UninitializedError(
            f"an optimizer cannot step over {placeholder.describe()}, whose shape is not known "
            f"yet: {_ADVICE}"
        )
