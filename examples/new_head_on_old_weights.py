"""Fine-tuning: load an old backbone into a deferred model, and initialise only what is new."""

import torch
from torch import nn

import lateinit


class Classifier(nn.Module):
    """A backbone and a head; the positions are computed, and in no checkpoint."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 64))
        self.head = nn.Linear(64, classes)
        nn.init.normal_(self.head.weight, std=0.02)
        self.register_buffer("positions", torch.linspace(0, 1, 32), persistent=False)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Class scores of shape (batch, classes)."""
        return self.head(self.backbone(inputs + self.positions))


# What an earlier run left behind: a classifier of ten classes.
old = {name: tensor for name, tensor in Classifier(10).state_dict().items() if "head" not in name}

# The way it is done eagerly: initialise everything, overwrite most of it.
torch.manual_seed(0)
eager = Classifier(3)
eager.load_state_dict(old, strict=False)

# Deferred: nothing is drawn for what the checkpoint holds.
torch.manual_seed(0)
model = lateinit.deferred_init(Classifier, 3)
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)  # built over what is not there yet
missing = model.load_state_dict(old, strict=False).missing_keys
print("not in the checkpoint:", ", ".join(missing))
print(lateinit.plan(model))

lateinit.materialize(model)
for name, tensor in eager.named_parameters():
    assert torch.equal(tensor, model.get_parameter(name)), name
assert torch.equal(eager.positions, model.positions)
print("equal to eager: every parameter, and the positions")

# The task: which of the first three inputs is the largest?
draw = torch.Generator().manual_seed(1)
for step in range(61):
    inputs = torch.randn(64, 32, generator=draw)
    scores, classes = model(inputs), inputs[:, :3].argmax(1)
    loss = nn.functional.cross_entropy(scores, classes)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if step % 20 == 0:
        right = (scores.argmax(1) == classes).float().mean()
        print(f"step {step:2}: loss {loss:.2f}, {right:.0%} right")
assert right > 0.7
