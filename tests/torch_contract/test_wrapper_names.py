"""What torch's wrappers put into the names of parameters."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import FullyShardedDataParallel

from lateinit._torch import without_wrappers
from tests.sharding.alone import alone_as


# Importing the compiler warns of what is deprecated in it.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_names_that_wrappers_add_are_known() -> None:
    """torch/_dynamo/eval_frame.py, checkpoint_wrapper.py and fsdp/_common_utils.py."""
    with alone_as(0, 2):
        sharded = FullyShardedDataParallel(
            nn.Linear(2, 2), use_orig_params=True, device_id=torch.device("cpu")
        )
        wrapped = (torch.compile(nn.Linear(2, 2)), checkpoint_wrapper(nn.Linear(2, 2)), sharded)
        for wrapper in wrapped:
            names = [name for name, _ in nn.Sequential(wrapper).named_parameters()]
            assert names != ["0.weight", "0.bias"]
            assert [without_wrappers(name) for name in names] == ["0.weight", "0.bias"]
