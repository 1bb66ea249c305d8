"""Record ops on deferred tensors outside blocks, or refuse them.

Views, copies, casts, writes and arithmetic among deferred tensors are recorded in their program.
If a plain meta tensor takes part, the result is a plain meta tensor, as shape propagation needs. An
op that draws, needs values, or exchanges values with other ranks raises ``DeferredTensorError``.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lateinit._integrations import before_sending
from lateinit._program import Program
from lateinit._recording.kinds import written
from lateinit._recording.recorder import RecordingMode
from lateinit._recording.writer import ProgramWriter
from lateinit._tensors import (
    AS_RECORDED,
    Deferred,
    DeferredStorage,
    Slot,
    described,
    is_deferred_tensor,
    is_of_waiting,
    share_real_storage,
    slot_of,
    waits,
)
from lateinit._torch import (
    META,
    Args,
    Asked,
    Kwargs,
    Meant,
    OpInfo,
    asks_for_values,
    below_python,
    calling_modules,
    default_generator,
    fake_like,
    flat,
    is_fake,
    is_module_converting,
    is_tracing,
    map_tensors,
    spoken,
    tensors_in,
)
from lateinit.errors import DeferredTensorError, LateinitError


def needs_values(what: str, tensor: Tensor, see: str = "") -> DeferredTensorError:
    """The error for a call that needs the values of a deferred tensor; ``see``: a page of docs."""
    return DeferredTensorError(
        f"{what} needs the values of {described(tensor)}, which has none yet: call "
        f"lateinit.materialize() first{see and f' ({see})'}"
    )


def would_change(what: str, tensor: Tensor) -> DeferredTensorError:
    """The error for a write that cannot be recorded, to a deferred tensor whose block has ended."""
    return DeferredTensorError(
        f"{what} would change {described(tensor)} in place, which has no values yet: do it inside "
        "`with lateinit.deferred():` so that it is recorded, or after lateinit.materialize()"
    )


def would_send(what: str, tensor: Tensor, instead: str) -> DeferredTensorError:
    """The error for a call that exchanges values with other ranks; ``instead``: the next step."""
    return DeferredTensorError(
        f"{what} would exchange the values of {described(tensor)} with other ranks, which has none "
        f"yet: {instead}"
    )


def refusal(
    error: Exception, func: Callable[..., Any], first: Tensor, tensors: list[Tensor]
) -> DeferredTensorError | None:
    """The error to raise in place of an error of torch that a deferred tensor may have caused.

    aten/src/ATen/native/RNN.cpp: check_attributes compares the devices of input and weights before
    it calls any op. If all tensors are deferred or on meta, eager construction fails too, unless
    the error is about a tensor on meta.
    """
    # Errors of other classes come from argument checks, which eager construction makes too.
    if isinstance(error, LateinitError) or not isinstance(error, RuntimeError):
        return None
    name = getattr(func, "__name__", str(func))
    if all(t.is_meta or is_fake(t) for t in tensors):
        alone = all(map(is_deferred_tensor, tensors))
        return needs_values(name, first) if alone and asks_for_values(error) else None
    return DeferredTensorError(
        f"{name} was given {described(first)} together with real tensors, and failed ({error}): it "
        "is deferred and has no values yet; call lateinit.materialize(model) before the forward "
        "pass"
    )


def refuse_lost(func: Callable[..., Any], result: Any, first: Tensor) -> None:
    """Refuse a result for which torch itself made a tensor on ``meta``, whose values are lost.

    It does so for an index that is a list (torch/csrc/autograd/python_variable_indexing.cpp).
    """
    for leaf in flat(result):
        if isinstance(leaf, Tensor) and leaf.is_meta and slot_of(leaf) is None:
            raise needs_values(getattr(func, "__name__", str(func)), first)


def as_meant(args: Args, kwargs: Kwargs, device: torch.device) -> tuple[Args, Kwargs]:
    """The arguments of a conversion as the user means them: outside blocks ``y.device`` is meta."""

    def meant(value: Any) -> Any:
        on_meta = isinstance(value, (torch.device, str)) and value in (META, "meta")
        return device if on_meta else value

    return tuple(map(meant, args)), {key: meant(value) for key, value in kwargs.items()}


def is_real(tensor: Tensor) -> bool:
    """Whether a tensor is real, or its storage has become real through another tensor."""
    share_real_storage(tensor)
    return not is_deferred_tensor(tensor)


def is_meta_to(asked: Asked, tensor: Tensor) -> bool:
    """The ``is_meta`` of a deferred tensor or shard for the code that reads it."""
    # Every rank can compute the recorded values, so nothing need be sent.
    if asked.why in ("scatter", "broadcast"):
        return True
    # torch/nn/modules/module.py: _load_from_state_dict reads is_meta only to warn that copying
    # into a meta parameter is a no-op. Copying into a deferred tensor is not.
    if is_real(tensor) or asked.why == "load" or not waits(tensor):
        return False
    if asked.why == "init":
        raise would_change(asked.given["function"], tensor)
    return True


def device_to(meant: Meant, tensor: Tensor) -> torch.device:
    """The ``device`` of a deferred tensor or shard for the code that reads it."""
    slot = slot_of(tensor)
    # First the most frequent case: FSDP2 reads it twice for each parameter.
    if meant is Meant.META and slot is not None and slot.waits and slot.real is None:
        return META
    if is_real(tensor):
        return tensor.device
    if meant.needs_values and (waits(tensor) or meant is Meant.INVERSE):
        page = "docs/recipes.md" if meant is Meant.PARALLEL else ""
        raise needs_values(meant.value, tensor, page)
    return Deferred.of(tensor).destination(AS_RECORDED)


class Follower(RecordingMode):
    """Dispatch mode outside blocks: records the ops that can be replayed faithfully.

    ``meant`` is a tensor of a call, if all of the meta tensors of the call are deferred. A tensor
    that the call makes on meta, such as the number in ``mask[0] = 1``, is then recorded for the
    device of ``meant``. ``final`` is set if a call was refused for good: no tensor may realise
    itself to repeat it.

    Args:
        program: the program of the deferred tensors.
        guard: guards a new deferred tensor.
    """

    meant: Tensor | None = None
    final = False

    def __init__(self, program: Program, guard: Callable[[Tensor], None]) -> None:
        # Random ops are refused; replaying raises if a foreign op draws.
        super().__init__(ProgramWriter(program, drawing=False))
        self.guard = guard
        self._before: dict[torch.Generator, Tensor] = {}

    def undo_draws(self) -> None:
        """Put back the generators from which a failed call drew into real tensors."""
        for generator, state in self._before.items():
            generator.set_state(state)
        self._before.clear()

    def _note_draw(self, args: Args, kwargs: Kwargs, tensors: list[Tensor]) -> None:
        given = [a for a in (*args, *kwargs.values()) if isinstance(a, torch.Generator)]
        device = kwargs.get("device") or next((t.device for t in tensors), torch.device("cpu"))
        if given or device != META:
            generator = given[0] if given else default_generator(torch.device(device))
            if generator not in self._before:
                self._before[generator] = generator.get_state()

    def dispatch(self, info: OpInfo, args: Args, kwargs: Kwargs) -> Any:
        """Have one op recorded, run it among tensors without values, or refuse it."""
        tensors = tensors_in(args, kwargs)
        deferred = [t for t in tensors if is_deferred_tensor(t)]
        if deferred and info.name == "aten::empty_like" and is_module_converting():
            self.final = True
            raise DeferredTensorError(
                f"Module.to_empty would lose the recorded values of {described(deferred[0])}, and "
                "leave memory without values: call lateinit.materialize(module, device=...) "
                "instead, or pass param_init_fn=lateinit.materialize to FullyShardedDataParallel "
                "(docs/recipes.md)"
            )
        if deferred and info.name.startswith("aten::set_") and not _is_recorded(*args[1:2]):
            raise would_change("set_", deferred[0])
        own = bool(deferred) and kwargs.get("device") == META
        if own:
            # Outside blocks a deferred tensor reports meta, so y.to(x.device) asks for meta.
            kwargs = kwargs | {"device": self.writer.device_of(deferred[0])}
        elif not deferred and self.meant is not None and kwargs.get("device") == META:
            if info.random:
                raise needs_values(spoken(info.name), self.meant)
            device = self.writer.device_of(self.meant)
            made = self.writer.record(info, args, kwargs | {"device": device}, [])
            self._name(made, self.meant)
            return made
        if info.random and not deferred:
            self._note_draw(args, kwargs, tensors)
        elsewhere = info.from_sizes and not own and kwargs.get("device") not in (None, META)
        if not deferred or info.metadata_only or info.layout_only or elsewhere:
            return info.func(*args, **kwargs)
        fake = next(filter(is_fake, tensors), None)
        among_meta = fake is not None or len(deferred) < len([t for t in tensors if t.is_meta])
        if not (among_meta and info.writes_unsaid):  # shape propagation through batch norm
            self._refuse_values(info, args, kwargs, deferred, among_meta=among_meta)
        if fake is not None and is_tracing():
            raise DeferredTensorError(
                f"{spoken(info.name)} is being traced with {described(deferred[0])}, which has no "
                "values yet that a graph could hold: call lateinit.materialize() first"
            )
        if fake is not None:
            as_fake = partial(self._as_fake, fake)
            return info.func(*map_tensors(args, as_fake), **map_tensors(kwargs, as_fake))
        if among_meta:
            return info.func(*args, **kwargs)
        # Straight to the kernels: the guards of the arguments have intercepted the op already.
        with below_python():
            result = self.writer.record(info, args, kwargs, deferred)
        return self._guarded(result, deferred, reads=not info.from_sizes)

    def _as_fake(self, fake: Tensor, tensor: Tensor) -> Tensor:
        """A fake tensor in place of a deferred one, in a call with fake tensors."""
        return fake_like(fake, tensor, self.writer.device_of(tensor)) if tensor.is_meta else tensor

    def _guarded(self, result: Any, sources: list[Tensor], *, reads: bool) -> Any:
        """Guard new deferred tensors, and name them after the first of their sources.

        This runs below autograd, which then adds the graph to the guarded tensors.

        Args:
            result: the result of an op.
            sources: the deferred tensors from which it is made.
            reads: whether its values depend on those of the sources. A tensor computed from a
                parameter after the block waits for ``materialize`` as the parameter does.
        """
        waiting = [t for t in sources if waits(t)] if reads else []
        of_waiting = any(map(is_of_waiting, sources))
        for leaf, slot in self._name(result, sources[0]):
            slot.waits = slot.waits or any(t is not leaf for t in waiting)
            slot.of_waiting = slot.of_waiting or of_waiting
            self.guard(leaf)
        return result

    def _name(self, result: Any, source: Tensor) -> list[tuple[Tensor, Slot]]:
        """Name new deferred tensors, and return them with their slots."""
        origin = slot_of(source)
        made = [(leaf, slot_of(leaf)) for leaf in flat(result) if isinstance(leaf, Tensor)]
        if origin is None:
            return []
        return [(t, named_after(slot, origin)) for t, slot in made if slot is not None]

    def _refuse_values(
        self, info: OpInfo, args: Args, kwargs: Kwargs, deferred: list[Tensor], *, among_meta: bool
    ) -> None:
        op = spoken(info.name)
        if info.collective:  # whether a tensor is real may differ between ranks
            self.final = True
            instead = before_sending(calling_modules()) or (
                "call lateinit.materialize() first (docs/recipes.md)"
            )
            raise would_send(op, deferred[0], instead)
        for changed in written(info, args, kwargs):
            if not changed.is_meta and not is_fake(changed):
                raise DeferredTensorError(
                    f"{op} was given {described(deferred[0])} together with real tensors, one of "
                    "which it would write: it is deferred and has no values yet; call "
                    "lateinit.materialize() first"
                )
            if is_deferred_tensor(changed) and info.random and not info.foreign:
                raise would_change(op, changed)
            if is_deferred_tensor(changed) and among_meta:
                raise DeferredTensorError(
                    f"{op} would write a meta tensor, which has no values, to "
                    f"{described(changed)}: build it inside `with lateinit.deferred():` too. If it "
                    "was real, and was moved to the device of that one: call "
                    "lateinit.materialize() first"
                )
        drawn = info.random and not info.foreign
        if drawn or info.only_reads:
            raise needs_values(op, deferred[0])
        tensors = tensors_in(args, kwargs)
        if any(not (t.is_meta or is_fake(t)) and t.dim() > 0 for t in tensors):
            raise DeferredTensorError(
                f"{op} was given {described(deferred[0])} together with real tensors: it is "
                "deferred and has no values yet; call lateinit.materialize(model) before the "
                "forward pass"
            )


def named_after(slot: Slot, source: Slot) -> Slot:
    """Give a storage made after the block the name of its source; returns its slot."""
    slot.name = slot.name or source.name
    program, number = slot.resolve()
    made, (_, origin) = program.storages[number], source.resolve()
    if made.followed and made.made_of is None and origin != number:
        made.made_of = program.origin(origin)
    return slot


def _is_recorded(source: Any = None) -> bool:
    """Whether the tensor or storage that another tensor is set to is deferred."""
    if isinstance(source, torch.UntypedStorage):
        return isinstance(source, DeferredStorage)
    return isinstance(source, Tensor) and is_deferred_tensor(source)
