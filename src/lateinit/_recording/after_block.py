"""Record ops on deferred tensors outside blocks, or refuse them.

Views, copies, casts and arithmetic among deferred tensors are recorded in their program. Together
with plain meta tensors the result is a plain meta tensor, which is what shape propagation needs.
An op that needs values, or would change a tensor that a block recorded, raises
``DeferredTensorError``.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lateinit._recording.recorder import Recorder, current, in_force
from lateinit._tensors import (
    Deferred,
    DeferredTensor,
    described,
    is_deferred_tensor,
    share_real_storage,
    slot_of,
)
from lateinit._tensors.guard import guard
from lateinit._torch import (
    META,
    Args,
    Kwargs,
    OpInfo,
    below_python,
    fake_like,
    flat,
    is_fake,
    map_tensors,
    restoring,
    spoken,
    tensors_in,
)
from lateinit.errors import DeferredTensorError


class Follower(Recorder):
    """Dispatch mode outside blocks: records the ops that can be replayed faithfully.

    ``meant`` is the recorded device of the tensors of a call, if all of its meta tensors are
    deferred. A tensor that the call makes on meta, such as the number in ``mask[0] = 1``, is then
    recorded for that device.
    """

    meant: torch.device | None = None

    def dispatch(self, info: OpInfo, args: Args, kwargs: Kwargs) -> Any:
        tensors = tensors_in(args, kwargs)
        deferred = [t for t in tensors if is_deferred_tensor(t)]
        own = bool(deferred) and kwargs.get("device") == META
        if own:
            # Outside blocks a deferred tensor reports meta, so y.to(x.device) asks for meta.
            kwargs = kwargs | {"device": self.device_of(deferred[0])}
        elif not deferred and self.meant and kwargs.get("device") == META and not info.random:
            return self.record(info, args, kwargs | {"device": self.meant}, [])
        elsewhere = info.from_sizes and not own and kwargs.get("device") not in (None, META)
        if not deferred or info.metadata_only or elsewhere:
            return info.func(*args, **kwargs)  # `to_empty(device="cpu")` means real memory
        fake = next(filter(is_fake, tensors), None)
        among_meta = fake is not None or len(deferred) < len([t for t in tensors if t.is_meta])
        if not (among_meta and info.writes_unsaid):  # shape propagation through batch norm
            self._refuse_values(info, args, kwargs, deferred, among_meta=among_meta)
        if fake is not None:
            as_fake = partial(self._as_fake, fake)
            return info.func(*map_tensors(args, as_fake), **map_tensors(kwargs, as_fake))
        if among_meta:
            return info.func(*args, **kwargs)
        return self._guarded(self.record(info, args, kwargs, deferred), deferred[0])

    def _as_fake(self, fake: Tensor, tensor: Tensor) -> Tensor:
        """A fake tensor for a deferred one, among fake tensors that say where they would be."""
        return fake_like(fake, tensor, self.device_of(tensor)) if tensor.is_meta else tensor

    def _draw(self, info: OpInfo, args: Args, kwargs: Kwargs) -> None:
        """Record no draw: random ops are refused. Replaying raises if a foreign op draws."""

    def _guarded(self, result: Any, source: Tensor) -> Any:
        """Guard new deferred tensors, and name them after the one that they are made from.

        Below autograd, which then adds the graph to the guarded tensors.
        """
        origin = slot_of(source)
        for leaf in flat(result):
            slot = slot_of(leaf) if isinstance(leaf, Tensor) else None
            if slot is not None and origin is not None:
                slot.name = slot.name or origin.name
                guard(leaf)
        return result

    def _refuse_values(
        self, info: OpInfo, args: Args, kwargs: Kwargs, deferred: list[Tensor], *, among_meta: bool
    ) -> None:
        op = spoken(info.name)
        if info.collective:
            raise DeferredTensorError(
                f"{op} would exchange the values of {described(deferred[0])} with other ranks, "
                "which has none yet: call lateinit.materialize() first"
            )
        given = tuple(args[i] for i in info.mutates)
        for written in tensors_in(given, {k: kwargs.get(k) for k in info.mutates_kw}):
            if is_deferred_tensor(written) and self.storage_of(written).closed:
                raise DeferredTensorError(
                    f"{op} would change {described(written)} in place, which has no values yet: "
                    "do it inside "
                    "`with lateinit.deferred():` so that it is recorded, or after "
                    "lateinit.materialize()"
                )
            if is_deferred_tensor(written) and among_meta:
                raise DeferredTensorError(
                    f"{op} would write what is on meta, and was never recorded, to "
                    f"{described(written)}: build it inside `with lateinit.deferred():` too"
                )
        drawn = info.random and not info.foreign
        if drawn or (not info.returns_tensor and not info.mutates):
            raise DeferredTensorError(
                f"{op} needs the values of {described(deferred[0])}, which has none yet: call "
                "lateinit.materialize() first"
            )
        tensors = tensors_in(args, kwargs)
        if any(not (t.is_meta or is_fake(t)) and t.dim() > 0 for t in tensors):
            raise DeferredTensorError(
                f"{op} was given {described(deferred[0])} together with real tensors: it is "
                "deferred and has no values yet; call lateinit.materialize(model) before the "
                "forward pass"
            )


@restoring
def follow(func: Callable[..., Any], args: Args, kwargs: Kwargs) -> Any:
    """Call a torch function on deferred tensors outside the block that recorded them.

    In another block its modes record the call.
    """
    if current() is not None:
        return func(*args, **kwargs)
    tensors = tensors_in(args, kwargs)
    deferred = [t for t in tensors if is_deferred_tensor(t)]
    for tensor in deferred:
        # Its storage may be real by now through another tensor, and changed since.
        share_real_storage(tensor)
    first = next(filter(is_deferred_tensor, deferred), None)
    if first is None or first is not deferred[0]:
        return func(*args, **kwargs)
    follower = Follower(Deferred.of(first).program)
    if len([t for t in tensors if t.is_meta]) == len(deferred):
        follower.meant = follower.device_of(first)
    with in_force(follower):
        result = func(*args, **kwargs)
    for leaf in flat(result):
        if isinstance(leaf, Tensor) and is_deferred_tensor(leaf):
            guard(leaf)
    return result


def hear(func: Callable[..., Any], args: Args, kwargs: Kwargs) -> Any:
    """Call an op on deferred tensors that has come to the dispatcher."""
    # A recorder has heard it already, and runs it on meta to learn the shape of its result.
    if current() is not None:
        with below_python():
            return func(*args, **kwargs)
    return follow(func, args, kwargs)


DeferredTensor.follow = staticmethod(follow)
DeferredTensor.hear = staticmethod(hear)
