"""Object stores by pyarrow, `s3://` and `gs://`, and by fsspec, `abfs://`, `az://` and `oss://`.

Endpoint, region and credentials come from the environment, as those of the store's own tools do: AWS_ENDPOINT_URL_S3 or
AWS_ENDPOINT_URL, AWS_REGION or AWS_DEFAULT_REGION, AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY or the machine's role;
GOOGLE_APPLICATION_CREDENTIALS, STORAGE_EMULATOR_HOST. An object store has no rename, no link and no append, and none
is used: an object is written whole, large ones in parts that become one object at the end (multipart).
"""

from __future__ import annotations

import ctypes
import os
import tempfile
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, ClassVar, Literal, cast
from urllib.parse import urlsplit

from mlc_ray._registry import register
from mlc_ray.errors import MlcRayError
from mlc_ray.storage.base import PIECE_BYTES, Storage, StorageDeniedError, StorageError, StorageFaultError

if TYPE_CHECKING:
    from pyarrow import fs

_IN_MEMORY = 64 << 20  # bytes of a file being written; a larger one waits on this machine's disk until it is whole
_FOR_GOOD = ("ACCESS_DENIED", "INVALID_ACCESS_KEY_ID", "SIGNATURE_DOES_NOT_MATCH", "NO_SUCH_BUCKET")  # S3's, by pyarrow
_LOOKED_UP = 16  # named files that are asked for one by one; a listing answers 1000 keys a request, needed or not


class ObjectStorage(Storage):
    """What the stores share; one differs from another by the file system that serves it."""

    @abstractmethod
    def file_system(self, url: str) -> fs.FileSystem:
        """What serves `url`."""

    def key(self, url: str) -> str:
        """What `url` is called there: bucket and key, `bucket/a/b` of `s3://bucket/a/b`.

        Raises:
            StorageError: It names no bucket, or has a password or a query, which would be written down with settings.
        """
        parts = urlsplit(url)
        if not parts.netloc or parts.query or parts.password or "@" in parts.netloc:
            raise StorageError(
                f"{url!r}: write {parts.scheme}://BUCKET/FOLDER alone; endpoint, region and credentials come from the "
                "environment (AWS_ENDPOINT_URL, AWS_REGION, ...)"
            )
        return (parts.netloc + parts.path).rstrip("/")

    def open(self, url: str, mode: Literal["rb", "wb"] = "rb") -> AbstractContextManager[BinaryIO]:
        """An object to read by ranges, or to write: it is sent when the block ends without an error."""
        if mode == "wb":
            return self._put(url)
        with _faults_named(url):
            return cast(AbstractContextManager[BinaryIO], self.file_system(url).open_input_file(self.key(url)))

    def exists(self, url: str) -> bool:
        """Whether there is an object of this key."""
        with _faults_named(url):
            (found,) = self.file_system(url).get_file_info([self.key(url)])
        return bool(found.is_file)

    def list(self, url: str) -> list[str]:
        """The next parts of all keys that begin with the folder's."""
        from pyarrow import fs

        with _faults_named(url):
            found = self.file_system(url).get_file_info(fs.FileSelector(self.key(url), allow_not_found=True))
        return sorted(each.base_name for each in found)

    def write_parts(self, url: str, parts: Sequence[bytes | memoryview]) -> None:
        """Sent from memory as it is."""
        views = [memoryview(part).cast("B") for part in parts]
        self._stream((view[at : at + PIECE_BYTES] for view in views for at in range(0, len(view), PIECE_BYTES)), url)

    def sizes(self, url: str, names: Iterable[str] | None = None) -> dict[str, int]:
        """As the store lists them, with one request for many; a few named files are looked up each."""
        from pyarrow import fs

        folder, names = self.key(url), None if names is None else list(names)
        asked: Any = fs.FileSelector(folder, allow_not_found=True, recursive=True)
        if names is not None and len(names) <= _LOOKED_UP:
            asked = [f"{folder}/{name}" for name in names]
        with _faults_named(url):
            listed = self.file_system(url).get_file_info(asked)
        found = {each.path.removeprefix(f"{folder}/"): int(each.size) for each in listed if each.is_file}
        return found if names is None else {name: found[name] for name in names if name in found}

    def holds_files(self, url: str) -> bool:
        """Whether keys begin with the folder's; some stores list a folder for a while after its last file is gone."""
        return bool(self.sizes(url))

    def modified(self, url: str) -> float | None:
        """When an object was written, in seconds since 1970; None if the store does not say.

        Raises:
            FileNotFoundError: There is no such object.
            StorageFaultError: The store could not be asked.
        """
        from pyarrow import fs

        with _faults_named(url):
            (found,) = self.file_system(url).get_file_info([self.key(url)])
        if found.type != fs.FileType.File:
            raise FileNotFoundError(f"nothing is at {url!r}")
        return None if found.mtime_ns is None else float(found.mtime_ns / 1e9)

    def etag(self, url: str) -> str:
        """The ETag of an object; fsspec's file systems do not tell one by pyarrow."""
        with _faults_named(url), self.file_system(url).open_input_file(self.key(url)) as opened:
            told = {name.lower(): value for name, value in (opened.metadata() or {}).items()}
        return bytes(told.get("etag", b"")).decode()

    def remove(self, url: str) -> None:
        """Remove an object, or all whose keys begin with it as a folder."""
        from pyarrow import fs

        served, key = self.file_system(url), self.key(url)
        # A folder that a store still lists after its last file is gone cannot be removed: it is not there.
        with _faults_named(url), suppress(FileNotFoundError):
            (found,) = served.get_file_info([key])
            if found.type == fs.FileType.File:
                served.delete_file(key)
            elif found.type == fs.FileType.Directory:
                served.delete_dir(key)

    @contextmanager
    def _put(self, url: str) -> Iterator[BinaryIO]:
        # A stream of pyarrow's cannot be given up: closed after an error, it would store what it has so far.
        with tempfile.SpooledTemporaryFile(max_size=_IN_MEMORY, prefix="mlc_ray-") as content:
            yield cast(BinaryIO, content)
            content.seek(0)
            self._stream(_pieces(cast(BinaryIO, content)), url)

    def _send(self, local: Path, url: str) -> None:
        with local.open("rb") as content:
            self._stream(_pieces(content), url)

    def _stream(self, content: Iterable[bytes | memoryview], url: str) -> None:
        served, key = self.file_system(url), self.key(url)
        with _faults_named(url):
            sink = served.open_output_stream(key)
            try:
                for piece in content:
                    sink.write(piece)
            except BaseException:  # Ctrl-C too
                _abandon(sink)
                raise
            sink.close()


def _abandon(sink: Any) -> None:
    """Have a stream never closed, so that what is at its key stays: the store drops the parts that were sent.

    pyarrow cannot abort one from Python, and its destructor closes it, which would store the parts as the whole
    object. So it keeps a reference for the life of the process: at most a few parts of memory, for a rare fault.
    """
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(sink))


def _pieces(content: BinaryIO) -> Iterator[bytes]:
    while piece := content.read(PIECE_BYTES):
        yield piece


@register("storage", "s3")
class S3Storage(ObjectStorage):
    """S3 and what speaks its protocol."""

    def file_system(self, url: str) -> fs.FileSystem:
        """One for the whole process; it keeps connections."""
        return _s3(tuple(sorted((name, value) for name, value in os.environ.items() if name.startswith("AWS_"))))


@cache
def _s3(environment: tuple[tuple[str, str], ...]) -> fs.FileSystem:
    """The file system for these settings; credentials that pyarrow does not find in them it asks the machine for."""
    from pyarrow import fs

    # Opened late, a small object takes one request; else three.
    return fs.S3FileSystem(
        **s3_options(dict(environment)), connect_timeout=10, request_timeout=60, allow_delayed_open=True
    )


def s3_options(environment: Mapping[str, str]) -> dict[str, Any]:
    """Endpoint and region of pyarrow's S3 file system, from the variables that AWS' own tools read.

    Raises:
        StorageError: The endpoint is not a URL.
    """
    options: dict[str, Any] = {}
    if endpoint := environment.get("AWS_ENDPOINT_URL_S3") or environment.get("AWS_ENDPOINT_URL"):
        parts = urlsplit(endpoint)
        if parts.scheme not in ("http", "https") or not parts.netloc:
            raise StorageError(f"AWS_ENDPOINT_URL={endpoint!r} is not a URL; write it with http:// or https://")
        options |= {"endpoint_override": parts.netloc, "scheme": parts.scheme}
    if region := environment.get("AWS_REGION") or environment.get("AWS_DEFAULT_REGION"):
        options["region"] = region
    elif options:
        options["region"] = "us-east-1"  # of a store of one's own; none is looked up for it
    return options


@register("storage", "gs")
class GcsStorage(ObjectStorage):
    """Google Cloud Storage."""

    def file_system(self, url: str) -> fs.FileSystem:
        """One for the whole process."""
        return _gcs()


@cache
def _gcs() -> fs.FileSystem:
    from pyarrow import fs

    return fs.GcsFileSystem()


class FsspecStorage(ObjectStorage):
    """What a package for fsspec serves; it takes endpoint and credentials from its own variables of the environment."""

    protocol: ClassVar[str]

    def file_system(self, url: str) -> fs.FileSystem:
        """One for the whole process."""
        return _by_fsspec(self.protocol)


@register("storage", "abfs")
class AbfsStorage(FsspecStorage):
    """Azure (package adlfs)."""

    protocol = "abfs"


@register("storage", "az")
class AzStorage(FsspecStorage):
    """Azure (package adlfs)."""

    protocol = "az"


@register("storage", "oss")
class OssStorage(FsspecStorage):
    """Alibaba Cloud (package ossfs)."""

    protocol = "oss"


@cache
def _by_fsspec(protocol: str) -> fs.FileSystem:
    """pyarrow's view of fsspec's file system.

    Raises:
        StorageError: The package that serves it is not installed.
    """
    import fsspec  # type: ignore[import-untyped]
    from pyarrow import fs

    try:
        served = fsspec.filesystem(protocol)
    except ImportError as error:
        raise StorageError(f"{protocol}:// needs a package that is not installed: {error}") from None
    return fs.PyFileSystem(fs.FSSpecHandler(served))


@contextmanager
def _faults_named(url: str) -> Iterator[None]:
    """A store's fault as an error that quotes the URL; that nothing is there stays a FileNotFoundError."""
    try:
        yield
    except (FileNotFoundError, MlcRayError):
        raise
    except Exception as error:
        # What serves fsspec raises errors of its own package, as azure.core's, none of which is an OSError.
        if not isinstance(error, OSError) and type(error).__module__ == "builtins":
            raise
        text = (str(error).splitlines() or [repr(error)])[0]
        kind = StorageDeniedError if any(code in text for code in _FOR_GOOD) else StorageFaultError
        raise kind(f"{url!r} cannot be used: {text}") from None
