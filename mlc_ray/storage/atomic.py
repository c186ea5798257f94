"""Files and folders on this machine that appear whole or not at all."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import shutil
import socket
import tempfile
import time
import uuid
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

_SCRATCH = f".mlc_ray-scratch-{socket.gethostname()}-{os.getuid()}"
"""A name that nobody gives: such folders of killed processes are removed. A lock of another host may not be seen."""
_UNLOCKED_SECONDS = 30.0
"""Longer than any process takes from making a scratch folder to locking it."""
_HOST = f"{zlib.crc32(socket.gethostname().encode()):08x}"
TEMPORARY = re.compile(
    r"\..+\.tmp-((?P<host>[0-9a-f]{8})-\d+-)?[0-9a-f]{8}(?P<unlocked>\.new)?"
    r"|\..+\.now-[0-9a-f]{32}|\.work-[0-9a-f]{8}|\.(nonce|mlc_ray-doctor)-[0-9a-f]{32}"
)
"""Names of what is half made, or there for a moment; a killed process leaves it."""
ABANDONED_SECONDS = 86_400.0
"""Longer than anything half made goes without a write, tasks that wait for a place in the cluster included."""


@contextmanager
def atomic_file(path: str | Path) -> Iterator[BinaryIO]:
    """Yield a temporary sibling of `path` opened for writing, renamed to `path` when the block ends, removed on error.

    A reader sees either the old file or the whole new one.
    """
    path = Path(path)
    temporary = _temporary_sibling(path)
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def json_text(value: Any) -> str:
    """`value` as indented JSON with an end of line.

    Raises:
        ValueError: It holds NaN or infinity.
    """
    return json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def write_json_atomic(path: str | Path, value: Any) -> None:
    """Write indented JSON so that a reader sees either the old file or the whole new one."""
    text = json_text(value)
    with atomic_file(path) as file:
        file.write(text.encode("utf-8"))


@contextmanager
def atomic_folder(path: str | Path, *, replace: bool = False) -> Iterator[Path]:
    """Yield an empty temporary sibling of `path`, renamed to `path` when the block ends, removed on error.

    With `replace`, an old folder is moved aside before the rename and deleted after it. What a killed process leaves,
    a folder whose name starts with a dot, is removed at the next call for `path` or any folder beside it.

    Raises:
        FileExistsError: Without `replace`, `path` exists at the start or (another process was faster) at the end.
    """
    path = Path(path)
    if path.exists() and not replace:
        raise FileExistsError(f"folder {str(path)!r} already exists")
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_abandoned_here(path.parent)
    retired: Path | None = None
    with _locked_sibling(path) as temporary:
        yield temporary
        if replace and path.exists():
            retired = _temporary_sibling(path)
            os.rename(path, retired)
        try:
            os.rename(temporary, path)
        except OSError as error:
            if retired is not None and not path.exists():
                os.rename(retired, path)
            elif path.exists():
                raise FileExistsError(f"folder {str(path)!r} already exists") from error
            raise
        if retired is not None:
            shutil.rmtree(retired, ignore_errors=True)


@contextmanager
def _locked_sibling(path: Path) -> Iterator[Path]:
    """Yield an empty temporary sibling that this process holds a lock on, removed when the block ends."""
    temporary = _temporary_sibling(path)
    unlocked = temporary.with_name(f"{temporary.name}.new")  # so that what has the other name was locked by its maker
    unlocked.mkdir()
    try:
        held = os.open(unlocked, os.O_RDONLY)
        try:
            with suppress(OSError):
                fcntl.flock(held, fcntl.LOCK_EX)
            os.rename(unlocked, temporary)
            yield temporary
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
            os.close(held)
    finally:
        shutil.rmtree(unlocked, ignore_errors=True)


def remove_abandoned_here(folder: Path) -> None:
    """Remove what killed processes left half made directly in a folder.

    That is at once what a process of this host held a lock on, which ends with its process, and of other hosts, whose
    locks may not be seen here, and files, what nobody wrote to for a day. Where the file system has no locks, no
    folder is removed.
    """
    for path in folder.iterdir() if folder.is_dir() else ():
        if (named := TEMPORARY.fullmatch(path.name)) is None:
            continue
        with suppress(OSError):  # gone by now, in use, or another user's
            is_folder = path.is_dir() and not path.is_symlink()
            was_locked = is_folder and named["host"] == _HOST and not named["unlocked"]
            if not was_locked and time.time() - _last_written(path) < ABANDONED_SECONDS:
                continue
            if is_folder:
                _remove_unlocked(path)
            else:
                path.unlink()


def _last_written(path: Path) -> float:
    return max(each.lstat().st_mtime for each in (path, *path.rglob("*")))


def _remove_unlocked(folder: Path) -> None:
    """Remove a folder that no process holds a lock on; an OSError where one does, or where there are no locks."""
    held = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(folder, ignore_errors=True)
    finally:
        os.close(held)


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """Yield an empty folder for temporary files of this machine, removed when the block ends.

    Those that killed processes of this user and host left are removed at the next call: whoever uses one holds a lock
    on it, which ends with its process. Where the file system has no locks (some NFS and Lustre), none is removed.
    """
    with tempfile.TemporaryDirectory(prefix=f"{_SCRATCH}-") as folder:
        held = os.open(folder, os.O_RDONLY)
        try:
            with suppress(OSError):
                fcntl.flock(held, fcntl.LOCK_EX)
                _remove_scratch(Path(folder).parent)
            yield Path(folder)
        finally:
            os.close(held)


def _remove_scratch(folder: Path) -> None:
    for path in folder.iterdir():
        if path.name.rpartition("-")[0] != _SCRATCH:
            continue
        with suppress(OSError):  # gone by now, or in use
            if time.time() - path.stat().st_mtime < _UNLOCKED_SECONDS:
                continue
            _remove_unlocked(path)


def sync_folders(folder: Path) -> None:
    """Put on the disk itself the names of files in a folder and in those beneath it, and the folder's own name.

    Without its name, a file that is on the disk is lost at a power failure.
    """
    for path in [folder.parent, *(Path(inside) for inside, _, _ in os.walk(folder))]:
        opened = os.open(path, os.O_RDONLY)
        try:
            os.fsync(opened)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # a mounted store that knows no folders
                raise
        finally:
            os.close(opened)


def _temporary_sibling(path: Path) -> Path:
    return path.with_name(f".{path.name}.tmp-{_HOST}-{os.getpid()}-{uuid.uuid4().hex[:8]}")
