"""What writes on this machine leaves behind when its process is killed: nothing that the next one does not remove."""

from __future__ import annotations

import errno
import fcntl
import multiprocessing
import os
import signal
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from mlc_ray.storage import Place, atomic_folder, remove_abandoned, scratch_folder
from mlc_ray.storage.atomic import ABANDONED_SECONDS
from tests.storage.test_places import place, vault  # noqa: F401 - fixtures


def hold(sent: Connection) -> None:
    with scratch_folder() as folder:
        (folder / "file").write_text("half", encoding="utf-8")
        sent.send(str(folder))
        signal.pause()


def test_a_killed_process_s_scratch_folder_is_removed_and_a_living_one_s_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    context = multiprocessing.get_context("fork")
    received, sent = context.Pipe()
    process = context.Process(target=hold, args=(sent,))
    process.start()
    held = Path(received.recv())
    os.utime(held, (0, 0))  # long enough ago
    with scratch_folder() as own:
        assert (held / "file").is_file() and own.is_dir()
    assert not own.exists()
    process.kill()
    process.join()
    with scratch_folder() as own:
        assert [path.name for path in tmp_path.iterdir()] == [own.name]
    held.mkdir()  # of a process that is about to lock it
    with scratch_folder() as own:
        assert {path.name for path in tmp_path.iterdir()} == {held.name, own.name}


def test_a_folder_of_a_user_or_of_another_host_is_not_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with scratch_folder() as own:
        host, user, _ = own.name.rsplit("-", 2)
    names = ["mlc_ray-runs", f"{host}x-{user}-abcdefgh", f"{host}-{user}9-abcdefgh", f"{host}-{user}-a-abcdefgh"]
    for name in (*names, own.name):
        (tmp_path / name).mkdir()
        os.utime(tmp_path / name, (0, 0))
    with scratch_folder() as another:
        assert {path.name for path in tmp_path.iterdir()} == {*names, another.name}


def test_where_folders_cannot_be_locked_none_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(fcntl, "flock", no_locks)
    with scratch_folder() as used:
        os.utime(used, (0, 0))
        with scratch_folder() as own:
            assert used.is_dir() and own.is_dir()
    assert list(tmp_path.iterdir()) == []


def make(target: Path, sent: Connection) -> None:
    with atomic_folder(target) as folder:
        (folder / "half").write_text("half", encoding="utf-8")
        sent.send(str(folder))
        signal.pause()


def test_what_a_killed_maker_left_goes_at_the_next_making_and_a_living_one_s_stays(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    received, sent = context.Pipe()
    process = context.Process(target=make, args=(tmp_path / "first", sent))
    process.start()
    held = Path(received.recv())
    os.utime(held / "half", (0, 0))
    os.utime(held, (0, 0))
    with atomic_folder(tmp_path / "second"):
        assert (held / "half").is_file()
    process.kill()
    process.join()
    with atomic_folder(tmp_path / "third") as own:  # just now, and whatever is made
        assert {path.name for path in tmp_path.iterdir()} == {"second", own.name}
    assert {path.name for path in tmp_path.iterdir()} == {"second", "third"}


def test_another_host_s_half_made_folder_goes_once_nobody_wrote_to_it_for_a_day(tmp_path: Path) -> None:
    half = tmp_path / ".first.tmp-0123abcd-7-89abcdef"  # whether it is locked there is not seen here
    (half / "inside").mkdir(parents=True)
    (half / "inside" / "file").touch()
    a_day_ago = time.time() - ABANDONED_SECONDS - 1
    for path in (half / "inside", half):
        os.utime(path, (a_day_ago, a_day_ago))
    with atomic_folder(tmp_path / "second"):
        assert half.is_dir()
    os.utime(half / "inside" / "file", (a_day_ago, a_day_ago))
    with atomic_folder(tmp_path / "third"):
        assert not half.exists()


def test_temporary_files_of_a_day_ago_go_wherever_they_are(
    place: Place,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ours = [
        ".lease.json.now-" + "0" * 32,
        ".lease.json.tmp-01234567",
        ".nonce-" + "a" * 32,
        ".run.json.tmp-0123abcd-7-00000000",
    ]
    for name in (*ours, ".work-01234567/rejects", ".users-own.tmp", ".nonce", "run.json", "work-01234567/file"):
        (place / name).write_text("")
    before = place.sizes().keys()
    remove_abandoned(place)
    assert place.sizes().keys() == before
    monkeypatch.setattr("mlc_ray.storage.atomic.ABANDONED_SECONDS", -60.0)
    monkeypatch.setattr("mlc_ray.storage.leftovers.ABANDONED_SECONDS", -60.0)
    remove_abandoned(place)
    if place.url.startswith("vault"):  # which does not say when something was written
        assert place.sizes().keys() == before
    else:
        assert place.sizes().keys() == {".users-own.tmp", ".nonce", "run.json", "work-01234567/file"}
