"""Uses of the public face, for type checkers alone: an error is expected at each `# wrong`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

import lateinit

if TYPE_CHECKING:
    from typing_extensions import assert_type


class Block(nn.Module):
    def __init__(self, width: int, name: str = "") -> None:
        super().__init__()


def build(depth: int, *, wide: bool = False) -> nn.Sequential:
    return nn.Sequential()


assert_type(lateinit.deferred_init(build, 3, wide=True), nn.Sequential)
assert_type(lateinit.deferred_init(Block, 3), Block)
assert_type(lateinit.deferred_init(nn.Linear, 3, 2, bias=False), nn.Linear)
lateinit.deferred_init(build)  # wrong
lateinit.deferred_init(build, "3")  # wrong
lateinit.deferred_init(build, 3, wild=True)  # wrong
lateinit.deferred_init(Block, 3, 4)  # wrong
lateinit.deferred_init(nn.Linear, 3)  # wrong
lateinit.deferred_init(3)  # wrong

assert_type(lateinit.skip_init(Block, 3), Block)
assert_type(lateinit.skip_init(Block, 3, device="cpu"), Block)
assert_type(lateinit.skip_init(nn.Linear, 3, 2, device="cpu"), nn.Linear)
lateinit.skip_init(Block)  # wrong
lateinit.skip_init(Block, "3")  # wrong
lateinit.skip_init(Block, 3, names="x")  # wrong
lateinit.skip_init(nn.Linear, 3, "x", bios=True)  # wrong
lateinit.skip_init(Block, 3, device=1.5)  # wrong

lateinit.nn.LazyLinear(3, bias=False, dtype=torch.float64)
lateinit.nn.LazyLinear()  # wrong
lateinit.nn.LazyLinear("3")  # wrong
lateinit.nn.LazyLinear(3, bios=True)  # wrong
lateinit.nn.LazyConv2d(8, 3, padding=1, padding_mode="zeros")
lateinit.nn.LazyConv2d(8)  # wrong
lateinit.nn.LazyConv2d(8, 3, padding_mode="zero")  # wrong
lateinit.nn.LazyLSTM(8, num_layers=2, batch_first=True)
lateinit.nn.LazyLSTM(input_size="8")  # wrong
lateinit.nn.LazyLayerNorm(1e-6)
lateinit.nn.LazyLayerNorm(eps="small")  # wrong
lateinit.nn.LazyMultiheadAttention(4, batch_first=True)
lateinit.nn.LazyMultiheadAttention()  # wrong
unknown = lateinit.nn.LazyNothing  # wrong
as_torch: nn.LazyLinear = lateinit.nn.LazyLinear(3)
as_plain: nn.LSTM = lateinit.nn.LazyLSTM(3)
as_other: nn.LSTM = lateinit.nn.LazyGRU(3)  # wrong

LazyBlock = lateinit.lazy(Block, width=lateinit.size(-1))
assert_type(LazyBlock(name="x"), Block)
lateinit.lazy(Block, width=lambda x: x.shape[-1])
lateinit.lazy(Block, width=3)  # wrong
lateinit.lazy(build, depth=lateinit.size(-1))  # wrong
lateinit.size("last")  # wrong

assert_type(lateinit.materialize(Block(3)), Block)
lateinit.materialize(Block(3), progress="yes")  # wrong
lateinit.materialise(Block(3))  # wrong
lateinit.summary(Block(3)).rows[0].name.upper()
print(lateinit.plan(Block(3)).nbytes + 1)  # noqa: T201
