"""Where folders of runs, scores and searches are: `Storage` is one kind of place, chosen by the scheme of a URL.

Torch, DeepSpeed, vLLM and Parquet writers want real files. So a folder is made locally and *published*, the file that
marks it complete last, and read through `Place` or *fetched*. No storage needs to rename, link or append.

Another storage is one class in one file:

    @register("storage", "vault")
    class VaultStorage(Storage): ...      # open, exists, list, remove

and then `vault://...` is a place like any other. A class of your own is found once its module is imported, or as an
entry point of the group `mlc_ray.storage`.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import stat
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, Literal

from mlc_ray._registry import UnknownComponentError, resolve
from mlc_ray.config.paths import real_path, scheme_of
from mlc_ray.errors import MlcRayError
from mlc_ray.storage.atomic import atomic_folder, json_text, scratch_folder

MANIFEST = "manifest.json"
"""What a folder has once it is complete: see `mlc_ray.storage.manifests`."""
PIECE_BYTES = 16 << 20
"""Bytes of a file that are copied or read at a time; of an object in a store, each is a request."""


class StorageError(MlcRayError, ValueError):
    """A URL cannot be used as asked; the message quotes it and says what to give instead."""


class StorageFaultError(MlcRayError, OSError):
    """A store did not do what it was asked, and may do it later: it is away, is overloaded, or refuses credentials."""


class StorageDeniedError(StorageFaultError):
    """A store refuses for good: the credentials, their rights or the bucket are wrong; another try ends the same."""


class Storage(ABC):
    """One kind of place for files. URLs are whole ones (`vault://a/b`); a folder is what has files beneath it."""

    @abstractmethod
    def open(self, url: str, mode: Literal["rb", "wb"] = "rb") -> AbstractContextManager[BinaryIO]:
        """A file to read, or to write: it appears, or replaces an older one, when the block ends without an error.

        Raises:
            FileNotFoundError: there is nothing to read.
        """

    @abstractmethod
    def exists(self, url: str) -> bool:
        """Whether a file (not a folder) is there."""

    @abstractmethod
    def list(self, url: str) -> list[str]:
        """Names of the files and folders directly beneath a folder, sorted; none if there is no such folder."""

    @abstractmethod
    def remove(self, url: str) -> None:
        """Remove a file, or a folder with all that is in it; what does not exist is ignored."""

    def write_parts(self, url: str, parts: Sequence[bytes | memoryview]) -> None:
        """Write a file whose parts are in memory; it appears whole, or replaces an older one."""
        with self.open(url, "wb") as file:
            for part in parts:
                file.write(part)

    def sizes(self, url: str, names: Iterable[str] | None = None) -> dict[str, int]:
        """Bytes of each file in a folder and in the folders beneath it, by its path in the folder.

        With `names`, of these files alone; one that is not there is left out.
        """
        if names is None:
            names = self._names(url)
        found = {}
        for name in names:
            with suppress(FileNotFoundError), self.open(_join(url, name)) as file:
                found[name] = file.seek(0, os.SEEK_END)
        return found

    def create(self, url: str, content: bytes) -> bool | None:
        """Write a file that must not be there yet, so that of several who do it at once one succeeds.

        Returns:
            Whether it was written. None, with nothing written, where the storage cannot decide between two.
        """
        return None

    def modified(self, url: str) -> float | None:
        """When a file was written, in seconds by the storage's clock; None where it does not say.

        Raises:
            FileNotFoundError: there is no such file.
        """
        return None

    def etag(self, url: str) -> str:
        """What names the content that a file has now, as an ETag does; "" where the storage does not say."""
        return ""

    def publish(self, local: Path, url: str, *, last: Sequence[str] = (MANIFEST,)) -> None:
        """Copy a finished file or folder of this machine to `url`; files called as in `last` come last, in that order.

        Whoever sees the last of them sees a whole folder. Links are not followed out of the folder: they are skipped.
        """
        if local.is_file():
            self._send(local, url)
            return
        files = [path for path in local.rglob("*") if path.is_file() and not path.is_symlink()]
        order = {name: place for place, name in enumerate(last, 1)}
        for path in sorted(files, key=lambda path: (order.get(path.name, 0), path)):
            self._send(path, _join(url, path.relative_to(local).as_posix()))

    def fetch(self, url: str, local: Path) -> None:
        """Copy a file, or a folder with all that is in it, to `local` on this machine.

        Raises:
            FileNotFoundError: nothing is there.
        """
        if self.exists(url):
            local.parent.mkdir(parents=True, exist_ok=True)
            with self.open(url) as source, local.open("wb") as target:
                shutil.copyfileobj(source, target, PIECE_BYTES)
            return
        names = self.list(url)
        if not names:
            raise FileNotFoundError(f"nothing is at {url!r}")
        for name in names:
            self.fetch(_join(url, name), local / name)

    def holds_files(self, url: str) -> bool:
        """Whether there are files beneath a folder."""
        return any(True for _ in self._names(url))

    def _names(self, url: str) -> Iterator[str]:
        """Paths of all files beneath a folder."""
        for name in self.list(url):
            if self.exists(_join(url, name)):
                yield name
            else:
                yield from (f"{name}/{inside}" for inside in self._names(_join(url, name)))

    def _send(self, local: Path, url: str) -> None:
        with local.open("rb") as source, self.open(url, "wb") as target:
            shutil.copyfileobj(source, target, PIECE_BYTES)


def storage_of(url: str) -> Storage:
    """The storage that serves a path or URL.

    Raises:
        StorageError: none is registered for its scheme.
    """
    scheme = scheme_of(url)
    try:
        if scheme != "file":
            component: type[Storage] = resolve("storage", scheme or "file")
            return component()
    except UnknownComponentError:
        pass
    try:
        real_path(url)
    except ValueError as error:
        raise StorageError(f"{url!r}: {error}") from None
    raise StorageError(f"{url!r}: no storage is registered for plain paths")


class Place:
    """A file or folder by its path or URL. `/` joins as for `pathlib.Path`; all else is asked of its storage.

    Where it is on this machine a Place is path-like: `open(place)`, `Path(place)`. Elsewhere that raises `StorageError`
    instead of making a local folder of a URL.
    """

    __slots__ = ("url",)

    def __init__(self, url: str | os.PathLike[str] | Place) -> None:
        self.url: str = url.url if isinstance(url, Place) else os.fspath(url)

    def __str__(self) -> str:
        return self.url

    def __repr__(self) -> str:
        return f"Place({self.url!r})"

    def __eq__(self, other: object) -> bool:
        return self.url == str(other) if isinstance(other, Place | Path) else NotImplemented

    def __hash__(self) -> int:
        return hash(self.url)

    def __truediv__(self, name: str) -> Place:
        return Place(_join(self.url, name))

    def __fspath__(self) -> str:
        if not self.is_local:
            raise StorageError(f"{self.url!r} is not on this machine, and real files are needed here: {_WORK_LOCALLY}")
        return self.url

    @property
    def is_local(self) -> bool:
        """Whether it is a plain path."""
        return scheme_of(self.url) is None

    @property
    def storage(self) -> Storage:
        """What serves it."""
        return storage_of(self.url)

    @property
    def name(self) -> str:
        """The last part."""
        return self.url.rstrip("/").rpartition("/")[2]

    @property
    def parent(self) -> Place:
        """The folder that it is in."""
        if self.is_local:
            return Place(Path(self.url).parent)
        above = self.url.rstrip("/").rpartition("/")[0]
        return self if above.endswith(":/") else Place(above)  # nothing is above a bucket

    def absolute(self) -> Place:
        """The same place, for a process in another working folder: a path without links, a URL without empty parts."""
        if self.is_local:
            return Place(Path(self.url).expanduser().resolve())
        scheme, slashes, rest = self.url.partition("://")
        return Place(f"{scheme.lower()}{slashes}{re.sub('/{2,}', '/', rest).rstrip('/')}")

    def exists(self) -> bool:
        """Whether a file or a folder is there."""
        return mode_of(self.url) != 0 if self.is_local else self.is_file() or self.is_dir()

    def is_file(self) -> bool:
        """Whether a file is there."""
        return self.storage.exists(self.url)

    def is_dir(self) -> bool:
        """Whether a folder is there."""
        return stat.S_ISDIR(mode_of(self.url)) if self.is_local else self.storage.holds_files(self.url)

    def iterdir(self) -> list[Place]:
        """What is directly in a folder, by name; nothing if there is no such folder."""
        return [self / name for name in self.storage.list(self.url)]

    def open(self, mode: Literal["rb", "wb"] = "rb") -> AbstractContextManager[BinaryIO]:
        """The file to read or write bytes; see `Storage.open`."""
        return self.storage.open(self.url, mode)

    def read_text(self) -> str:
        """The file's text.

        Raises:
            FileNotFoundError: There is no such file.
            UnicodeDecodeError: It is not UTF-8.
        """
        with self.open() as file:
            return file.read().decode("utf-8")

    def read_json(self) -> Any:
        """The file's JSON.

        Raises:
            FileNotFoundError: There is no such file.
            UnicodeDecodeError: It is not UTF-8.
            json.JSONDecodeError: It is not JSON.
        """
        return json.loads(self.read_text())

    def read_object(self, error: type[MlcRayError], fix: str = "") -> dict[str, Any]:
        """The file's JSON object; what is none raises `error`, which names the file and says what to do (`fix`).

        Raises:
            FileNotFoundError: There is no such file.
        """
        end = f"; {fix}" if fix else ""
        try:
            content = self.read_json()
        except ValueError as fault:  # UnicodeDecodeError and JSONDecodeError
            raise error(f"{str(self)!r} is damaged: not valid JSON ({fault}){end}") from None
        if not isinstance(content, dict):
            raise error(f"{str(self)!r} is damaged: expected an object, found {type(content).__name__}{end}")
        return content

    def sizes(self, names: Iterable[str] | None = None) -> dict[str, int]:
        """Bytes of the files in a folder, by their paths in it; see `Storage.sizes`."""
        return self.storage.sizes(self.url, names)

    def write_bytes(self, content: bytes) -> None:
        """Write the whole file; a reader sees the old one or the new one."""
        self.write_parts([content])

    def write_parts(self, parts: Sequence[bytes | memoryview]) -> None:
        """As `write_bytes`, of what lies in several pieces of memory."""
        self.storage.write_parts(self.url, parts)

    def write_text(self, text: str) -> None:
        """Write the whole file; a reader sees the old one or the new one."""
        self.write_bytes(text.encode("utf-8"))

    def write_json(self, value: Any) -> None:
        """Write `value` as indented JSON; NaN is refused (ValueError)."""
        self.write_text(json_text(value))

    def modified(self) -> float | None:
        """When the file was written; see `Storage.modified`."""
        return self.storage.modified(self.url)

    def etag(self) -> str:
        """What names the content that the file has now; see `Storage.etag`."""
        return self.storage.etag(self.url)

    def create(self, text: str) -> bool | None:
        """Write a file that must not be there yet; see `Storage.create`."""
        return self.storage.create(self.url, text.encode("utf-8"))

    def remove(self) -> None:
        """Remove the file, or the folder with all that is in it."""
        self.storage.remove(self.url)


_WORK_LOCALLY = "fetch it first, or give a path on storage that all nodes share, e.g. /shared/runs"


def _join(url: str, name: str) -> str:
    return f"{url}{name}" if url.endswith("/") else f"{url}/{name}"


def mode_of(path: str) -> int:
    """Type and mode of what is at a path of this machine; 0 where nothing is.

    `pathlib`, from Python 3.14 on, answers any error by "nothing is there", also that of a disk which is away for a
    moment, and by that answer unfinished folders are removed.

    Raises:
        OSError: It cannot be looked at.
    """
    try:
        return os.stat(Path(path)).st_mode
    except (FileNotFoundError, NotADirectoryError, ValueError):  # of a ValueError: a null byte names no file
        return 0


def absolute_if_here(path: str) -> str:
    """An existing path as an absolute one; anything else (a hub name, `sample:test`) unchanged.

    Workers run in folders of their own, and a run may be resumed from another: relative paths mean nothing there.
    """
    local = Path(path).expanduser()
    return str(local.absolute()) if local.exists() else path  # links are kept: a file's ending says how to read it


@contextmanager
def working_folder(place: Place, *, last: Sequence[str] = (MANIFEST,)) -> Iterator[Path]:
    """Yield a folder of this machine whose files are in `place` when the block ends, also where it ends by an error.

    A local place is that folder itself. Of another one, what is there is fetched first; afterwards files that are new
    or changed are published, those called as in `last` at the end, and files that are gone are removed.
    """
    if place.is_local:
        folder = Path(place.url)
        folder.mkdir(parents=True, exist_ok=True)
        yield folder
        return
    with scratch_folder() as temporary:
        folder = temporary / place.name
        folder.mkdir()
        if place.is_dir():
            place.storage.fetch(place.url, folder)
        before = _states(folder)
        try:
            yield folder
        finally:
            after = _states(folder)
            order = {name: number for number, name in enumerate(last, 1)}
            for name in before.keys() - after.keys():
                (place / name).remove()
            for name in sorted(after, key=lambda name: (order.get(name.rpartition("/")[2], 0), name)):
                if before.get(name) != after[name]:
                    place.storage.publish(folder / name, str(place / name))


@contextmanager
def new_folder(place: Place, *, last: Sequence[str] = (MANIFEST,)) -> Iterator[Path]:
    """Yield an empty folder of this machine that becomes `place` when the block ends; after an error nothing is there.

    Elsewhere, files appear one after another, those called as in `last` at the end.

    Raises:
        FileExistsError: `place` exists at the start, or on this machine at the end.
    """
    if place.is_local:
        with atomic_folder(Path(place)) as folder:
            yield folder
        return
    if place.exists():
        raise FileExistsError(f"folder {str(place)!r} already exists")
    with scratch_folder() as temporary:
        yield temporary
        place.storage.publish(temporary, str(place), last=last)


def _states(folder: Path) -> dict[str, tuple[int, int]]:
    """Size and time of every file, by its path in the folder."""
    states = {}
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            found = path.stat()
            states[path.relative_to(folder).as_posix()] = (found.st_size, found.st_mtime_ns)
    return states
