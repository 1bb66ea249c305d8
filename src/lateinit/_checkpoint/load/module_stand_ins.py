"""Stand-ins for a module's own tensors, so that a dry run of loading changes nothing."""

from __future__ import annotations

import contextlib
import copy
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lateinit._checkpoint.load.stand_ins import StandIns, Stands
from lateinit._identity import IdentityMap
from lateinit._lazy import Lending, dressed, on_meta
from lateinit._rng import RandomStates
from lateinit._tensors import (
    Casts,
    Deferred,
    Reach,
    find_tensors,
    is_deferred_tensor,
    is_parameter,
    own_copy,
)
from lateinit._torch import is_dtensor, own_parameters, storage_key, without_modes
from lateinit._torch.swap import swap
from lateinit.errors import CheckpointError


class Shadows(Lending, StandIns):
    """Meta tensors in place of a module's own; they get values if a hook computes with them."""

    def __init__(self, module: nn.Module, stands: Stands, casts: Casts) -> None:
        Lending.__init__(self, on_meta)
        StandIns.__init__(self)
        self._stands = stands
        self._casts = casts
        self._found = IdentityMap((found.tensor, found) for found in find_tensors(module))
        self._together: dict[Any, list[Tensor]] = {}  # shadows by the memory that they share
        self._originals: IdentityMap[Tensor, Tensor] = IdentityMap()  # by their shadows
        self._overwritten: IdentityMap[Tensor, bool] = IdentityMap()
        self._copies: dict[Any, list[tuple[Tensor, str]]] = {}  # copies still to make

    def make(self, tensor: Tensor) -> Tensor:
        if tensor.layout is not torch.strided or tensor.is_quantized:
            copied: Tensor = copy.deepcopy(tensor)
            self._originals[copied] = tensor
            return copied
        if is_lazy(tensor):  # it will take the checkpoint's shape, which `sizes_in` checks
            found = self._found.get(tensor)
            loaded = self._stands.state.get(found.name) if found is not None else None
            shape = loaded.shape if isinstance(loaded, Tensor) else ()
            shadow = torch.empty(shape, dtype=tensor.dtype, device="meta")
        else:
            deferred = is_deferred_tensor(tensor)
            dtype = self._casts.of_tensor(tensor).dtype if deferred else None
            shadow = on_meta(tensor)
            shadow = shadow.to(dtype) if dtype and shadow.is_floating_point() else shadow
        if is_lazy(tensor) and is_parameter(tensor):
            shadow = nn.Parameter(shadow, tensor.requires_grad)
        elif not is_lazy(tensor):
            shadow = dressed(shadow, tensor, self.of)
        self._together.setdefault(_memory(tensor), []).append(shadow)
        self._originals[shadow] = tensor
        self.add(shadow)
        return shadow

    def original(self, tensor: Tensor) -> Tensor:
        """The module's tensor behind a stand-in; any other tensor is returned itself."""
        base = self.base(tensor)
        return self._originals.get(tensor if base is None else base, tensor)

    def replaced(self, module: nn.Module) -> list[Tensor]:
        """The parameters and buffers that were exchanged for other tensors."""
        now = {name: f.tensor for f in find_tensors(module) for name in f.names}
        return [
            found.tensor
            for found in self._found.values()
            if found.kind != "attribute"
            and any(
                name not in now or self.original(now[name]) is not found.tensor
                for name in found.names
            )
        ]

    def device(self, tensor: Tensor) -> torch.device:
        original = self.original(tensor)
        if is_deferred_tensor(original):
            return Deferred.of(original).destination(self._casts.of_tensor(original))
        return original.device

    def copy(self, target: Tensor, source: Tensor) -> None:
        """Do ``target.copy_(source)``; from the checkpoint only once the values are needed."""
        base, name = self.base(target), self._stands.source(source)
        if base is not None:
            self._overwritten[base] = True
        if base is not None and base.is_meta and name is not None:
            target.copy_(on_meta(source))  # fails if the shapes do not fit
            self._copies.setdefault(self._memory_of(base), []).append((base, name))
            return
        for tensor in (target, source):
            self.reveal(tensor)
        self._stands.reveal(source)
        target.copy_(source)

    def give_values(self, base: Tensor) -> None:
        memory = self._memory_of(base)
        together = self._together[memory]
        memo: dict[Any, Any] = {}
        with without_modes():
            for shadow in together:
                swap(shadow, self._initial(shadow, together, memo))
            for shadow, name in self._copies.pop(memory, ()):
                shadow.copy_(self._stands.reader.read(name))

    def _memory_of(self, shadow: Tensor) -> Any:
        return _memory(self._originals[shadow])

    def _initial(self, shadow: Tensor, together: list[Tensor], memo: dict[Any, Any]) -> Tensor:
        """The present value of a tensor of the module, in memory that only stand-ins share."""
        original = self._originals[shadow]
        # If the copies still to make overwrite all of its values, they need not be computed.
        if len(together) == 1 and shadow in self._overwritten:
            device = self.device(shadow)
            return torch.empty_strided(
                shadow.size(), shadow.stride(), dtype=shadow.dtype, device=device
            )
        if is_lazy(original) or is_dtensor(original):
            what = "its shape is not known yet" if is_lazy(original) else "load before sharding"
            raise CheckpointError(f"{self._name(shadow)} is computed with while loading: {what}")
        if original.is_meta and not is_deferred_tensor(original):
            return shadow.detach()
        refs = [Deferred.of(t).ref for t in self._originals_of(together) if is_deferred_tensor(t)]
        return own_copy(original, memo, cast=self._casts.of_tensor(original), together=refs)

    def _originals_of(self, shadows: list[Tensor]) -> list[Tensor]:
        return [self._originals[shadow] for shadow in shadows]

    def _name(self, shadow: Tensor) -> str:
        found = self._found.get(self._originals[shadow])
        return "a tensor" if found is None else found.name


def _memory(tensor: Tensor) -> Any:
    """A key that is equal for tensors that share memory."""
    if is_lazy(tensor) or is_dtensor(tensor):
        return id(tensor)
    if is_deferred_tensor(tensor):
        slot = Deferred.of(tensor).slot
        return slot if slot.real is None else storage_key(slot.real.storage)
    plain = tensor.layout is torch.strided and not tensor.is_meta
    return storage_key(tensor.untyped_storage()) if plain else id(tensor)


@contextlib.contextmanager
def shadowed(module: nn.Module, stands: Stands, casts: Casts) -> Iterator[Shadows]:
    """A block in which stand-ins replace a module's tensors; its end restores everything."""
    shadows = Shadows(module, stands, casts)
    reach, states = Reach(module), RandomStates()
    reach.keep()
    try:
        for part in module.modules():
            if any(is_dtensor(parameter) for parameter in own_parameters(part).values()):
                # `FSDPParam.reset_sharded_param`, a post hook, reads the local parts of its shards,
                # which a stand-in does not have.
                part.__dict__["_load_state_dict_post_hooks"] = OrderedDict()
        reach.exchange(shadows.of)
        yield shadows
        reach.restore()
        states.restore()
    except BaseException:
        reach.restore()
        states.restore()
        raise
