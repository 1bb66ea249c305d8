"""torchtitan's llama3, sharded by its own code before it has values: ``torchrun THIS``.

A block and ``materialize`` take the place of the trainer's ``torch.device("meta")``, ``to_empty``
and ``init_weights``: every rank gets the bits of one process, whatever the mesh.
"""

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from torchtitan.config import CompileConfig, ParallelismConfig, TrainingConfig
from torchtitan.distributed import ParallelDims, parallel_dims
from torchtitan.models.llama3 import model_registry

import lateinit

SPEC = model_registry("debugmodel")
# torchtitan takes a machine without accelerators for one with CUDA.
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def build() -> nn.Module:
    """The model with its values, as one process has it."""
    model = SPEC.model.build()
    model.init_weights(buffer_device=None)
    return model


def sharded(model: nn.Module, tensor_parallel: int) -> nn.Module:
    """The same, after torchtitan's own sharding."""
    parallelism = ParallelismConfig(
        tensor_parallel_degree=tensor_parallel, spmd_backend="partial_dtensor"
    )
    dims = ParallelDims.from_config(parallelism, dist.get_world_size())
    dims.build_mesh()
    return SPEC.parallelize_fn(
        model,
        parallel_dims=dims,
        training=TrainingConfig(),
        parallelism=parallelism,
        compile_config=CompileConfig(enable=False),
        ac_config=None,
        dump_folder="",
    )


def main() -> None:
    """Shard, fill, and compare every parameter with that of one process."""
    dist.init_process_group("nccl" if DEVICE == "cuda" else "gloo")
    parallel_dims.device_type = DEVICE
    torch.manual_seed(0)
    with lateinit.deferred():
        model = build()
    model = sharded(model, tensor_parallel=dist.get_world_size())
    lateinit.materialize(model)
    torch.manual_seed(0)
    twin = build()
    expected = dict(twin.named_parameters()) | dict(twin.named_buffers())
    for name, parameter in [*model.named_parameters(), *model.named_buffers()]:
        whole = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
        assert torch.equal(whole, expected[name]), name
    if dist.get_rank() == 0:
        print(f"{len(expected)} parameters and buffers equal those of one process")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
