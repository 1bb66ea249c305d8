"""A sample of a kernel is the same wherever the kernel is, and no other kernel's."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
import torch
from torch import nn

import lateinit
from lateinit._replay import needed_for, one_thread, sample_of
from lateinit._tensors import Deferred
from tests.support.processes import ROOT

if TYPE_CHECKING:
    from collections.abc import Callable

    from lateinit._program import Program


class Holder(nn.Module):
    """Keeps a tensor that a function makes."""

    def __init__(self, make: Callable[[], torch.Tensor]) -> None:
        super().__init__()
        self.register_buffer("kept", make())


def program_of(make: Callable[[], torch.Tensor]) -> tuple[Program, int]:
    deferred = Deferred.of(lateinit.deferred_init(Holder, make).kept)
    return deferred.program, deferred.ref.storage


def samples(make: Callable[[], torch.Tensor]) -> dict[str, str]:
    program, storage = program_of(make)
    found: dict[str, str] = {}
    with one_thread:
        for number in sorted(needed_for(program, [storage])):
            found.update(sample_of(program, program.ops[number]))
    return found


def orthogonal() -> torch.Tensor:
    return nn.init.orthogonal_(torch.empty(300, 200))


def truncated() -> torch.Tensor:
    return nn.init.trunc_normal_(torch.empty(70, 30), std=0.02)


KERNELS: dict[str, Callable[[], torch.Tensor]] = {
    "arange.start_step in float32": lambda: torch.arange(0, 4096.0, 2),
    "cauchy_ in float32": lambda: torch.empty(5000).cauchy_(),
    "convolution in float32": lambda: torch.conv1d(torch.rand(2, 3, 900), torch.rand(3, 3, 5)),
    "bernoulli_.float in float32": lambda: torch.dropout(torch.ones(900), 0.5, True),
    "erfinv_ in float64": lambda: torch.full((700,), 0.3, dtype=torch.float64).erfinv_(),
    "linalg_qr in float32": orthogonal,
    "linspace in float32": lambda: torch.linspace(0, 1, 999),
    "mm in float32": lambda: torch.rand(900, 70) @ torch.rand(70, 50),
    "mul.Tensor in int64, float32": lambda: torch.arange(900) * torch.rand(900),
    "normal_ in bfloat16": lambda: torch.empty(900, dtype=torch.bfloat16).normal_(),
    "randperm in int64": lambda: torch.randperm(900),
    "sin in complex64": lambda: torch.full((900,), 1j).sin(),
    "uniform_ in float32": lambda: torch.rand(900),
}


@pytest.mark.parametrize("kernel", KERNELS)
def test_kernels_are_sampled(kernel: str) -> None:
    found = samples(KERNELS[kernel])
    assert kernel in found, found
    assert samples(KERNELS[kernel]) == found


def test_a_truncated_normal_is_drawn_by_the_kernel_of_a_normal() -> None:
    normal = samples(lambda: torch.randn(900))["normal_ in float32"]
    assert normal in samples(truncated).values()


def test_sampling_moves_no_generator_and_gives_nothing_its_values() -> None:
    make = KERNELS["bernoulli_.float in float32"]
    program, storage = program_of(make)
    before = torch.get_rng_state()
    with one_thread:
        for number in needed_for(program, [storage]):
            sample_of(program, program.ops[number])
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.get_default_dtype() is torch.float32


def test_numbers_and_settings_make_another_sample() -> None:
    def scaled(by: float) -> dict[str, str]:
        return samples(lambda: torch.ones(900).mul_(by))

    assert scaled(0.3)["mul_.Tensor in float32"] != scaled(0.4)["mul_.Tensor in float32"]


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.empty(900),
        lambda: torch.rand(50, 900)[torch.tensor([49, 3])],
        lambda: torch.embedding(torch.rand(50, 900), torch.arange(50)),
    ],
    ids=["empty", "index", "embedding"],
)
def test_what_cannot_be_sampled_is_left_out(make: Callable[[], torch.Tensor]) -> None:
    assert not {"empty", "index", "embedding"} & {name.split(".")[0] for name in samples(make)}


def told() -> None:
    for make in (orthogonal, lambda: torch.randn(900)):
        for name, sample in sorted(samples(make).items()):
            sys.stdout.write(f"{name}: {sample}\n")


@pytest.mark.parametrize("capability", ["", "default"])
def test_other_processes_agree_if_their_kernels_do(capability: str) -> None:
    program = "from tests.replay.test_samples import told; told()"
    setting = {"ATEN_CPU_CAPABILITY": capability} if capability else {}
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env={**os.environ, **setting, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=True,
    )
    there = dict(line.split(": ") for line in done.stdout.splitlines())
    here = samples(orthogonal) | samples(lambda: torch.randn(900))
    vectors = torch.backends.cpu.get_cpu_capability() != "DEFAULT"
    assert (there != here) == (capability == "default" and vectors)
