"""A GPT sharded over all ranks before it has any memory: ``torchrun --nproc-per-node 2 THIS``.

Every rank fills its own shards, with the bits that one process would have; nothing is sent.
"""

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import lateinit

WIDTH, LAYERS, VOCABULARY, LENGTH = 256, 4, 1000, 64


class GPT(nn.Module):
    """A decoder that knows nothing of deferred construction, shards or devices."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, WIDTH)
        self.places = nn.Parameter(torch.randn(LENGTH, WIDTH) * 0.02)
        layer = nn.TransformerEncoderLayer(WIDTH, 4, 4 * WIDTH, dropout=0.0, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, LAYERS, enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        nn.init.normal_(self.head.weight, std=0.02)
        mask = nn.Transformer.generate_square_subsequent_mask(LENGTH)
        self.register_buffer("mask", mask, persistent=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.tokens(tokens) + self.places
        return self.head(self.layers(x, mask=self.mask, is_causal=True))


def main() -> None:
    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    mesh = init_device_mesh("cpu", (ranks,))

    torch.manual_seed(0)
    with lateinit.deferred():
        model = GPT()
    for layer in model.layers.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    lateinit.materialize(model)

    held = sum(p.to_local().numel() for p in model.parameters())
    whole = sum(p.numel() for p in model.parameters())
    print(f"rank {rank} of {ranks}: {held:,} of {whole:,} parameters", flush=True)

    torch.manual_seed(rank)  # every rank has its own data
    for step in range(2):
        tokens = torch.randint(VOCABULARY, (2, LENGTH + 1))
        scores = model(tokens[:, :-1])
        loss = nn.functional.cross_entropy(scores.flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        total = loss.detach().clone()
        dist.all_reduce(total)
        if rank == 0:
            print(f"step {step}: loss {total.item() / ranks:.3f}", flush=True)
    # Gloo's thread may still hold the tensor of the last sum; it must let go before Python exits.
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
