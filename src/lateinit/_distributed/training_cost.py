"""The memory of one rank in training: gradients, optimizer state, gathered layers, activations.

These are estimates, from the sizes of the shards and from published formulas; nothing is run.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lateinit._units import format_bytes
from lateinit.errors import ShardingError, candidates


@dataclass(frozen=True, slots=True)
class Policy:
    """The bytes that training keeps for each trainable element of a shard.

    A negative number stands for the size of an element in the recorded dtype.

    Attributes:
        parameters: the bytes of the parameter itself.
        gradients: the bytes of its gradient.
        optimizer: the bytes of AdamW's two moments, and of a copy of the parameter if there is one.
        gathered: the bytes in a layer that ``fully_shard`` gathers for its computation.
    """

    parameters: int
    gradients: int
    optimizer: int
    gathered: int


_OWN = -1
POLICIES = {
    # torch/optim/adamw.py: both moments have the dtype of the parameter (zeros_like).
    "recorded": Policy(_OWN, _OWN, 2 * _OWN, _OWN),
    # MixedPrecisionPolicy(param_dtype=torch.bfloat16): shards, gradients and moments keep their
    # dtype, the gathered layers are cast.
    "mixed": Policy(_OWN, _OWN, 2 * _OWN, 2),
    # model.bfloat16(), and all of it in that dtype.
    "bfloat16": Policy(2, 2, 4, 2),
    # Rajbhandari et al., "ZeRO", 2020, section 3.1: 2 + 2 + 12 bytes. The 12 bytes are a float32
    # copy of the parameter and the two moments in float32.
    "master": Policy(2, 2, 12, 2),
}


def policy_named(name: str) -> Policy:
    """The policy of this name.

    Raises:
        ShardingError: there is no such policy.
    """
    if name not in POLICIES:
        near = candidates(name, POLICIES)
        raise ShardingError(f"--train {name}: no policy is called so; there are: {near}")
    return POLICIES[name]


def bytes_of(each: int, elements: int, recorded: int) -> int:
    """The bytes of ``elements``, by a number of a ``Policy`` and the recorded element size."""
    return elements * (each if each >= 0 else -each * recorded)


@dataclass(frozen=True, slots=True)
class Batch:
    """The batch that a rank computes at a time.

    Attributes:
        size: the sequences of a micro-batch.
        length: the tokens of a sequence.
        recompute: ``none``, ``selective`` (the attention matrices, which fused attention does not
            keep either) or ``full`` (all but the inputs of layers).
    """

    size: int
    length: int
    recompute: str = "selective"


RECOMPUTED = ("none", "selective", "full")


@dataclass(frozen=True, slots=True)
class Transformer:
    """The sizes of a model of transformer layers."""

    hidden: int
    heads: int
    layers: int
    vocabulary: int


def transformer_of(model: Any) -> Transformer:
    """The sizes in the configuration of a model.

    Raises:
        ShardingError: the model has no configuration, or the configuration lacks a size.
    """
    config: Any = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    names = ("hidden_size", "num_attention_heads", "num_hidden_layers", "vocab_size")
    sizes = [getattr(config, name, None) for name in names]
    lacking = [name for name, size in zip(names, sizes, strict=True) if not isinstance(size, int)]
    if lacking:
        raise ShardingError(
            f"--batch: {type(model).__name__}.config has no {', '.join(lacking)}, from which the "
            "activations of transformer layers are estimated: leave --batch and --sequence out"
        )
    return Transformer(*(int(size) for size in sizes if size is not None))


def activation_bytes(
    sizes: Transformer, batch: Batch, *, tensor: int, pipeline: int, sequence: bool
) -> int:
    """The activations that the first rank keeps for backward, in 16 bits.

    Korthikanti et al., "Reducing Activation Recomputation in Large Transformer Models", 2022,
    equations 1 to 6. They are for layers with attention and an MLP of four times the width. The
    first stage of a pipeline keeps as many micro-batches as there are stages (1F1B), as much as all
    layers of one micro-batch.

    Args:
        sizes: the sizes of the model.
        batch: the batch of one forward pass.
        tensor: the size of the axis of tensor parallelism.
        pipeline: the number of pipeline stages.
        sequence: whether tensor parallelism cuts norms and dropout along the sequence as well.
    """
    tokens = batch.size * batch.length * sizes.hidden
    attention = 5 * sizes.heads * batch.length / sizes.hidden
    if batch.recompute != "none":
        attention = 0.0
    cut = tensor if sequence else 1
    each = 10 / cut + (24 + attention) / tensor
    if batch.recompute == "full":
        each = 2.0 / cut
    outside = pipeline / cut  # the dropout after the embedding
    if pipeline == 1:  # the last norm and the head, with logits in 32 bits
        outside += 4 / cut + 4 * sizes.vocabulary / (sizes.hidden * tensor)
    return round(tokens * (sizes.layers * each + outside))


@dataclass(frozen=True, slots=True)
class Activations:
    """The bytes kept for backward: measured on shapes, or from a formula alone."""

    nbytes: int
    measured: bool = False


@dataclass(frozen=True, slots=True)
class Training:
    """The memory of a rank in training, in bytes.

    Attributes:
        parameters: the parameters; the policy applies to the trainable ones.
        gradients: their gradients.
        optimizer: the state of AdamW.
        gathered: the two largest layers that ``fully_shard`` gathers at a time; without it, the
            copies that autocast makes of the parameters.
        activations: the memory kept for backward; None if no batch was given.
        sharded: whether the model is sharded by FSDP.
    """

    parameters: int
    gradients: int
    optimizer: int
    gathered: int
    activations: Activations | None = None
    sharded: bool = True

    def __str__(self) -> str:
        parts = [
            f"gradients {format_bytes(self.gradients)}",
            f"AdamW {format_bytes(self.optimizer)}",
        ]
        if self.sharded or self.gathered:
            what = "gathered layers" if self.sharded else "copies by autocast"
            parts.append(f"{what} {format_bytes(self.gathered)}")
        if self.activations is not None:
            how = "" if self.activations.measured else " (by formula)"
            parts.append(f"activations about {format_bytes(self.activations.nbytes)}{how}")
        return f"parameters {format_bytes(self.parameters)}, " + ", ".join(parts)

    @property
    def total(self) -> int:
        """The sum of all."""
        held = self.parameters + self.gradients + self.optimizer + self.gathered
        return held + (self.activations.nbytes if self.activations else 0)
