"""Pretrain a GPT on all ranks with the values of one device: ``torchrun --nproc-per-node 2 THIS``.

Each rank fills its own shards. Rank 0 then trains the eager twin on the batches of all ranks.
"""

import argparse
from pathlib import Path

import torch
import torch.distributed as dist
from matplotlib.figure import Figure
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import GPT2Config, GPT2LMHeadModel

import lateinit

LENGTH, STEPS = 48, 40
TEXT = torch.tensor(list(Path(argparse.__file__).read_bytes())).unfold(0, LENGTH, 1)
SIZES = {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 256, "n_positions": LENGTH}
CONFIG = GPT2Config(**SIZES, bos_token_id=None, eos_token_id=None)


def train(model: nn.Module, ranks: range) -> torch.Tensor:
    """Train on the batches of these ranks; return the sum of their losses in each step."""
    model.eval()  # no dropout, which would draw on each rank
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = torch.zeros(STEPS)
    for step in range(STEPS):
        for rank in ranks:
            draw = torch.Generator().manual_seed(1000 * step + rank)
            tokens = TEXT[torch.randint(len(TEXT), (4,), generator=draw)]
            scores = model(tokens[:, :-1], use_cache=False).logits.transpose(1, 2)
            loss = nn.functional.cross_entropy(scores, tokens[:, 1:])
            (loss / len(ranks)).backward()
            losses[step] += loss.detach()
        optimizer.step()
        optimizer.zero_grad()
    return losses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--plot", help="draw both loss curves into this file")
    plot = parser.parse_args().plot
    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    mesh = init_device_mesh("cpu", (ranks,))
    model = lateinit.deferred_init(GPT2LMHeadModel, CONFIG)
    for part in [*model.transformer.h, model]:
        fully_shard(part, mesh=mesh)
    lateinit.materialize(model, seed=0)
    torch.manual_seed(0)
    twin = GPT2LMHeadModel(CONFIG)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.full_tensor(), twin.get_parameter(name)), name
    losses = train(model, range(rank, rank + 1)) / ranks
    dist.all_reduce(losses)
    if rank == 0:
        alone = train(twin, range(ranks)) / ranks
        difference = (losses - alone).abs().max()
        assert difference < 1e-4
        print(f"{ranks} ranks: all parameters are equal to eager")
        print(f"loss {alone[0]:.4f}, after {STEPS} steps {alone[-1]:.4f}; difference {difference}")
        if plot is not None:
            axes = Figure(figsize=(6, 3.5), layout="constrained").subplots()
            axes.plot(losses, linewidth=5, alpha=0.4, label=f"deferred, on {ranks} FSDP2 ranks")
            axes.plot(alone, color="black", linewidth=1, label="eager, on one device")
            axes.set(xlabel="step", ylabel="loss", title=f"difference: {difference:.1e}")
            axes.legend()
            axes.figure.savefig(plot)
    # Gloo's thread may still hold the tensor of the last sum; it must let go before Python exits.
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
