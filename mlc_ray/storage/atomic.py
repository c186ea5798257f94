"""Files and folders on this machine that appear whole or not at all."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import socket
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

_SCRATCH = f".mlc_ray-scratch-{socket.gethostname()}-{os.getuid()}"
"""A name that nobody gives: such folders of killed processes are removed. A lock of another host may not be seen."""
_UNLOCKED_SECONDS = 30.0
"""Longer than any process takes from making a scratch folder to locking it."""


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

    With `replace`, an old folder is moved aside before the rename and deleted after it. A killed process leaves at most
    a folder whose name starts with a dot.

    Raises:
        FileExistsError: Without `replace`, `path` exists at the start or (another process was faster) at the end.
    """
    path = Path(path)
    if path.exists() and not replace:
        raise FileExistsError(f"folder {str(path)!r} already exists")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary_sibling(path)
    temporary.mkdir()
    retired: Path | None = None
    try:
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
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


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
                _remove_abandoned(Path(folder).parent)
            yield Path(folder)
        finally:
            os.close(held)


def _remove_abandoned(folder: Path) -> None:
    for path in folder.iterdir():
        if path.name.rpartition("-")[0] != _SCRATCH:
            continue
        with suppress(OSError):  # gone by now, or in use
            if time.time() - path.stat().st_mtime < _UNLOCKED_SECONDS:
                continue
            held = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
            try:
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(path, ignore_errors=True)
            finally:
                os.close(held)


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
    return path.with_name(f".{path.name}.tmp-{os.getpid()}-{uuid.uuid4().hex[:8]}")
