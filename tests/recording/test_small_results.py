"""What a small kernel gives is recorded as it lies, and imports nothing."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
import torch

import lateinit
from lateinit._recording.small_results import layouts_of_small
from lateinit._torch import META, by_name

if TYPE_CHECKING:
    from collections.abc import Callable


def ramp(*shape: int) -> torch.Tensor:
    return torch.rand(*shape) + 0.5


CALLS: dict[str, Callable[[], torch.Tensor]] = {
    "a number minus a tensor": lambda: 1 - torch.tensor(0.3),
    "a power": lambda: 2.0 ** (torch.arange(5) - 2),
    "integers over integers": lambda: torch.arange(5) // torch.arange(1, 6),
    "a norm": lambda: ramp(6, 4).norm(dim=1, keepdim=True),
    "distances": lambda: torch.cdist(ramp(7, 2), ramp(5, 2)),
    "a sum in half": lambda: ramp(3, 5).half().sum(0),
    "linspace": lambda: torch.linspace(-1, 1, 12),
    "the identity": lambda: torch.eye(7),
    "a table": lambda: torch.outer(torch.arange(7.0), 1 / 10 ** (torch.arange(0, 8, 2) / 8)),
    "broadcast": lambda: ramp(3, 1).expand(3, 5) * ramp(5),
    "transposed": lambda: ramp(3, 5).T.exp() + 0,
    "dims of length one": lambda: ramp(1, 3, 1).transpose(0, 2).neg(),
    "no elements": lambda: ramp(0, 3).exp(),
    "complex": lambda: torch.polar(ramp(4), ramp(4)).conj().abs(),
    "negative bit": lambda: torch.polar(ramp(4), ramp(4)).conj().imag.exp() + 0,
    "itself": lambda: torch.ops.aten.conj_physical(ramp(4)).mul_(2),
    "an inverse": lambda: torch.linalg.inv(ramp(4, 4) + 4 * torch.eye(4)),
    "singular vectors, in place": lambda: torch.linalg.svd(ramp(4, 4))[2].contiguous().mul_(2),
    "a mask": lambda: torch.masked_select(ramp(9), ramp(9) > 1),
    "where": lambda: torch.where(torch.arange(4) > 1, ramp(4), ramp(4, 4)),
    "padding": lambda: torch.nn.functional.pad(ramp(3, 3), (1, 2)),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=list(CALLS))
def test_a_small_result_has_the_layout_and_bits_that_it_has_eagerly(
    call: Callable[[], torch.Tensor],
) -> None:
    torch.manual_seed(0)
    expected = call()
    torch.manual_seed(0)
    with lateinit.deferred():
        found = call()
        recorded = found.size(), found.stride(), found.dtype
    assert recorded == (expected.size(), expected.stride(), expected.dtype)
    assert torch.equal(lateinit.materialize(found), expected)
    assert found.stride() == expected.stride()


@pytest.mark.parametrize(
    ("name", "shapes", "numbers"),
    [
        ("aten::mul.Tensor", [(300, 1), (1, 300)], ()),
        ("aten::mm", [(300, 1), (1, 300)], ()),
        ("aten::repeat", [(3,)], ([300, 300],)),
        ("aten::eye", [], (300,)),
        ("aten::arange", [], (10.0**6,)),
        ("aten::arange.start_step", [], (0, 1, 1e-6)),
    ],
)
def test_a_result_that_may_be_large_is_left_to_meta(
    name: str, shapes: list[tuple[int, ...]], numbers: tuple[object, ...]
) -> None:
    tensors = [torch.empty(shape, device=META) for shape in shapes]
    assert layouts_of_small(by_name(name), (*tensors, *numbers), {}) is None


@pytest.mark.parametrize("name", ["aten::nonzero", "aten::_unique2", "aten::bernoulli"])
def test_a_layout_that_depends_on_values_is_left_to_meta(name: str) -> None:
    assert layouts_of_small(by_name(name), (torch.empty(3, device=META),), {}) is None


_NOTHING_IMPORTED = """
import sys, torch, lateinit
from benchmarks.small_modules import MODELS, compiled
compiled()
for name in sorted(MODELS):
    lateinit.materialize(lateinit.deferred_init(MODELS[name], 3))
assert "torch._dynamo" not in sys.modules, "the compiler"
assert "sympy" not in sys.modules, "sympy"
"""


def test_small_constructors_that_compute_import_neither_the_compiler_nor_sympy() -> None:
    command = [sys.executable, "-W", "ignore", "-c", _NOTHING_IMPORTED]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
