"""What writes on this machine leaves behind when its process is killed: nothing that the next one does not remove."""

from __future__ import annotations

import errno
import fcntl
import multiprocessing
import os
import signal
import tempfile
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from mlc_ray.storage import scratch_folder


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
