"""A worker that hangs ends, and the driver is told where each one was."""

import json
import subprocess
import sys
import time
from threading import Event, Semaphore

import pytest

import examples.my_storage  # noqa: F401 - registers vault://
from mlc_ray.runs import checkpoint_sizes
from mlc_ray.storage import Place
from mlc_ray.train import watchdog as module
from mlc_ray.train.watchdog import Watchdog, hang_error

HANGING = """
import sys, threading
from examples.my_storage import VaultStorage
from mlc_ray.storage import Place
from mlc_ray.train import watchdog

def stuck_in_a_collective():
    threading.Event().wait()

def hangs(*_):
    threading.Event().wait()

watchdog._LINGER, watchdog._TELLING = 0.0, float(sys.argv[4])
if watchdog._TELLING < 1:
    VaultStorage.open = VaultStorage.write_bytes = hangs
dog = watchdog.Watchdog(0.4, Place(sys.argv[1]), lease=sys.argv[2], rank=int(sys.argv[3]), step=4)
for number in dog.over(iter([1, 2]), "waiting for its batches", "in a step, with all workers"):
    dog.beat("logging", 4 + number)
if sys.argv[3] == "1":
    dog.beat("saving a checkpoint")
stuck_in_a_collective()
"""


def hang(folder, lease, rank, telling=10.0):
    return subprocess.run(
        [sys.executable, "-c", HANGING, str(folder), lease, str(rank), str(telling)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip


def told(run):
    """What the driver says of it."""
    return hang_error(run, "mine", what=f"run {str(run)!r}", to_go_on=f"mlc-ray train --resume {run}")


def test_a_hang_ends_the_process_and_the_driver_says_where_each_worker_was(tmp_path):
    assert told(tmp_path) is None
    for rank in (0, 1):
        assert hang(tmp_path, "mine", rank).returncode == 1
    assert hang(tmp_path, "of an earlier driver", 2).returncode == 1
    said = str(told(tmp_path))
    for part in (
        "rank 0 on ",
        "after step 6, while waiting for its batches",
        "; rank 1 on ",
        "while saving a checkpoint",
        f"mlc-ray train --resume {tmp_path}",
        "cluster.hang_timeout",
    ):
        assert part in said
    assert "rank 2" not in said
    stacks = (tmp_path / "logs/hang-mine-step-000006-rank-00001.txt").read_text()
    assert "stuck_in_a_collective" in stacks and "watchdog" in stacks
    older = json.loads((tmp_path / "logs/hang-mine-step-000006-rank-00000.json").read_text())
    (tmp_path / "logs/hang-mine-step-000002-rank-00000.json").write_text(json.dumps({**older, "step": 2, "time": 0.0}))
    assert "after step 2" not in str(told(tmp_path))  # the workers were started again after that one
    for rank in (0, 1):  # and they were after these, long ago: whatever ended the run now is something else
        old = json.dumps({**older, "time": time.time() - 3600})
        (tmp_path / f"logs/hang-mine-step-000006-rank-{rank:05d}.json").write_text(old)
    assert told(tmp_path) is None


def test_where_a_worker_of_a_run_elsewhere_was_is_said_and_it_ends_though_that_storage_hangs(tmp_path, monkeypatch):
    monkeypatch.setenv("VAULT", str(tmp_path / "vault"))
    run = Place("vault://team/run")
    assert hang(run, "mine", 0, telling=0.2).returncode == 1
    assert told(run) is None
    assert hang(run, "mine", 0).returncode == 1
    assert "mlc-ray train --resume vault://team/run" in str(told(run))
    assert "stuck_in_a_collective" in (run / "logs" / "hang-mine-step-000006-rank-00000.txt").read_text()


def test_files_of_a_checkpoint_that_grow_or_disappear_are_progress(tmp_path, monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(Watchdog, "_watch", lambda _: None)
    dog = Watchdog(1e-9, tmp_path, lease="mine", rank=0, step=0)
    looked, goes_on = Event(), Semaphore(0)

    def look():  # each look waits for this test, and the one after it tells that it was dealt with
        looked.set()
        goes_on.acquire()
        return checkpoint_sizes(Place(tmp_path))

    def next_look():
        looked.wait()
        looked.clear()
        goes_on.release()
        looked.wait()

    writing = tmp_path / "train/checkpoint_000004"
    (writing / "state").mkdir(parents=True)
    file = writing / "state/part"
    with dog.while_changing(look):
        next_look()
        clock[0] += 7
        next_look()
        assert dog.silent() == 7
        file.write_bytes(b"1")
        next_look()
        assert dog.silent() == 0
        clock[0] += 7
        file.write_bytes(b"12")
        next_look()
        assert dog.silent() == 0
        clock[0] += 7
        file.unlink()
        next_look()
        assert dog.silent() == 0
        clock[0] += 7
        next_look()
        assert dog.silent() == 7
        goes_on.release(2)


def test_a_worker_is_silent_since_its_last_beat_unless_it_may_wait(tmp_path, monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: clock[0])
    dog = Watchdog(0, tmp_path, lease="mine", rank=0, step=0)
    clock[0] += 7
    assert dog.silent() == 7
    dog.beat("in a step")
    assert dog.silent() == 0
    with dog.off():
        clock[0] += 3600
        assert dog.silent() == 0
    assert dog.silent() == 0
    clock[0] += 1
    assert dog.silent() == 1


def test_batches_pass_through_unchanged_and_tell_what_is_waited_for(tmp_path):
    dog, seen = Watchdog(0, tmp_path, lease="mine", rank=0, step=0), []

    def items():
        for item in "ab":
            seen.append(dog.doing)
            yield item

    assert [(item, dog.doing) for item in dog.over(items(), "waiting", "using")] == [("a", "using"), ("b", "using")]
    assert seen == ["waiting", "waiting"]
    with pytest.raises(StopIteration):
        next(dog.over(iter(()), "waiting", "using"))
