"""Devices' numbers and their generators."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lateinit._torch.devices import (
    CPU,
    GROUPING,
    default_generator,
    device_number,
    device_of_result,
    generator_key,
    group_tensors,
)
from lateinit.errors import RecordingError
from tests.torch_contract.listeners import Operators


def test_the_cpu_has_no_number_unless_it_is_given_one() -> None:
    """c10/core/Device.h: the index is -1, None in Python, where it was not given."""
    assert torch.ones(1).device == CPU
    assert CPU.index is None
    assert torch.device("cpu", 0) != CPU  # hence also ``device.type == "cpu"``
    assert default_generator(torch.device("cpu", 0)) is torch.default_generator


def test_a_cuda_device_without_a_number_is_the_current_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch/cuda/__init__.py: current_device() is what ``cuda`` without a number means."""
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    assert torch.device("cuda").index is None
    assert device_number(torch.device("cuda")) == 3
    assert device_number(torch.device("cuda", 1)) == 1


def test_random_ops_draw_from_the_default_generator_that_the_seed_sets() -> None:
    """torch/random.py: manual_seed seeds default_generator, which ops draw from unless told."""
    generator = default_generator(CPU)
    assert generator is torch.default_generator
    before = generator.get_state()
    try:
        torch.manual_seed(5)
        expected = torch.rand(3)
        generator.manual_seed(5)
        assert torch.equal(torch.rand(3), expected)
        drawn = generator.get_state()
        torch.rand(3)
        assert not torch.equal(generator.get_state(), drawn)
    finally:
        generator.set_state(before)


def test_meta_has_no_generator() -> None:
    """aten/src/ATen/DeviceAccelerator.h: no default generator of a device that is not there."""
    with pytest.raises(RecordingError, match="meta"):
        default_generator(torch.device("meta"))
    with pytest.raises(RuntimeError, match="META"):
        torch.Generator("meta")


@pytest.mark.cuda
def test_a_cuda_device_s_generators_are_in_a_row() -> None:
    """torch/cuda/__init__.py: default_generators is filled by init(), by device number."""
    generator = default_generator(torch.device("cuda", 0))
    assert generator is torch.cuda.default_generators[0]
    assert generator.device == torch.device("cuda", 0)


def test_an_operator_is_given_another_object_of_the_same_generator() -> None:
    """torch/csrc/Generator.cpp: _cdata is the address of the GeneratorImpl, which objects wrap."""
    generator = torch.Generator()
    key = generator_key(generator)
    with Operators() as mode:
        torch.randn(2, generator=generator)
    (given,) = (kwargs["generator"] for kwargs in mode.given)
    assert given is not generator
    assert generator_key(given) == key
    assert generator_key(torch.Generator()) != key


def test_a_cpu_tensor_has_no_device_number() -> None:
    """c10/core/TensorImpl.cpp: whatever number was asked for."""
    for asked in ("cpu", "cpu:0", torch.device("cpu", 0)):
        assert torch.ones(1, device=asked).device == device_of_result(asked) == CPU
    assert device_of_result("cuda:1") == torch.device("cuda", 1)


def test_tensors_are_grouped_by_a_function_that_is_looked_up_at_each_call(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """torch/utils/_foreach_utils.py: _group_tensors_by_device_and_dtype."""
    first, second = torch.zeros(2), torch.zeros(2, dtype=torch.float64)
    lists = [[first, second], [second, first]]
    one, places = group_tensors(lists, True)[first.device, first.dtype]
    assert one[0][0] is first
    assert one[1][0] is second
    assert places == [0]
    assert group_tensors(lists, False)[first.device, first.dtype][1] == []
    asked: list[Any] = []
    monkeypatch.setattr(*GROUPING, lambda *given: asked.append(given) or {})
    parameter = torch.nn.Parameter(first)
    parameter.grad = first
    torch.nn.utils.clip_grads_with_norm_([parameter], 1.0, torch.ones(()))
    assert asked
