"""Outputs that appear whole or not at all.

What is written goes into a hidden folder beside the output, ``.NAME.partial``, which is locked and
keeps a journal of finished files. Once all is on the disk it takes the output's place by a rename.
A killed process leaves the folder, so that another can continue.

    .NAME.partial/lock       held by the process that writes
    .NAME.partial/journal    what is being written, then a line for each finished file
    .NAME.partial/files/     what takes the output's place
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import json
import os
import shutil
import zlib
from collections.abc import Iterator
from pathlib import Path

from lateinit._units import format_bytes
from lateinit.errors import CheckpointError, OutputError, OutputExistsError, listing

_OURS = ("*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json")


class Stage:
    """The hidden folder in which one output grows. Made by ``staged``."""

    def __init__(self, target: Path) -> None:
        self.target = target
        self.folder = target.parent / f".{target.name}.partial"
        self.files = self.folder / "files"
        self.finished: dict[str, str] = {}  # file name: checksum
        self._journal = self.folder / "journal"
        self._lock = -1

    # -- opening and closing -------------------------------------------------------------------

    def open(self, request: str, *, resume: bool, force: bool) -> None:
        """Make the folder, or take over what a killed process left of the same request."""
        left = self.folder.exists()
        if left and not (resume or force):
            raise OutputExistsError(
                f"an unfinished save of {self.target} was left behind: continue it with "
                "resume=True (--resume), or start again with force=True (--force)"
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        self._take_lock()
        try:
            if left and resume:
                self._read_journal(request)
            if not self.finished:
                self._begin(request)
        except OSError:
            if not left:
                self.discard()
            raise

    def _begin(self, request: str) -> None:
        shutil.rmtree(self.files, ignore_errors=True)
        self.files.mkdir()
        self._journal.write_text(json.dumps({"request": request}) + "\n")

    def _take_lock(self) -> None:
        self._lock = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self.release()
            raise OutputExistsError(
                f"another process is writing {self.target} now: wait for it, or choose another path"
            ) from error

    def _read_journal(self, request: str) -> None:
        """Trust the finished files of an earlier process, if it wrote the same thing."""
        try:
            lines = self._journal.read_text().splitlines()
            entries = [json.loads(line) for line in lines[:1]]
            for line in lines[1:]:
                with contextlib.suppress(json.JSONDecodeError):  # the last may be torn
                    entries.append(json.loads(line))
            found = entries[0]["request"]
        except (OSError, ValueError, LookupError):
            return
        if found != request:
            raise CheckpointError(
                f"the unfinished save of {self.target} is of another model, seed, dtype or shard "
                "size, or by another version: repeat it as it was, or start again with "
                "force=True (--force) and without resume"
            )
        for entry in entries[1:]:
            path = self.files / entry["file"]
            if path.is_file() and _checksum(path) == entry["crc32"]:
                self.finished[entry["file"]] = entry["crc32"]

    def release(self) -> None:
        """Let other processes have the folder."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def discard(self) -> None:
        """Remove the folder and all that is in it."""
        shutil.rmtree(self.folder, ignore_errors=True)

    # -- writing -------------------------------------------------------------------------------

    def write_text(self, name: str, text: str) -> None:
        """Write a small file."""
        with (self.files / name).open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())

    def finish(self, name: str, checksum: str) -> None:
        """Note a file whose bytes are on the disk."""
        sync(self.files)
        with self._journal.open("a") as journal:
            journal.write(json.dumps({"file": name, "crc32": checksum}) + "\n")
            journal.flush()
            os.fsync(journal.fileno())
        self.finished[name] = checksum

    def publish(self) -> None:
        """Let the finished files take the output's place, in one step."""
        sync(self.files)
        made = self.files
        if self.target.suffix == ".safetensors":
            made = self.files / self.target.name
        if self.target.is_dir():
            _exchange(made, self.target)
        else:
            made.replace(self.target)
        sync(self.target.parent)
        self.discard()


@contextlib.contextmanager
def staged(target: Path, request: str, *, resume: bool, force: bool) -> Iterator[Stage]:
    """A stage for an output: published if the block ends, and removed if it raises an error.

    An interrupt is no error: what is finished is kept for ``resume``.

    Raises:
        OutputExistsError: there is an output, or an unfinished one, and no ``force``.
        CheckpointError: what is to be continued is something else.
        OutputError: the place cannot be written to.
    """
    check_target(target, force=force)
    stage = Stage(target)
    try:
        with _explained(target):
            stage.open(request, resume=resume, force=force)
            try:
                yield stage
                stage.publish()
            except Exception:
                stage.discard()
                raise
    finally:
        stage.release()


@contextlib.contextmanager
def _explained(target: Path) -> Iterator[None]:
    """Errors of the file system, as ours."""
    try:
        yield
    except (OutputError, OutputExistsError):
        raise
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        step = (
            "free space, or choose another disk, and run it again; nothing was left behind"
            if full
            else "choose a place that can be written to"
        )
        raise OutputError(
            error.errno, f"cannot write {target}: {error.strerror}: {step}"
        ) from error


def check_target(target: Path, *, force: bool) -> None:
    """Raise unless a file or a folder may be put in this place."""
    if not target.exists():
        return
    if target.is_dir() == (target.suffix == ".safetensors"):
        kind = "folder" if target.is_dir() else "file"
        raise OutputExistsError(f"{target} is a {kind}: remove it, or choose another path")
    if target.is_dir():
        foreign = sorted(p.name for p in target.iterdir() if not any(map(p.match, _OURS)))
        if foreign:
            raise OutputExistsError(
                f"{target} holds what is no part of a checkpoint and would be lost: "
                f"{listing(foreign)}. Choose another folder, or move these away"
            )
        if not any(target.iterdir()):
            return
    if not force:
        raise OutputExistsError(f"{target} exists: overwrite it with force=True (--force)")


def check_room(target: Path, nbytes: int) -> None:
    """Raise if the disk cannot take this many bytes beyond those of an unfinished save."""
    nbytes -= sum(path.stat().st_size for path in Stage(target).files.glob("*"))
    place = target.parent
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if nbytes > free:
        raise OutputError(
            errno.ENOSPC,
            f"{target} needs {format_bytes(nbytes)} and its disk has {format_bytes(free)} free: "
            "choose another disk, free space, or write a smaller dtype",
        )


def sync(folder: Path) -> None:
    """Have a folder's entries on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        checksum = 0
        while piece := file.read(1 << 20):
            checksum = zlib.crc32(piece, checksum)
    return f"{checksum:08x}"


def _exchange(made: Path, target: Path) -> None:
    """Put a folder in the place of another, which goes to the first one's."""
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        at, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
        if libc.renameat2(at, os.fsencode(made), at, os.fsencode(target), exchange) == 0:
            return
    except (AttributeError, OSError):
        pass
    # Where the system cannot exchange, a process killed between these two leaves no output, and
    # the old one in the hidden folder.
    old = made.with_name("replaced")
    shutil.rmtree(old, ignore_errors=True)
    target.rename(old)
    made.rename(target)
