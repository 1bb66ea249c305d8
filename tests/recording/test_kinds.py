"""How a call in a block is treated follows from the op, and from which tensors it is given."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import lateinit
from lateinit._recording.kinds import Kind, classify
from lateinit._recording.recorder import Recorder
from lateinit._torch import META, by_name, without_functions

# W and I are deferred, float and integer; R and N are real; M is on meta, as the constructor asked.
W, I, R, N, M = "WIRNM"  # noqa: E741
STORAGE = "storage of R"
OWN = "storage of I"
GENERATOR = torch.Generator()

TABLE: list[tuple[str, tuple[Any, ...], dict[str, Any], Kind]] = [
    ("zero_", (W,), {}, Kind.FILL),
    ("fill_.Scalar", (W, 2.0), {}, Kind.FILL),
    ("uniform_", (W,), {}, Kind.FILL),
    ("normal_", (W, 0.0, 1.0), {"generator": GENERATOR}, Kind.FILL),
    ("bernoulli_.float", (W, 0.5), {}, Kind.FILL),
    ("fill_.Scalar", (I, 2), {}, Kind.RECORD),  # its kernel may refuse the number
    ("fill_.Tensor", (W, W), {}, Kind.RECORD),
    ("copy_", (W, W), {}, Kind.RECORD),
    ("copy_", (W, R), {}, Kind.RECORD),
    ("zero_", (R,), {}, Kind.REAL),
    ("zero_", (M,), {}, Kind.ON_META),
    ("uniform_", (R,), {}, Kind.REAL),
    ("rand", ((3,),), {}, Kind.DRAWN),
    ("randn", ((3,),), {"device": META}, Kind.DRAWN),
    ("randint.low", (1, 5, (3,)), {}, Kind.DRAWN),
    ("rand_like", (W,), {}, Kind.DRAWN),
    ("rand_like", (R,), {}, Kind.DRAWN),
    ("randperm", (5,), {}, Kind.RECORD),
    ("set_.source_Tensor", (R, W), {}, Kind.SHOW),
    ("set_.source_Tensor", (W, I), {}, Kind.RECORD),
    ("set_.source_Tensor", (R, N), {}, Kind.REAL),
    ("set_.source_Storage", (W, STORAGE), {}, Kind.SET_STORAGE),
    ("set_.source_Storage_storage_offset", (W, STORAGE, 0, (1,), (1,)), {}, Kind.SET_STORAGE),
    ("set_.source_Storage", (W, OWN), {}, Kind.RECORD),
    ("empty.memory_format", ((3,),), {"device": META}, Kind.ON_META),
    ("add.Tensor", (M, M), {}, Kind.ON_META),
    ("add.Tensor", (M, R), {}, Kind.ON_META),
    ("add.Tensor", (W, M), {}, Kind.MIXED),
    ("cat", ([W, M],), {}, Kind.MIXED),
    ("add.Tensor", (R, R), {}, Kind.REAL),
    ("empty_like", (R,), {}, Kind.REAL),
    ("lift_fresh", (R,), {}, Kind.REAL),
    ("_local_scalar_dense", (R,), {}, Kind.REAL),
    ("_local_scalar_dense", (W,), {}, Kind.READ),
    ("equal", (W, R), {}, Kind.READ),
    ("equal", (W, W), {}, Kind.READ),
    ("copy_", (R, W), {}, Kind.LEAVE),
    ("mul_.Tensor", (R, W), {}, Kind.LEAVE),
    ("add.out", (W, W), {"out": R}, Kind.LEAVE),
    ("add.out", (R, R), {"out": W}, Kind.RECORD),
    ("empty.memory_format", ((3,),), {}, Kind.RECORD),
    ("zeros", ((3,),), {}, Kind.RECORD),
    ("arange", (3,), {}, Kind.RECORD),
    ("add.Tensor", (W, W), {}, Kind.RECORD),
    ("add.Tensor", (W, R), {}, Kind.RECORD),
    ("add_.Tensor", (W, R), {}, Kind.RECORD),
    ("view", (W, (-1,)), {}, Kind.RECORD),
    ("cat", ([W, R],), {}, Kind.RECORD),
]


def given(value: Any, tensors: dict[str, Any]) -> Any:
    if isinstance(value, (list, tuple)):
        return type(value)(given(item, tensors) for item in value)
    if isinstance(value, dict):
        return {key: given(item, tensors) for key, item in value.items()}
    return tensors.get(value, value) if isinstance(value, str) else value


@pytest.mark.parametrize(("op", "args", "kwargs", "kind"), TABLE)
def test_a_call_is_of_a_kind(op: str, args: Any, kwargs: Any, kind: Kind) -> None:
    tensors: dict[str, Any] = {R: torch.ones(3), N: torch.ones(3)}
    with lateinit.deferred():
        tensors |= {W: torch.ones(3), I: torch.ones(3, dtype=torch.int64)}
        tensors[M] = torch.empty(3, device="meta")
        tensors[STORAGE] = tensors[R].untyped_storage()
        # As at the dispatcher, where a deferred tensor says that it is on meta.
        with without_functions():
            tensors[OWN] = tensors[I].untyped_storage()
            info = by_name(f"aten::{op}")
            call = classify(info, given(args, tensors), given(kwargs, tensors))
    assert call.kind is kind


def test_what_is_recorded_is_given_its_deferred_tensors_and_what_leaves_its_real_ones() -> None:
    real = torch.ones(3)
    with lateinit.deferred():
        late = torch.ones(3)
        with without_functions():
            call = classify(by_name("aten::cat"), ([late, real, late],), {})
    assert [id(t) for t in call.deferred] == [id(late)] * 2
    assert [id(t) for t in call.real] == [id(real)]


def test_every_kind_is_in_the_table_and_has_a_treatment() -> None:
    assert {row[-1] for row in TABLE} == set(Kind) == set(Recorder._TREAT)


def test_an_op_with_a_wrong_mixture_says_so() -> None:
    def build() -> Tensor:
        return torch.ones(3) + torch.empty(3, device="meta")

    with pytest.raises(lateinit.errors.RecordingError, match="the constructor put on meta"):
        lateinit.deferred_init(build)
