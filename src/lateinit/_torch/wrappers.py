"""Wrapper subclasses, tensors that consist of other tensors: ``DTensor`` above all; fake tensors.

Their modules take long to import, so they are looked up in ``sys.modules``: as long as ``DTensor``
is not imported, no tensor can be one.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from lateinit._torch.swap import swap


def is_wrapper(tensor: Any) -> bool:
    """Whether a tensor is a wrapper of other tensors, as distributed and some quantised ones are.

    torch/utils/_python_dispatch.py: ``__tensor_flatten__`` is the protocol of such classes.
    """
    return hasattr(type(tensor), "__tensor_flatten__")


def is_dtensor(tensor: Any) -> bool:
    """Whether a tensor is a ``DTensor``."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def tell_of_new_dtensors(listener: Callable[[Any], None] | None) -> bool:
    """Call ``listener`` with each ``DTensor`` that Python code makes; None ends that.

    Those that torch's C++ code makes, for the results of ops, do not call the constructor.

    Returns:
        Whether ``DTensor`` is imported yet; if not, nothing can be intercepted.
    """
    module = sys.modules.get("torch.distributed.tensor")
    if module is None:
        return False

    def telling(initialise: Any) -> Any:
        def told(self: Any, *args: Any, **kwargs: Any) -> None:
            initialise(self, *args, **kwargs)
            listener(self)  # type: ignore[misc]

        return told

    _replace(module.DTensor, "__init__", telling if listener else None)
    return True


def _replace(owner: Any, name: str, telling: Callable[[Any], Any] | None) -> None:
    """Put ``telling(original)`` in the place of a method, or the original back if it is None."""
    found = inspect.getattr_static(owner, name)  # which may be inherited
    bound = isinstance(found, classmethod)
    function = found.__func__ if bound else found
    original = getattr(function, "_lateinit_original", function)
    new: Any = original
    if telling is not None:
        new = functools.wraps(original)(telling(original))
        new._lateinit_original = original
    setattr(owner, name, classmethod(new) if bound else new)


class KeptByFsdp(NamedTuple):
    """What FSDP2 keeps of a parameter on this rank.

    Attributes:
        memory: the flat padded memory, zeros beyond the shard.
        shard: the ``DTensor`` that takes the place of the parameter.
        local: the local part of it, on that memory.
        dim: the dim that was cut.
        start: where in that dim of the parameter the shard starts.
        length: how long it is in that dim.
    """

    memory: Tensor
    shard: Any
    local: Tensor
    dim: int
    start: int
    length: int


_FSDP = "torch.distributed.fsdp._fully_shard._fsdp_param"
_KEPT = {"_sharded_param_data", "sharded_param", "padded_sharded_param_size"}


def tell_of_fsdp_parameters(
    listener: Callable[[Callable[[], None], Any, Tensor], None] | None,
) -> bool:
    """Have FSDP2 shard a parameter by ``listener(make, state, parameter)``; None ends that.

    ``make`` is FSDP2's own sharding. It fills in ``state``, from which ``kept_by_fsdp`` reads.

    Returns:
        Whether FSDP2 is imported yet; if not, nothing can be intercepted.
    """
    module = sys.modules.get(_FSDP)
    if module is None:
        return False
    cls = module.FSDPParam
    if not cls.__annotations__.keys() >= _KEPT:  # another torch version: slower, and as correct
        return True

    def telling(initialise: Any) -> Any:
        def told(self: Any, param: Tensor, *args: Any, **kwargs: Any) -> None:
            make = functools.partial(initialise, self, param, *args, **kwargs)
            listener(make, self, param)  # type: ignore[misc]

        return told

    _replace(cls, "__init__", telling if listener else None)
    return True


def kept_by_fsdp(state: Any) -> KeptByFsdp:
    """What FSDP2's own object for a parameter keeps (torch/.../_fully_shard/_fsdp_param.py)."""
    shard, dim = state.sharded_param, state.fsdp_placement.dim
    local = shard._local_tensor
    # A mesh of replicas alone has no rank among shards.
    rank = getattr(state.mesh_info, "shard_mesh_rank", 0)
    start = rank * state.padded_sharded_param_size[dim]
    return KeptByFsdp(state._sharded_param_data, shard, local, dim, start, local.size(dim))


class Cut(NamedTuple):
    """A call in which torch takes this rank's part of a tensor along one axis of a mesh.

    Attributes:
        take: torch's own function: takes this rank's part of its argument.
        tensor: the tensor.
        dim: the dim that ``torch.chunk`` cuts; None if the part is made in another way.
        chunks: the number of chunks.
        chunk: the index of this rank's chunk.
    """

    take: Callable[[Tensor], Tensor]
    tensor: Tensor
    dim: int | None
    chunks: int
    chunk: int


def tell_of_cuts(listener: Callable[[Cut], Tensor] | None) -> bool:
    """Have ``distribute_tensor`` take parts of tensors by ``listener``; None ends that.

    Returns:
        Whether ``DTensor`` is imported yet; if not, nothing can be intercepted.
    """
    module = sys.modules.get("torch.distributed.tensor.placement_types")
    if module is None:
        return False
    shard = listener and functools.partial(_telling_of_shard, listener)
    for cls in (module.Shard, module._StridedShard):
        _replace(cls, "_shard_tensor", shard)
    # torch before 2.12 has only the second of these methods.
    names = ("_make_replicate_tensor", "_replicate_tensor")
    name = next(name for name in names if name in vars(module.Replicate))
    replica = listener and functools.partial(_telling_of_replica, listener)
    _replace(module.Replicate, name, replica)
    return True


def _telling_of_shard(listener: Callable[[Cut], Tensor], original: Any) -> Any:
    def told(self: Any, tensor: Tensor, mesh: Any, mesh_dim: int, *rest: Any, **more: Any) -> Any:
        def take(tensor: Tensor) -> Any:
            return original(self, tensor, mesh, mesh_dim, *rest, **more)

        place = mesh.get_coordinate()
        if place is None:  # this rank is not part of the mesh
            return listener(Cut(take, tensor, None, 0, 0))
        # A _StridedShard is no subclass of Shard, and takes several pieces.
        simple = type(self).__name__ == "Shard"
        dim = self.dim if simple and 0 <= self.dim < tensor.dim() else None
        return listener(Cut(take, tensor, dim, mesh.size(mesh_dim), place[mesh_dim]))

    return told


def _telling_of_replica(listener: Callable[[Cut], Tensor], original: Any) -> Any:
    def told(owner: Any, tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        def take(tensor: Tensor) -> Any:
            return original(owner, tensor, *args, **kwargs)

        return listener(Cut(take, tensor, None, 0, 0))

    return told


FakeMode = FakeTensorMode
"""The dispatch mode that makes fake tensors."""

enter_fake_mode = FakeTensorMode.__enter__
"""The method that ``with FakeTensorMode():`` calls, for ``torch.export`` and for users."""


def is_fake(tensor: Any) -> bool:
    """Whether a tensor is a ``FakeTensor``: it has no memory and reports a real device."""
    module = sys.modules.get("torch._subclasses.fake_tensor")
    return module is not None and isinstance(tensor, module.FakeTensor)


def fake_like(fake: Any, tensor: Tensor, device: torch.device) -> Tensor:
    """A fake tensor with the layout of ``tensor``, of the mode that ``fake`` belongs to."""
    size, stride, dtype = tensor.size(), tensor.stride(), tensor.dtype
    with fake.fake_mode:
        return torch.empty_strided(size, stride, dtype=dtype, device=device)


def local_part(tensor: Any) -> Tensor:
    """The local tensor of a ``DTensor``, which owns its memory on this rank."""
    local: Tensor = tensor._local_tensor
    return local


def rewrap(tensor: Any) -> None:
    """Update the device of a ``DTensor`` object after its local part was swapped.

    torch/distributed/tensor/_api.py: __new__ copies the device of the local part, once.
    """
    local = tensor._local_tensor
    swap(tensor, type(tensor)(local, tensor._spec, requires_grad=tensor.requires_grad))
    tensor._local_tensor = local


def axes_as_sharded(shard: Any) -> Sequence[int]:
    """The axes of a ``DTensor``'s mesh, in the order in which they cut its dims.

    torch/distributed/tensor/_dtensor_spec.py: from left to right, unless ``shard_order`` gives
    another order. It is None if the placements themselves encode the order (``_StridedShard``).
    """
    order = getattr(shard._spec, "shard_order", None)
    if not order:
        return range(shard.device_mesh.ndim)
    return [axis for entry in order for axis in entry.mesh_dims]


def chunk_of(length: int, parts: int, part: int) -> range:
    """The indices of one part, as ``torch.chunk`` cuts: the last parts may be shorter.

    Args:
        length: the number of indices.
        parts: the number of parts.
        part: the index of the part.
    """
    chunk = -(-length // parts)
    return range(min(length, part * chunk), min(length, (part + 1) * chunk))


def indices_of_part(placement: Any, length: int, parts: int, part: int) -> Sequence[int] | None:
    """The indices of one part along the dim that a placement cuts; None if it cuts no dim.

    Args:
        placement: a placement of a ``DTensor``.
        length: the length of the dim that is cut.
        parts: the number of parts, which is the size of the axis.
        part: the index of the part.
    """
    # There is a placement, so its class is imported. Its documentation specifies the cut.
    if type(placement) is sys.modules["torch.distributed.tensor"].Shard:
        return chunk_of(length, parts, part)
    # `_StridedShard` itself must answer: its uneven parts differ between torch versions.
    split = getattr(placement, "_split_tensor", None)
    if split is None:
        return None
    dim = placement.dim
    every = torch.arange(length, device="cpu").view([1] * dim + [length])
    shards: list[Tensor] = split(every, parts, with_padding=False, contiguous=False)[0]
    return shards[part].flatten().tolist()
