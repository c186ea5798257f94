"""Files on this machine, or on storage that is mounted on it: plain paths, the only ones that need no URL."""

from __future__ import annotations

import errno
import os
import shutil
import stat
import uuid
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, Literal

from mlc_ray._registry import register
from mlc_ray.storage.atomic import atomic_file
from mlc_ray.storage.base import Storage, StorageFaultError, mode_of

_NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EINVAL)

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)


@register("storage", "file")
class LocalStorage(Storage):
    """Plain paths."""

    def open(self, url: str, mode: Literal["rb", "wb"] = "rb") -> AbstractContextManager[BinaryIO]:
        """A file to read, or to write: a written one appears, or replaces an older one, when it is closed."""
        if mode == "rb":
            return Path(url).open("rb")
        return _written(Path(url))

    def exists(self, url: str) -> bool:
        """Whether a file is there."""
        return stat.S_ISREG(mode_of(url))

    def list(self, url: str) -> list[str]:
        """Names directly in a folder, sorted; without the temporary ones of files that are being written."""
        folder = Path(url)
        return sorted(path.name for path in folder.iterdir() if ".tmp-" not in path.name) if folder.is_dir() else []

    def sizes(self, url: str, names: Iterable[str] | None = None) -> dict[str, int]:
        """Sizes by path; named files are looked up each, as what a network file system lists may lag behind."""
        folder = Path(url)
        found = {}
        for name in _names(folder) if names is None else names:
            with suppress(FileNotFoundError, NotADirectoryError):
                if stat.S_ISREG((status := os.stat(folder / name)).st_mode):
                    found[name] = status.st_size
        return found

    def create(self, url: str, content: bytes) -> bool | None:
        """Write a file that must not be there yet; None where there are no hard links, as on mounted object stores."""
        path = Path(url)
        temporary = path.with_name(f".{path.name}.tmp-{uuid.uuid4().hex[:8]}")
        try:
            with _room_for(path):
                path.parent.mkdir(parents=True, exist_ok=True)
                with temporary.open("wb") as file:
                    file.write(content)
                    file.flush()
                    os.fsync(file.fileno())  # else the name is on the disk after a power loss, and the file is empty
            os.link(temporary, path)  # unlike a rename, it fails where the file is there
        except FileExistsError:
            return False
        except OSError as error:
            if error.errno in _NO_LINKS:
                return None
            raise
        finally:
            temporary.unlink(missing_ok=True)
        return True

    def modified(self, url: str) -> float | None:
        """When a file was written."""
        return Path(url).stat().st_mtime

    def remove(self, url: str) -> None:
        """Remove a file, or a folder with all that is in it."""
        path = Path(url)
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


@contextmanager
def _written(path: Path) -> Iterator[BinaryIO]:
    with _room_for(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as file:
            yield file


@contextmanager
def _room_for(path: Path) -> Iterator[None]:
    """A full disk as an error that says which file it does not take."""
    try:
        yield
    except OSError as error:
        if error.errno not in _NO_ROOM or isinstance(error, StorageFaultError):
            raise
        raise StorageFaultError(
            f"{str(path)!r} cannot be written: {os.strerror(error.errno)}; make room there"
        ) from error


def _names(folder: Path) -> list[str]:
    """Paths of all files beneath a folder, those being written included."""
    return [
        (Path(parent) / name).relative_to(folder).as_posix() for parent, _, names in os.walk(folder) for name in names
    ]
