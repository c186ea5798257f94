"""What writes on this machine leaves behind when its process is killed: nothing that the next one does not remove."""

from __future__ import annotations

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
    (tmp_path / "mlc_ray-just-made").mkdir()  # of a process that is about to lock it
    with scratch_folder() as own:
        assert len(list(tmp_path.iterdir())) == 2
