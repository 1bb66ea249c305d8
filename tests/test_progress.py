"""What a command shows while it works: nothing at first, then a bar for each thing it does."""

from __future__ import annotations

import io
import sys
from typing import TYPE_CHECKING

import pytest
from torch import nn

import lateinit
from lateinit import _progress
from lateinit._progress import Progress, Working

if TYPE_CHECKING:
    from pathlib import Path


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def a_terminal(monkeypatch: pytest.MonkeyPatch, patience: float = 0) -> Terminal:
    """Make stderr one, and commands show what they do so soon."""
    monkeypatch.setattr(_progress, "_PATIENCE", patience)
    made = Terminal()
    monkeypatch.setattr(sys, "stderr", made)
    monkeypatch.setenv("TERM", "xterm")
    return made


def until_shown(working: Working) -> None:
    working._start.join()
    assert working._bars.live.is_started


def test_a_command_that_takes_long_shows_everything_it_calls(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    terminal = a_terminal(monkeypatch)
    model = lateinit.deferred_init(nn.Linear, 30, 10)
    with (working := Working()):
        until_shown(working)
        lateinit.save_checkpoint(model, tmp_path / "a.safetensors")
        lateinit.load_checkpoint(model, tmp_path / "a.safetensors")
        with Progress("record", None) as bar:
            bar.advance(1)
            working._bars.refresh()
    for what in ("write", "load", "record"):
        assert what in terminal.getvalue()
    assert "/?" not in terminal.getvalue()


def test_a_short_command_shows_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = a_terminal(monkeypatch, patience=60)
    with Working(), Progress("record", None), Progress("write", 10) as bar:
        bar.advance(10)
    assert terminal.getvalue() == ""


def test_nothing_is_shown_where_stderr_is_no_terminal(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(_progress, "_PATIENCE", 0)
    with (working := Working()), Progress("record", None):
        assert working._bars is None
    assert capfd.readouterr() == ("", "")


def test_a_bar_that_was_asked_for_joins_those_of_the_command(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    a_terminal(monkeypatch)
    with (working := Working()), Progress("write", 10, shown=True):
        assert [task.description for task in working._bars.tasks] == ["write"]
    assert not working._bars.tasks
    assert _progress._of_command is None


def test_an_error_ends_what_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    a_terminal(monkeypatch)
    working = Working()

    def failing() -> None:
        with working, Progress("write", 10):
            until_shown(working)
            raise KeyError("x")

    with pytest.raises(KeyError, match="x"):
        failing()
    assert not working._bars.live.is_started
    assert _progress._of_command is None


def test_what_is_printed_to_a_pipe_is_not_sent_to_the_terminal(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pipe = io.StringIO()
    monkeypatch.setattr(sys, "stdout", pipe)
    a_terminal(monkeypatch)
    with (working := Working()):
        until_shown(working)
        print("an answer")  # noqa: T201
    assert pipe.getvalue() == "an answer\n"
