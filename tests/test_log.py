"""The logger ``lateinit``: what each call did, and silence unless it is asked for."""

from __future__ import annotations

import logging
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
import torch
from torch import nn

import lateinit

if TYPE_CHECKING:
    from pathlib import Path


def test_each_call_says_what_it_did(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    caplog.set_level(logging.INFO, "lateinit")
    with lateinit.deferred():
        model = nn.Sequential(lateinit.nn.LazyLinear(3), nn.Linear(3, 2))
    lateinit.infer_shapes(model, torch.ones(1, 4))
    lateinit.save_checkpoint(model, tmp_path / "a.safetensors")
    lateinit.materialize(model)
    lateinit.materialize(model)
    lateinit.load_checkpoint(model, tmp_path / "a.safetensors")
    said = [record.getMessage() for record in caplog.records if record.levelno == logging.INFO]
    for number, begin in enumerate(
        (
            "recorded ",
            "inferred the shapes of 1 lazy",
            "saved ",
            "materialised 4 storages, 92 bytes",
        )
    ):
        assert said[number].startswith(begin), said
    assert said[-1] == f"{tmp_path / 'a.safetensors'}: 4 tensors loaded, 0 initialised, 0 computed"
    assert len(said) == 5
    assert {record.name for record in caplog.records} == {"lateinit"}


def test_plans_are_for_debugging(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "lateinit")
    lateinit.materialize(lateinit.deferred_init(nn.Linear, 2, 2))
    (plan,) = [r.getMessage() for r in caplog.records if r.levelno == logging.DEBUG]
    assert plan.startswith("2 steps, ")
    assert "-> weight" in plan


def test_a_block_that_fails_says_so(caplog: pytest.LogCaptureFixture) -> None:
    def failing() -> None:
        nn.Linear(2, 2)
        raise KeyError("x")

    caplog.set_level(logging.INFO, "lateinit")
    with pytest.raises(KeyError, match="x"):
        lateinit.deferred_init(failing)
    assert [record.getMessage()[:14] for record in caplog.records] == ["gave up after "]


def test_nothing_is_shown_unless_logging_is_set_up() -> None:
    call = "lateinit.materialize(lateinit.deferred_init(torch.nn.Linear, 2, 2))"
    script = f"import torch, lateinit; {call}"
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)
    assert (done.stdout, done.stderr) == (b"", b"")
