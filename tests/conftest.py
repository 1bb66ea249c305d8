"""What holds for every test: no mode, default or context outlives it."""

from __future__ import annotations

import gc
import os
from pathlib import Path
from typing import TYPE_CHECKING

import hypothesis
import pytest
import torch
from torch.overrides import _get_current_function_mode_stack
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from lateinit import _native
from tests.support.cases import Case
from tests.support.models import REPRESENTATIVE

if TYPE_CHECKING:
    from collections.abc import Iterator

HERE = Path(__file__).parent

# Outside tests torch fills small tensors, being faster there. Here most models are small.
_native.WORTH = 16

# CI draws the same examples each time; a person's run looks for new ones.
hypothesis.settings.register_profile("ci", deadline=None, derandomize=True)
hypothesis.settings.register_profile("dev", deadline=None, print_blob=True)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "dev")


# Where the laws are tested. All of the first that is not `slow` is part of `--quick`, and of the
# others what is about a model or marked `quick`; of either, only the representative models.
LAWS = {"laws", "torch_contract"}
PARTLY = {"checkpoint", "lazy", "native"}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--quick", action="store_true", help="every law, over a dozen representative models"
    )


def place(path: Path) -> str:
    """The folder in `tests` that a path belongs to."""
    below = path.relative_to(HERE).parts if path.is_relative_to(HERE) else ()
    return below[0] if below else ""


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    left_out = place(collection_path) not in {"", *LAWS, *PARTLY}
    return True if config.getoption("--quick") and left_out else None


def is_quick(item: pytest.Item) -> bool:
    case = getattr(item, "callspec", None) and item.callspec.params.get("case")
    if isinstance(case, Case):
        return case.name in REPRESENTATIVE
    if place(item.path) in LAWS:
        return item.get_closest_marker("slow") is None
    return item.get_closest_marker("quick") is not None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--quick"):
        config.hook.pytest_deselected(items=[item for item in items if not is_quick(item)])
        items[:] = [item for item in items if is_quick(item)]
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("cuda"):
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


def pytest_collection_finish() -> None:
    """Exclude the collected tests and modules from later garbage collections, which scan all."""
    gc.collect()
    gc.freeze()


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
