"""Run Python in a process of its own that does not wait for torch to be imported.

Most of the time of a small script is torch's import. A server, one for each test worker, has torch
and lateinit imported and nothing else done; each script runs in a fork of it. What tests imports,
memory or other settings of the environment needs a fresh interpreter instead.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
import traceback
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from collections.abc import Mapping
    from multiprocessing.context import ForkServerProcess

ROOT = Path(__file__).parents[2]
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["tests.support.preloaded"])


def start(
    command: list[str],
    output: Path,
    errors: Path,
    *,
    cwd: Path = ROOT,
    env: Mapping[str, str] | None = None,
) -> ForkServerProcess:
    """Start what ``python *command`` would run: a script, or ``-m`` and a module.

    Args:
        command: the arguments of Python.
        output: the file that stdout goes to.
        errors: the file that stderr goes to; it may be the same.
        cwd: the folder that it runs in.
        env: its environment; by default this one.
    """
    given = dict(os.environ if env is None else env)
    places = str(output), str(errors), str(cwd)
    process = _context.Process(target=_run, args=(command, *places, given))
    process.start()
    return process


def run(
    command: list[str],
    *,
    cwd: Path = ROOT,
    env: Mapping[str, str] | None = None,
    timeout: float = 300,
) -> subprocess.CompletedProcess[str]:
    """Run it to its end, as ``subprocess.run`` does that captures text and does not check."""
    with tempfile.TemporaryDirectory() as folder:
        output, errors = Path(folder) / "output", Path(folder) / "errors"
        process = start(command, output, errors, cwd=cwd, env=env)
        process.join(timeout)
        if process.is_alive():
            process.kill()
            process.join()
            raise subprocess.TimeoutExpired(command, timeout, output.read_text())
        told = output.read_text(), errors.read_text()
    return subprocess.CompletedProcess(command, process.exitcode or 0, *told)


def _run(command: list[str], output: str, errors: str, cwd: str, env: dict[str, str]) -> None:
    Path(output).write_text("")
    Path(errors).write_text("")
    for number, path in ((1, output), (2, errors)):
        file = os.open(path, os.O_WRONLY | os.O_APPEND)
        os.dup2(file, number)
        os.close(file)
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    warnings.resetwarnings()
    play(command)


def play(command: list[str]) -> NoReturn:
    """Run what ``python *command`` would run in this process, and end it without Python's own end.

    Rarely, at the end of the interpreter, a process whose checks have all passed is aborted with
    "terminate called without an active exception": a thread of C++ needs Python's lock there, and
    Python ends it (Python/ceval_gil.h: take_gil, PyThread_exit_thread). The exit status is that of
    the checks.
    """
    sys.argv[:] = command[1:] if command[0] == "-m" else command
    try:
        if command[0] == "-m":
            sys.path.insert(0, str(Path.cwd()))
            runpy.run_module(command[1], run_name="__main__", alter_sys=True)
        else:
            sys.path.insert(0, str(Path(command[0]).parent))
            runpy.run_path(command[0], run_name="__main__")
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:  # noqa: BLE001 - Python would print it, and end with 1
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    play(sys.argv[1:])
