"""Materialise a model part by part: what is wanted, where, in which dtype, from which seed."""

import torch
from torch import nn

import lateinit


def build() -> nn.Module:
    """A small stand-in: any model, unmodified, will do."""
    return nn.Sequential(
        nn.Embedding(1000, 64),
        nn.TransformerEncoderLayer(64, 4, 256, batch_first=True),
        nn.TransformerEncoderLayer(64, 4, 256, batch_first=True),
        nn.Linear(64, 1000),
    )


def states(model: nn.Module) -> str:
    """How many of a model's parameters are there already."""
    parameters = list(model.parameters())
    real = sum(not lateinit.is_deferred(parameter) for parameter in parameters)
    return f"{real:2} of {len(parameters)} parameters are real"


torch.manual_seed(0)
eager = build()

torch.manual_seed(0)
model = lateinit.deferred_init(build)
print("recorded:             ", states(model))

# A submodule; what was recorded before it need not be there.
lateinit.materialize(model[2])
print("the third part:       ", states(model))

# By name: a glob, several of them, or a predicate on (fqn, tensor).
lateinit.materialize(model, only=["0.*", "1.norm*"])
print("two globs:            ", states(model))
lateinit.materialize(model, only=lambda fqn, tensor: tensor.dim() == 1)
print("everything flat:      ", states(model))

# One tensor, and then the rest. The order does not matter to the bits.
lateinit.materialize(model[3].weight)
lateinit.materialize(model)
print("the rest:             ", states(model))
pairs = zip(eager.parameters(), model.parameters(), strict=True)
print("equal to eager:       ", all(torch.equal(a, b) for a, b in pairs))

# Half the memory: floating-point tensors are cast one after another, integer ones kept.
half = lateinit.materialize(lateinit.deferred_init(build), dtype=torch.bfloat16)
print("cast:                 ", half[3].weight.dtype)

# Another seed, without recording again.
other = lateinit.materialize(lateinit.deferred_init(build), seed=0)
print("from seed 0 as well:  ", torch.equal(other[3].weight, eager[3].weight))
