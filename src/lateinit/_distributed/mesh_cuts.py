"""How a mesh cuts a model: the shape and the stage of each tensor on the first rank."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from lateinit._tensors import Found
from lateinit.errors import ShardingError, candidates, listing

# The number of an expert in the name of its parameter, where experts are a list of modules.
_EXPERT = re.compile(r"(?:^|\.)experts\.(\d+)\.")


@dataclass(frozen=True, slots=True)
class Cutting:
    """How a mesh cuts a model.

    Attributes:
        mesh: the size of each axis.
        dims: the dim along which ``tp`` cuts each parameter.
        experts: for each parameter of experts, the number of experts.
        blocks: the name of the list of layers, with a final dot, and its length; None without one.
    """

    mesh: Mapping[str, int]
    dims: dict[str, int]
    experts: dict[str, int]
    blocks: tuple[str, int] | None

    @classmethod
    def of(
        cls, model: nn.Module, mesh: Mapping[str, int], plan: Mapping[str, str] | None
    ) -> Cutting:
        """Find the cuts of a model."""
        experts = _experts(model)
        if mesh.get("ep", 1) > 1 and not experts:
            raise ShardingError(
                f"an axis ep={mesh['ep']} divides experts, and no module of "
                f"{type(model).__name__} is called experts: use fsdp instead"
            )
        blocks, stages = _blocks(model), mesh.get("pp", 1)
        if stages > 1 and (blocks is None or blocks[1] < stages):
            layers = f"{blocks[1]} layers in {blocks[0]}*" if blocks else "no list of layers"
            raise ShardingError(
                f"an axis pp={stages} needs a layer for each of its stages, and "
                f"{type(model).__name__} has {layers}"
            )
        return cls(mesh, _cut_by_plan(model, mesh, plan), experts, blocks)

    @property
    def fsdp(self) -> int:
        """The number of ranks among which FSDP cuts parameters that are no experts."""
        return self.mesh.get("fsdp", 1) * self.mesh.get("ep", 1)

    def fsdp_of(self, name: str) -> int:
        """The number of ranks among which FSDP cuts a parameter."""
        return self.mesh.get("fsdp", 1) if name in self.experts else self.fsdp

    def shape(self, found: Found) -> tuple[int, ...] | None:
        """The shape of the first rank's shard; None if another rank has the expert."""
        sizes, name, parts = list(found.tensor.shape), found.name, self.fsdp_of(found.name)
        cuts, first = [(self.dims.get(name), self.mesh.get("tp", 1))], 0
        if name in self.experts:
            divided = self.mesh.get("ep", 1)
            alone = _EXPERT.search(name)
            if alone is None:
                cuts.append((0, divided))
                # As in torchtitan: if there are fewer experts than ranks, FSDP cuts along dim 1.
                first = int(parts * divided > self.experts[name] and len(sizes) > 1)
            elif int(alone[1]) >= -(-self.experts[name] // divided):
                return None
        for dim, ranks in (*cuts, (first, parts)):
            if dim is not None and sizes:
                sizes[dim] = -(-sizes[dim] // ranks)
        return tuple(sizes)

    def layer(self, name: str) -> str:
        """The layer with which ``fully_shard`` would gather a parameter."""
        path = self.blocks[0] if self.blocks else ""
        return path + name.removeprefix(path).partition(".")[0] if name.startswith(path) else ""

    def stages(self, found: Found) -> list[int]:
        """The stages that hold a tensor: layers in order, one more in each of the first stages."""
        count = self.mesh.get("pp", 1)
        if count == 1 or self.blocks is None:
            return [0]
        path, layers = self.blocks
        held = set()
        for name in found.names:
            if name.startswith(path):
                held.add(_stage(int(name[len(path) :].partition(".")[0]), layers, count))
            else:
                held.add(0 if self._is_before(name) else count - 1)
        return sorted(held)

    def _is_before(self, name: str) -> bool:
        """Whether a parameter outside of the layers belongs to an embedding."""
        return any("emb" in part or part in {"wte", "wpe"} for part in name.lower().split("."))


def _stage(layer: int, layers: int, count: int) -> int:
    """The stage of a layer, as torch.tensor_split divides."""
    each, more = divmod(layers, count)
    early = more * (each + 1)
    return layer // (each + 1) if layer < early else more + (layer - early) // each


def _blocks(model: nn.Module) -> tuple[str, int] | None:
    """The name of the list of layers with most parameters, with a final dot, and its length."""
    lists = {
        f"{name}.": (sum(p.numel() for p in module.parameters()), len(module))
        for name, module in model.named_modules()
        if isinstance(module, (nn.ModuleList, nn.Sequential)) and name and len(module) > 1
    }
    if not lists:
        return None
    path = max(lists, key=lambda name: (lists[name][0], -len(name)))
    return path, lists[path][1]


def _experts(model: nn.Module) -> dict[str, int]:
    """The parameters of experts, each with the number of experts."""
    found: dict[str, int] = {}
    for path, module in model.named_modules():
        if path.rpartition(".")[2] != "experts":
            continue
        for name, parameter in module.named_parameters(path):
            apart = isinstance(module, nn.ModuleList)
            if apart or parameter.dim() > 1:
                found[name] = len(module) if apart else parameter.shape[0]
    return found


def _cut_by_plan(
    model: nn.Module, mesh: Mapping[str, int], plan: Mapping[str, str] | None
) -> dict[str, int]:
    """The dim along which tensor parallelism cuts each parameter."""
    if mesh.get("tp", 1) == 1:
        return {}
    known = plan if plan is not None else getattr(model, "_tp_plan", None)
    if not known:
        raise ShardingError(
            f"{type(model).__name__} has no plan of tensor parallelism of its own: give one, as in "
            '--tp-plan \'{"*.up": "colwise", "*.down": "rowwise"}\''
        )
    found: dict[str, int] = {}
    parameters = dict(model.named_parameters())
    unmatched = []
    for pattern, style in known.items():
        names = [n for n in parameters if _matches(n, pattern)]
        # A model's own plan may name modules that this configuration lacks.
        if not names and plan is not None:
            unmatched.append(pattern)
        for name in names:
            dim = _dim(style, parameters[name].dim(), name)
            if dim is not None:
                found[name] = dim
    if unmatched:
        near = candidates(unmatched[0], parameters)
        raise ShardingError(
            f"the plan's {listing(unmatched)} matches no parameter; there are: {near}"
        )
    return found


def _matches(name: str, pattern: str) -> bool:
    return any(fnmatch.fnmatchcase(n, pattern) for n in (name, name.rpartition(".")[0]))


def _dim(style: str, dims: int, name: str) -> int | None:
    if "embedding" in style:
        return 0
    if "colwise" in style:
        return max(0, dims - 2)
    if "rowwise" in style and dims > 1 and not name.endswith(".bias"):
        return dims - 1
    return None
