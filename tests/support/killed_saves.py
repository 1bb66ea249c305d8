"""A script: kill a save before each of its steps in turn, look at what is left, and continue it.

    python -m tests.support.killed_saves FOLDER folder|file|replace|two-renames

Each save runs in a forked process of its own, so that torch is imported once.
"""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

import lateinit
from lateinit._checkpoint.save import atomic_output
from lateinit._checkpoint.save.safetensors_writer import SafetensorsWriter
from lateinit.errors import OutputExistsError

if TYPE_CHECKING:
    from collections.abc import Callable


def model(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    with lateinit.deferred():
        made = nn.Sequential(*[nn.Linear(16, 16) for _ in range(2)])
        made[1].weight = made[0].weight
    return made


def die_at(last: int, target: Path) -> None:
    """Arm the process: it is killed before its step of this number.

    A step is a write to the checkpoint, which is torn, or whatever Python does to a file or a
    folder beside the output: it opens, makes, renames or removes it, or is about to call into C.
    """
    steps = itertools.count()

    def step(tear: Callable[[], None] = lambda: None) -> None:
        if next(steps) == last:
            tear()
            os.kill(os.getpid(), signal.SIGKILL)

    def hook(event: str, details: tuple[Any, ...]) -> None:
        if event == "open" and str(details[0]).startswith(str(target)):
            os._exit(3)  # the output itself must not be written to
        paths = [str(d) for d in details if isinstance(d, (str, bytes, Path))]
        below = any(str(target.parent) in path for path in paths)
        if (below and event.startswith(("open", "os.", "shutil."))) or event == "ctypes.dlsym":
            step()

    put = SafetensorsWriter._put

    def torn_put(writer: SafetensorsWriter, data: bytes) -> None:
        def tear() -> None:
            writer._file.write(data[: len(data) // 2])
            writer._file.flush()

        step(tear)
        put(writer, data)

    SafetensorsWriter._put = torn_put  # type: ignore[method-assign]
    sys.addaudithook(hook)


def in_a_child(call: Callable[[], Any]) -> bool:
    """Run a call in a process of its own; False if it was killed."""
    child = os.fork()
    if child == 0:
        try:
            call()
        except BaseException:  # noqa: BLE001 - the child must not return
            sys.excepthook(*sys.exc_info())
            os._exit(1)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return False
    assert os.WEXITSTATUS(status) == 0
    return True


def content(path: Path) -> dict[str, bytes] | bytes | None:
    if path.is_dir():
        return {file.name: file.read_bytes() for file in sorted(path.iterdir())}
    return path.read_bytes() if path.exists() else None


def save(target: Path, seed: int = 0, **options: bool) -> None:
    lateinit.save_checkpoint(model(seed), target, max_shard_size="1050B", **options)


def start_afresh(target: Path, old: Any) -> None:
    """Leave what there was before, a folder with the files of ``old``, or nothing."""
    for path in target.parent.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    if old is not None:
        target.mkdir()
        for name, data in old.items():
            (target / name).write_bytes(data)


def continue_it(target: Path, new: Any, force: bool) -> None:
    try:
        save(target, resume=True, force=force)
    except OutputExistsError:
        assert content(target) == new, "refused to continue what is not complete"


def main(folder: Path, scenario: str) -> None:
    torch.set_num_threads(1)
    target = folder / ("model.safetensors" if scenario == "file" else "model")
    force = scenario in ("replace", "two-renames")
    if scenario == "two-renames":  # a system that cannot exchange two folders in one step
        atomic_output.ctypes = SimpleNamespace(CDLL=lambda *_, **__: SimpleNamespace())
    in_a_child(lambda: save(target))
    new = content(target)
    old = None
    if force:
        in_a_child(lambda: save(target, seed=1, force=True))
        old = content(target)
        assert old != new
    seen = set()
    for step in itertools.count():
        start_afresh(target, old)
        finished = in_a_child(lambda: (die_at(step, target), save(target, force=force)))  # noqa: B023
        left = content(target)
        absent = left is None and scenario == "two-renames"
        assert left in (old, new) or absent, f"a torn output, killed at step {step}"
        if finished:
            break
        seen.add(left == new)
        in_a_child(lambda: continue_it(target, new, force))
        assert content(target) == new, f"killed at step {step} and continued: other bytes"
    assert seen == {True, False}, "no step was on the other side of the rename"
    assert not list(folder.glob(".*")), "something was left behind"
    sys.stdout.write(f"{step} steps\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
