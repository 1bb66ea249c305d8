"""What may be done with deferred tensors after the block that recorded them.

Views, copies, casts and arithmetic among deferred tensors are recorded in their program; with
tensors that are on ``meta`` by other means the result is an ordinary meta tensor, as shape
propagation wants. What would need values, or change what the block recorded, raises.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

from torch import Tensor, nn

from lateinit.arguments import META, tensors_in
from lateinit.errors import DeferredTensorError
from lateinit.masquerade import Masquerade
from lateinit.ops import OpInfo
from lateinit.recorder import Recorder, current, in_force
from lateinit.replay import flat
from lateinit.tensors import DeferredTensor, guard, is_deferred_tensor, locate
from lateinit.walk import find_tensors


class Follower(Recorder):
    """Extends a program outside its block, as far as that is honest."""

    def dispatch(self, info: OpInfo, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        tensors = tensors_in(args, kwargs)
        deferred = [t for t in tensors if is_deferred_tensor(t)]
        elsewhere = info.from_sizes and kwargs.get("device") not in (None, META)
        if not deferred or info.metadata_only or elsewhere:
            return info.func(*args, **kwargs)  # `to_empty(device="cpu")` means real memory
        self._refuse_values(info, args, tensors, deferred)
        if len(deferred) < len([t for t in tensors if t.is_meta]):
            return info.func(*args, **kwargs)
        return self.record(info, args, kwargs, deferred)

    def _refuse_values(
        self, info: OpInfo, args: tuple[Any, ...], tensors: list[Tensor], deferred: list[Tensor]
    ) -> None:
        named = _describe(deferred[0])
        op = info.name.removeprefix("aten::")
        for position in info.mutates:
            written = args[position]
            if is_deferred_tensor(written) and self.storage_of(written).closed:
                raise DeferredTensorError(
                    f"{op} would change {named} in place, which has no values yet: do it inside "
                    "`with lateinit.deferred():` so that it is recorded, or after "
                    "lateinit.materialize()"
                )
        if info.random or (not info.returns_tensor and not info.mutates):
            raise DeferredTensorError(
                f"{op} needs the values of {named}, which has none yet: call "
                "lateinit.materialize() first"
            )
        if any(not t.is_meta and t.dim() > 0 for t in tensors):
            raise DeferredTensorError(
                f"{op} was given {named} together with real tensors: it is deferred and has no "
                "values yet; call lateinit.materialize(model) before the forward pass"
            )


def follow(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run something on deferred tensors outside the block that recorded them."""
    if current() is not None:
        return func(*args, **kwargs)
    first = next((t for t in tensors_in(args, kwargs) if is_deferred_tensor(t)), None)
    if first is None:
        return func(*args, **kwargs)
    _, program, _ = locate(first)
    with in_force(Follower(program), _OutsideMasquerade):
        result = func(*args, **kwargs)
    for leaf in flat(result):
        if isinstance(leaf, Tensor) and is_deferred_tensor(leaf):
            guard(leaf)
    return result


class _OutsideMasquerade(Masquerade):
    """Deferred tensors are on meta outside the block: only their exchanges are seen to."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        return func(*args, **(kwargs or {}))


def _describe(tensor: Tensor) -> str:
    """A deferred tensor by its name in the outermost running module that holds it."""
    shape = tuple(tensor.shape)
    frame: FrameType | None = sys._getframe(1)
    name = None
    while frame is not None:
        owner = frame.f_locals.get("self")
        if isinstance(owner, nn.Module):
            for found in find_tensors(owner):
                if found.deferred and _same(found.tensor, tensor):
                    name = found.name
        frame = frame.f_back
    return f"the deferred tensor {name!r} {shape}" if name else f"a deferred tensor {shape}"


def _same(a: Tensor, b: Tensor) -> bool:
    return locate(a)[1:] == locate(b)[1:] or locate(a)[2].storage == locate(b)[2].storage


DeferredTensor.follow = staticmethod(follow)
