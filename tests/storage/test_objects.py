"""Object stores beside what `test_places` asks of every storage: settings, faults, ranges, other stores by fsspec."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from fsspec.implementations.memory import MemoryFile, MemoryFileSystem
from pyarrow import fs

from mlc_ray.storage import Place, StorageDeniedError, StorageError, StorageFaultError, storage_of
from mlc_ray.storage.objects import FsspecStorage, s3_options
from mlc_ray.train.file_writer import with_retries


def test_the_endpoint_comes_from_the_environment() -> None:
    assert s3_options({}) == {}
    assert s3_options({"AWS_REGION": "eu-west-1"}) == {"region": "eu-west-1"}
    assert s3_options({"AWS_ENDPOINT_URL": "https://minio:9000"}) == {
        "endpoint_override": "minio:9000", "scheme": "https", "region": "us-east-1",
    }  # fmt: skip
    both = {"AWS_ENDPOINT_URL": "http://other", "AWS_ENDPOINT_URL_S3": "http://own", "AWS_DEFAULT_REGION": "r"}
    assert s3_options(both) == {"endpoint_override": "own", "scheme": "http", "region": "r"}
    with pytest.raises(StorageError, match=r"AWS_ENDPOINT_URL='minio:9000' is not a URL"):
        s3_options({"AWS_ENDPOINT_URL": "minio:9000"})


@pytest.mark.parametrize("url", ["s3://bucket/a?secret=x", "s3://key:secret@bucket/a", "s3:///a"])
def test_no_secret_is_written_into_a_url(url: str) -> None:
    with pytest.raises(StorageError, match=r"credentials come from the environment"):
        storage_of(url).exists(url)


def test_what_a_store_refuses_for_good_is_said_at_once(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tries: list[Place] = []

    def write() -> None:
        tries.append(Place(s3) / "file")
        tries[-1].write_text("x")

    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "another")
    with pytest.raises(StorageDeniedError, match=r"'s3://test/file' cannot be used: .*SIGNATURE_DOES_NOT_MATCH"):
        with_retries("writing", write)
    assert len(tries) == 1


def test_no_bucket_is_a_refusal_for_good(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: object, **__: object) -> None:  # the server of these tests makes a bucket that is written to
        raise OSError("AWS Error NO_SUCH_BUCKET during PutObject operation: The specified bucket does not exist")

    monkeypatch.setattr("fsspec.implementations.memory.MemoryFileSystem.info", none)
    with pytest.raises(StorageDeniedError, match="NO_SUCH_BUCKET"):
        Memory().exists("memory://none/file")


def test_ranges_are_read_without_the_rest(s3: str, tmp_path: Path) -> None:
    (tmp_path / "large").write_bytes(bytes(range(256)) * (100_000))  # 25.6 MB, more than one part
    place = Place(s3) / tmp_path.name / "large"
    place.storage.publish(tmp_path / "large", str(place))
    with place.open() as file:
        file.seek(20_000_003)
        assert file.read(5) == bytes(((20_000_003 + index) % 256) for index in range(5))
    place.storage.fetch(str(place), tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == (tmp_path / "large").read_bytes()


OVERWRITE = """
import sys
from mlc_ray.storage import storage_of

def pieces():
    for _ in range(2):
        yield bytes(16 << 20)
    raise KeyboardInterrupt

try:
    storage_of(sys.argv[1])._stream(pieces(), sys.argv[1])
except KeyboardInterrupt:
    print("interrupted")
"""


def test_an_interrupted_overwrite_leaves_the_older_object(s3: str, tmp_path: Path) -> None:
    place = Place(s3) / tmp_path.name / "kept"
    place.write_bytes(b"older")
    command = [sys.executable, "-c", OVERWRITE, str(place)]  # a process, since its end closes streams as well
    assert subprocess.run(command, check=True, capture_output=True, text=True).stdout == "interrupted\n"
    assert place.read_text() == "older"
    assert place.parent.sizes() == {"kept": 5}


def test_a_store_that_refuses_is_named(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "another")
    with pytest.raises(StorageFaultError, match=rf"'{s3}/x' cannot be used: .*SIGNATURE_DOES_NOT_MATCH"):
        (Place(s3) / "x").write_text("")
    with pytest.raises(StorageError, match=r"needs a package that is not installed"):
        Place("az://container/x").exists()


class Memory(FsspecStorage):
    protocol = "memory"


def test_an_object_is_fetched_in_few_requests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads = []  # pyarrow keeps no buffer: each is a request to a store

    class Counted(MemoryFile):
        def read(self, size: int = -1) -> bytes:
            reads.append(size)
            return bytes(super().read(size))

    storage, content = Memory(), bytes(range(256)) * 160_000  # 41 MB
    storage.write_parts("memory://bucket/many/large", [content])
    monkeypatch.setattr(MemoryFileSystem.store["/bucket/many/large"], "__class__", Counted)
    storage.fetch("memory://bucket/many", tmp_path / "many")
    assert (tmp_path / "many" / "large").read_bytes() == content
    assert len(reads) <= 4  # three pieces, and the end
    reads.clear()
    with storage.open("memory://bucket/many/large") as opened:
        assert opened.read() == content
    assert len(reads) == 1
    storage.remove("memory://bucket/many")


def test_what_has_no_atomic_replacing_is_not_served() -> None:
    with pytest.raises(StorageError, match=r"hdfs:// cannot be opened here"):
        storage_of("hdfs://node/x")


class AzureError(Exception):
    """As azure.core's, the errors of which are none of Python's."""


def test_what_fsspec_serves_is_a_storage() -> None:
    storage = Memory()
    with storage.open("memory://bucket/a/b.txt", "wb") as file:
        file.write(b"one")
    assert storage.exists("memory://bucket/a/b.txt") and not storage.exists("memory://bucket/a")
    assert storage.list("memory://bucket/a") == ["b.txt"]
    with storage.open("memory://bucket/a/b.txt") as file:
        assert file.read() == b"one"
    storage.remove("memory://bucket/a")
    assert storage.list("memory://bucket/a") == []
    assert isinstance(storage.file_system("memory://bucket"), fs.PyFileSystem)


@pytest.mark.parametrize("fault", [ConnectionResetError("away"), AzureError("away"), KeyError("away")])
def test_a_fault_that_a_package_tells_in_its_own_way_is_one_of_the_store(
    fault: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(*_: object, **__: object) -> None:
        raise fault

    monkeypatch.setattr("fsspec.implementations.memory.MemoryFileSystem.info", away)
    is_a_bug = isinstance(fault, KeyError)
    with pytest.raises(KeyError if is_a_bug else StorageFaultError, match="away"):
        Memory().exists("memory://bucket/away")


def test_a_folder_that_is_listed_after_its_last_file_is_gone_needs_no_removing(monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(_: object, path: str, **__: object) -> None:
        raise FileNotFoundError(path)

    storage = Memory()
    storage.write_parts("memory://bucket/lingering/a", [b"1"])
    monkeypatch.setattr("fsspec.implementations.memory.MemoryFileSystem.rm", gone)
    storage.remove("memory://bucket/lingering")
