"""Outputs that appear whole or not at all.

The output is written into a hidden folder beside its place, ``.NAME.partial``, which is locked and
keeps a journal of finished files. When everything is on disk, a rename puts it in its place. A
killed process leaves the folder, so that another can continue.

    .NAME.partial/lock       held by the process that writes
    .NAME.partial/journal    the digest of the save, then a line for each finished file
    .NAME.partial/files/     the files that become the output
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import json
import os
import re
import shutil
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, TypeVar

from lateinit._units import format_bytes
from lateinit.errors import CheckpointError, OutputError, OutputExistsError, listing

R = TypeVar("R")
# The files that a folder of a checkpoint may hold. A folder with any other file is never replaced.
_OURS = (
    "*.distcp",
    "*.safetensors",
    "*.safetensors.index.json",
    ".metadata",
    "config.json",
    "generation_config.json",
)

# The interrupted saves of this process, which have begun and not returned. By place: the digest of
# the save, and the inode of its output if that was about to be put in place. The same call
# continues such a save without ``resume=True``.
_begun: dict[Path, tuple[str, int | None]] = {}


class Stage:
    """The hidden folder in which one output grows. ``staged`` makes it.

    Attributes:
        target: the place of the output.
        folder: the hidden folder.
        files: the folder in it that becomes the output.
        finished: the checksum of each finished file, by file name.
    """

    def __init__(self, target: Path) -> None:
        self.target = target
        self.folder = target.parent / f".{target.name}.partial"
        self.files = self.folder / "files"
        self.finished: dict[str, str] = {}
        self._request = ""
        self._journal = self.folder / "journal"
        self._lock: BinaryIO | None = None  # a file object, which is closed when it is dropped

    # -- opening and closing -------------------------------------------------------------------

    def open(self, request: str, *, resume: bool, force: bool) -> None:
        """Make the folder, or take over the one that a killed process left.

        Args:
            request: the digest of this save.
            resume: keep the finished files of a killed save with the same digest.
            force: discard an unfinished save.
        """
        self._request = request
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
            # A folder of an earlier process stays, so that its finished files can be resumed.
            if not left:
                self.discard()
            raise

    def _begin(self, request: str) -> None:
        shutil.rmtree(self.files, ignore_errors=True)
        self.files.mkdir()
        self._journal.write_text(json.dumps({"request": request}) + "\n")

    def _take_lock(self) -> None:
        self._lock = (self.folder / "lock").open("ab")
        try:
            # The system releases the lock when its holder dies, in whatever way.
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self.release()
            raise OutputExistsError(
                f"another process is writing {self.target} now: wait for it, or choose another path"
            ) from error

    def _read_journal(self, request: str) -> None:
        """Keep the finished files of an earlier process, if its save had the same digest."""
        try:
            lines = self._journal.read_text().splitlines()
            entries = [json.loads(line) for line in lines[:1]]
            for line in lines[1:]:
                with contextlib.suppress(json.JSONDecodeError):  # the last line may be torn
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
        """Release the lock."""
        if self._lock is not None:
            self._lock.close()

    def discard(self) -> None:
        """Remove the folder and everything in it."""
        shutil.rmtree(self.folder, ignore_errors=True)

    # -- writing -------------------------------------------------------------------------------

    def write_text(self, name: str, text: str) -> None:
        """Write a small file, and sync it."""
        with (self.files / name).open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())

    def finish(self, name: str, checksum: str) -> None:
        """Enter a file into the journal; its bytes must be on disk."""
        # First sync the entry of the file: the journal must not name a file that a crash can undo.
        sync(self.files)
        with self._journal.open("a") as journal:
            journal.write(json.dumps({"file": name, "crc32": checksum}) + "\n")
            journal.flush()
            os.fsync(journal.fileno())
        self.finished[name] = checksum

    def publish(self) -> None:
        """Put the finished files in the output's place, in one step."""
        sync(self.files)
        made = self.files
        if self.target.suffix == ".safetensors":
            made = self.files / self.target.name
        _begun[self.target] = self._request, made.stat().st_ino
        if self.target.is_dir():
            _exchange(made, self.target)
        else:
            made.replace(self.target)
        sync(self.target.parent)
        self.discard()


@contextlib.contextmanager
def staged(target: Path, request: str, *, resume: bool, force: bool) -> Iterator[Stage]:
    """A stage for an output, published when the block ends, removed if the block raises.

    After an interrupt (``KeyboardInterrupt``, ``SystemExit``) it is not removed: the finished files
    stay, for ``resume``, and for the same save by this process.

    Raises:
        OutputExistsError: there is an output, finished or not, and no ``force`` or ``resume``.
        CheckpointError: the unfinished save to resume has another digest.
        OutputError: the place cannot be written to.
    """
    before, inode = _begun.get(target, ("", None))
    again = before == request
    own = again and target.exists() and target.stat().st_ino == inode
    check_target(target, force=force or own)
    stage, opened = Stage(target), False
    try:
        _begun[target] = request, inode if own else None
        with _explained(target):
            stage.open(request, resume=resume or again, force=force)
            opened = True
            yield stage
            stage.publish()
        stage.release()
    except BaseException as error:
        if isinstance(error, Exception):
            _begun.pop(target, None)
            if opened:
                stage.discard()
        stage.release()
        raise


@contextlib.contextmanager
def _explained(target: Path) -> Iterator[None]:
    """Raise errors of the file system as ``OutputError``, with a next step."""
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


def check_suffix(path: str | os.PathLike[str]) -> None:
    """Raise unless a path names a safetensors file or a folder.

    A suffix begins with a letter (``llama-3.1`` has none), and folders have one only if they exist
    or are written with a slash at the end.
    """
    target = Path(os.path.realpath(path))
    suffix = re.fullmatch(r"\.[A-Za-z]\w*", target.suffix)
    with _explained(target):
        is_folder = target.is_dir() or str(path).endswith(os.sep)
    if suffix is None or is_folder or suffix[0] == ".safetensors":
        return
    raise CheckpointError(
        f"{target} would be no {suffix[0]} file, since checkpoints are written as safetensors: "
        f"name {target.stem}.safetensors, or a folder (ending in a slash if that is what "
        f"{target.name} is to be)"
    )


def check_target(target: Path, *, force: bool) -> None:
    """Raise ``OutputExistsError`` unless the output may be put in this place."""
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


def was_interrupted(target: Path) -> bool:
    """Whether this process began to save to this place, and was interrupted."""
    return target in _begun


def returned(target: Path, result: R) -> R:
    """Note that a save returns its result: the last thing that it does."""
    return (_begun.pop(target, None), result)[1]  # one line, so that no interrupt comes in between


def check_room(target: Path, nbytes: int) -> None:
    """Raise if the disk has no room for this many bytes, less those of an unfinished save."""
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
    """Sync the entries of a folder to disk."""
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
    """Exchange two folders."""
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        # renameat2(2) of Linux: the exchange is atomic.
        at, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
        if libc.renameat2(at, os.fsencode(made), at, os.fsencode(target), exchange) == 0:
            return
    except (AttributeError, OSError):
        pass
    # Without renameat2 two renames are needed. A process that is killed between them leaves no
    # output at the target, and the old one in the hidden folder.
    old = made.with_name("replaced")
    shutil.rmtree(old, ignore_errors=True)
    target.rename(old)
    made.rename(target)
