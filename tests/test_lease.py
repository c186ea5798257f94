"""One driver at a time works in a folder: within a Ray cluster by an actor's name, elsewhere by the lease file."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from ray.util.state import list_placement_groups

import examples.my_storage  # noqa: F401 - registers vault://
from mlc_ray import lease as module
from mlc_ray.lease import Holder, LeaseError, LeaseGuard, lease
from mlc_ray.storage import Place, StorageFaultError

HOLD = """
import sys, time
from mlc_ray.lease import lease
from mlc_ray.storage import Place
if len(sys.argv) > 2:
    import ray
    submission = ray.job_config.JobConfig(metadata={"job_submission_id": "test"})  # as of `ray job submit`
    ray.init(address=sys.argv[2], job_config=submission, log_to_driver=False, logging_level="ERROR")
    if sys.argv[1] == "and ends":
        sys.exit()
    class Outlives:  # as Ray Train's controller does, for some milliseconds, and this one for good
        def reserve(self):
            self.group = ray.util.placement_group([{"CPU": 0.5}])
            return self.group.wait(60)
    outlives = ray.remote(num_cpus=0)(Outlives).options(lifetime="detached", name="outlives", namespace="test").remote()
    assert ray.get(outlives.reserve.remote())
with lease(Place(sys.argv[1]), wait=False):
    print("held", flush=True)
    time.sleep(600)
"""


def hold(folder, *arguments):
    """A process that holds the lease on `folder`, once it says so."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder), *arguments], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stdout.readline() == "held\n"
    return process


def foreign(folder):
    """Write the lease of a process of another machine, which cannot be looked at from here."""
    folder.mkdir(exist_ok=True)
    holder = replace(Holder.here(), id="other", host="elsewhere", machine="another one", pid=1, node="", ray_job="")
    (folder / "lease.json").write_text(json.dumps(asdict(holder)))


def test_a_second_driver_is_refused_and_told_whose_it_is(tmp_path):
    process = hold(tmp_path / "run")
    try:
        with pytest.raises(LeaseError, match=rf"run' is held by process {process.pid} on \S+, since \d.*ends at \d"):
            lease(Place(tmp_path / "run"), wait=False).__enter__()
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    with lease(Place(tmp_path / "run"), wait=False):  # at once: its process is seen to be gone
        assert json.loads((tmp_path / "run/lease.json").read_text())["pid"] == os.getpid()
    assert not (tmp_path / "run/lease.json").exists()


def test_it_is_free_after_an_error_and_leaves_no_folder(tmp_path):
    with pytest.raises(KeyboardInterrupt), lease(Place(tmp_path / "run"), wait=False):
        raise KeyboardInterrupt
    assert not (tmp_path / "run").exists()


def test_a_lease_of_another_machine_is_taken_when_it_has_ended_and_not_before(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "SETTLE", 0.0)
    foreign(tmp_path)
    with pytest.raises(LeaseError, match="on elsewhere"):
        lease(Place(tmp_path), wait=False).__enter__()
    os.utime(tmp_path / "lease.json", (time.time() - 61, time.time() - 61))
    with lease(Place(tmp_path), wait=False) as held:
        LeaseGuard(Place(tmp_path), held).check()


@pytest.mark.parametrize("content", ["", "[]", '{"id": "of another version"}'])
def test_a_lease_that_cannot_be_read_ends_as_any_other_and_is_named(content, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "SETTLE", 0.0)
    file = tmp_path / "lease.json"
    file.write_text(content)
    with pytest.raises(LeaseError, match=rf"{file}' does not say who works there.*Remove it if .*after 20\d\d-"):
        lease(Place(tmp_path), wait=False).__enter__()
    os.utime(file, (time.time() - 61, time.time() - 61))
    with lease(Place(tmp_path), wait=False) as held:
        LeaseGuard(Place(tmp_path), held).check(now=True)
        file.write_text(content)
        with pytest.raises(LeaseError, match=r"was lost to an unknown process: lease\.json is empty, damaged"):
            LeaseGuard(Place(tmp_path), held).check(now=True)


def test_a_process_that_proc_does_not_show_is_alive_until_it_has_ended(tmp_path, monkeypatch):
    process = hold(tmp_path)
    holder = Holder(**json.loads((tmp_path / "lease.json").read_text()))
    assert not holder.has_died() and replace(holder, started="1").has_died()  # another process of its pid
    monkeypatch.setattr(module, "_started", lambda _: None)  # as another user's with hidepid=2
    assert not holder.has_died()
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert holder.has_died()


def test_waiting_takes_over_what_is_not_renewed_and_refuses_what_is(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "SETTLE", 0.0)
    foreign(tmp_path)
    with lease(Place(tmp_path), wait=True, lifetime=2.0):
        assert json.loads((tmp_path / "lease.json").read_text())["pid"] == os.getpid()
        with pytest.raises(LeaseError, match=rf"held by process {os.getpid()} "):  # it renews every half second
            lease(Place(tmp_path), wait=True, lifetime=2.0).__enter__()


def test_a_driver_whose_lease_was_taken_writes_no_more(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_CHECKED_EVERY", 0.0)
    with lease(Place(tmp_path), wait=False) as held:
        guard = LeaseGuard(Place(tmp_path), held)
        guard.check()
        foreign(tmp_path)
        with pytest.raises(LeaseError, match=r"was lost to process 1 on elsewhere"):
            guard.check()
    assert (tmp_path / "lease.json").exists()  # it is the other's


def test_a_file_that_is_gone_for_a_moment_loses_no_lease(tmp_path, monkeypatch):
    with lease(Place(tmp_path), wait=False) as held:
        file = tmp_path / "lease.json"
        aside = file.rename(tmp_path / "aside")
        monkeypatch.setattr(module.time, "sleep", lambda _: aside.exists() and aside.rename(file))
        LeaseGuard(Place(tmp_path), held).check(now=True)
        assert file.exists()


def test_storage_that_cannot_be_read_is_waited_for_as_long_as_the_lease_lives(tmp_path, monkeypatch):
    with lease(Place(tmp_path), wait=False) as held:
        guard, file = LeaseGuard(Place(tmp_path), held), tmp_path / "lease.json"
        written = file.read_text()
        file.unlink()
        file.mkdir()  # reading it is an OSError that is not "not found"

        def comes_back(_):
            file.rmdir()
            file.write_text(written)

        monkeypatch.setattr(module.time, "sleep", comes_back)
        guard.check(now=True)
        assert file.is_file()
        file.unlink()
        file.mkdir()
        with pytest.raises(StorageFaultError, match=r"could not be read for \d+ s.*Go on once the storage is back"):
            LeaseGuard(Place(tmp_path), held, lifetime=-1.0).check(now=True)
    assert file.is_dir()  # giving the lease back failed, and the block ended all the same


def test_storage_is_silent_from_the_first_look_that_failed(tmp_path, monkeypatch):
    """And not from the last one that did not: a step may take longer than the lease lives."""
    own, file, clock = Holder.here(), tmp_path / "lease.json", [0.0]

    def sleep(seconds):
        clock[0] += seconds

    def goes_away():
        file.unlink()
        file.mkdir()

    def comes_back():
        file.rmdir()
        file.write_text(json.dumps(asdict(own)))

    file.mkdir()
    comes_back()
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: clock[0], sleep=sleep))
    guard = LeaseGuard(Place(tmp_path), own.id)
    guard.check(now=True)
    goes_away()
    for clock[0] in (600.0, 650.0):
        guard.check()
    comes_back()
    clock[0] = 670.0
    guard.check()
    goes_away()
    for clock[0] in (1200.0, 1250.0):
        guard.check()
    clock[0] = 1270.0
    with pytest.raises(StorageFaultError, match=r"could not be read for 70 s"):  # cluster.max_failures applies to it
        guard.check()
    for clock[0] in (1400.0, 1500.0):  # nobody knows what was in between
        guard.check()
    clock[0] = 2000.0
    with pytest.raises(StorageFaultError, match=r"could not be read for 61 s"):
        guard.check(now=True)


def test_renewing_outlives_an_error_of_the_storage(tmp_path):
    file, own = tmp_path / "lease.json", Holder.here()
    file.mkdir()

    def comes_back():
        file.rmdir()
        file.write_text(json.dumps(asdict(own)))
        os.utime(file, (0, 0))

    def waits():  # what the renewing thread waits by: each False is a round of it
        yield False  # the file cannot be read
        comes_back()
        yield False
        yield True

    rounds = waits()
    module._renew(Place(tmp_path), own, 1.0, SimpleNamespace(wait=lambda _: next(rounds)))
    assert file.stat().st_mtime > 0


def test_of_two_clusters_that_take_over_at_once_one_finds_the_other(tmp_path, monkeypatch):
    def settle(_):  # between its writing and its look, the other one writes
        foreign(tmp_path)

    foreign(tmp_path)
    os.utime(tmp_path / "lease.json", (0, 0))
    monkeypatch.setattr(module.time, "sleep", settle)
    with pytest.raises(LeaseError, match="on elsewhere"):
        lease(Place(tmp_path), wait=False).__enter__()


@pytest.mark.parametrize("kind", ["vault", "s3"])
def test_elsewhere_a_lease_is_taken_when_it_has_ended_and_not_before(kind, request, tmp_path, monkeypatch):
    """A vault neither creates exclusively nor says when a file was written; an object store says it."""
    monkeypatch.setattr(module, "SETTLE", 0.0)
    monkeypatch.setenv("VAULT", str(tmp_path / "vault"))
    folder = Place("vault://team/run") if kind == "vault" else Place(request.getfixturevalue("s3")) / tmp_path.name
    with lease(folder, wait=False) as held:
        LeaseGuard(folder, held).check(now=True)
        for spelled in (folder, Place(f"{folder.parent}//{folder.name}/")):
            with pytest.raises(LeaseError, match=rf"{folder}' is held by process {os.getpid()} "):
                lease(spelled, wait=False).__enter__()
    assert folder.iterdir() == []
    other = replace(Holder.here(), id="other", host="elsewhere", machine="another one", pid=1, node="", ray_job="")
    (folder / "lease.json").write_json(asdict(other))
    with pytest.raises(LeaseError, match="on elsewhere"):
        lease(folder, wait=False).__enter__()
    with lease(folder, wait=True, lifetime=2.0) as held:
        guard = LeaseGuard(folder, held)
        guard.check(now=True)
        (folder / "lease.json").write_json(asdict(other))
        with pytest.raises(LeaseError, match=r"was lost to process 1 on elsewhere"):
            guard.check(now=True)


@pytest.mark.slow
def test_an_error_of_the_storage_leaves_no_name_held(tmp_path, ray_local):
    (tmp_path / "lease.json").mkdir()  # reading it is an OSError that is not "not found"
    with pytest.raises(IsADirectoryError):
        lease(Place(tmp_path), wait=False).__enter__()
    (tmp_path / "lease.json").rmdir()
    with lease(Place(tmp_path), wait=True):
        pass


@pytest.mark.slow
def test_within_a_cluster_a_killed_drivers_lease_is_free_at_once(tmp_path, ray_local, monkeypatch):
    monkeypatch.setattr(module, "_machine", lambda: "")  # nothing is known of the process: Ray alone tells
    here = ray_local.get_runtime_context().gcs_address
    process = hold(tmp_path, here)
    holder = json.loads(Path(tmp_path / "lease.json").read_text())
    assert holder["ray_job"] != ray_local.get_runtime_context().get_job_id() and holder["pid"] == process.pid
    with pytest.raises(LeaseError, match=rf"held by process {process.pid} .*, Ray job {holder['ray_job']}, since"):
        lease(Place(tmp_path), wait=False).__enter__()
    mounted = tmp_path / "mounted elsewhere"  # the same file by another path: of another name, and the driver lives
    mounted.mkdir()
    (mounted / "lease.json").symlink_to(tmp_path / "lease.json")
    os.utime(tmp_path / "lease.json", (0, 0))  # as of one whose storage hangs
    with pytest.raises(LeaseError, match=rf"mounted elsewhere' is held by process {process.pid} "):
        lease(Place(mounted), wait=False).__enter__()

    def states() -> list[str]:
        groups = list_placement_groups(here, filters=[("creator_job_id", "=", holder["ray_job"])])
        return [group.state for group in groups]

    # Another driver of the same submission: of these, Ray's `list_jobs` has the last one alone.
    subprocess.run([sys.executable, "-c", HOLD, "and ends", here], check=True)
    module._remove_groups_of(Holder(**holder))
    assert states() == ["CREATED"]
    (tmp_path / "lease.json").unlink()
    with pytest.raises(LeaseError, match="being taken by another driver of this Ray cluster"):  # the name alone holds
        lease(Place(tmp_path), wait=False).__enter__()
    (tmp_path / "lease.json").write_text(json.dumps(holder))
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    try:
        with lease(Place(tmp_path), wait=True, lifetime=1e6) as held:  # the file never grows old enough
            assert json.loads((tmp_path / "lease.json").read_text())["id"] == held
        assert states() == ["REMOVED"]
        (mounted / "lease.json").unlink()
        (mounted / "lease.json").write_text(json.dumps(holder))
        with lease(Place(mounted), wait=True, lifetime=1e6):  # its actor died with it
            pass
        own = ray_local.util.placement_group([{"CPU": 0.5}])
        assert own.wait(60)
        same_job = holder | {"ray_job": ray_local.get_runtime_context().get_job_id()}  # as of a trial of a search
        (tmp_path / "lease.json").write_text(json.dumps(same_job))
        with lease(Place(tmp_path), wait=True, lifetime=1e6):
            assert ray_local.util.placement_group_table(own)["state"] == "CREATED"
        ray_local.util.remove_placement_group(own)
    finally:
        ray_local.kill(ray_local.get_actor("outlives", namespace="test"))
