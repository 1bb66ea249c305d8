"""What holds for every test: no mode, default or context outlives it."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import hypothesis
import pytest
import torch
from torch.overrides import _get_current_function_mode_stack
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

if TYPE_CHECKING:
    from collections.abc import Iterator

# CI draws the same examples each time; a person's run looks for new ones.
hypothesis.settings.register_profile("ci", deadline=None, derandomize=True)
hypothesis.settings.register_profile("dev", deadline=None, print_blob=True)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "dev")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("cuda"):
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


def ambience() -> tuple[object, ...]:
    return (
        torch.get_default_dtype(),
        torch.get_default_device(),
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.are_deterministic_algorithms_enabled(),
        _get_current_dispatch_mode_stack(),
        _get_current_function_mode_stack(),
    )


@pytest.fixture(autouse=True)
def nothing_left_behind() -> Iterator[None]:
    before = ambience()
    yield
    assert ambience() == before


@pytest.fixture
def fresh_memory_of_nan() -> Iterator[None]:
    torch.use_deterministic_algorithms(mode=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(mode=False)
