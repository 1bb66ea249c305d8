"""skip_init: parameters are allocated, and all other tensors have their true values."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

import lateinit
from tests.support.building import SEED, eager, models
from tests.support.snapshots import snapshot, tensors_of

if TYPE_CHECKING:
    from tests.support.cases import Case


class Holder(nn.Module):
    def __init__(self, case: Case) -> None:
        super().__init__()
        self.held = case.build()


@models()
def test_skip_init_keeps_true_buffers(case: Case) -> None:
    expected = snapshot(eager(case))
    torch.manual_seed(SEED)
    model = lateinit.skip_init(Holder, case).held
    assert not lateinit.is_deferred(model)
    found = snapshot(model)
    assert found.tensors.keys() == expected.tensors.keys()
    parameters = {
        expected.tensors[path].storage
        for path, tensor in tensors_of(model)
        if isinstance(tensor, nn.Parameter)
    }
    for path, fact in expected.tensors.items():
        other = found.tensors[path]
        assert (other.shape, other.dtype, other.stride) == (fact.shape, fact.dtype, fact.stride)
        assert (other.storage, other.object) == (fact.storage, fact.object)
        if fact.storage not in parameters:
            assert other.bits == fact.bits, path
