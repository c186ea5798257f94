"""In which type a machine computes natively, and that a cluster takes what all of its nodes do; the memory it has."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from mlc_ray import device
from mlc_ray.cluster import unprotected, with_dtype
from mlc_ray.config import EngineSection, ModelSection
from mlc_ray.device import cpu_flags, host_memory, of_cpu, of_gpus, resolved


def test_a_cpu_computes_bfloat16_with_either_instruction_set() -> None:
    assert of_cpu({"avx2", "avx512f", "avx512_bf16"}).dtype == "bfloat16"
    assert of_cpu({"avx2", "amx_bf16"}).dtype == "bfloat16"
    assert of_cpu({"avx2", "avx512f", "avx512_fp16", "amx_tile"}).dtype == "float32"
    assert "avx512_bf16" in of_cpu(()).reason


def test_gpus_compute_bfloat16_if_all_are_from_ampere_on() -> None:
    assert of_gpus([(8, 0), (9, 0)]).dtype == "bfloat16"
    assert of_gpus([(9, 0), (7, 5)]) == ("float32", "a GPU has capability 7.5, below 8.0")
    assert of_gpus([]).dtype == "float32"


def test_flags_are_those_that_every_core_has(tmp_path: Path) -> None:
    file = tmp_path / "cpuinfo"
    file.write_text("processor: 0\nflags\t\t: fpu avx2 avx512_bf16\nbugs: x\n\nprocessor: 1\nflags\t\t: fpu avx2\n")
    assert cpu_flags(file) == {"fpu", "avx2"}
    file.write_text("processor: 0\nFeatures: fp asimd bf16\n")  # an ARM
    assert cpu_flags(file) == frozenset()
    assert cpu_flags(tmp_path / "absent") == frozenset()


def test_only_auto_is_resolved(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "cpu_flags", lambda: {"amx_bf16"})
    assert resolved("auto", gpu=False) == "bfloat16"
    assert resolved("float32", gpu=False) == "float32"
    model = ModelSection(path="m", dtype="float32")
    assert with_dtype(model, gpu=False) is model  # and no cluster was asked


def without_avx512(code: str, repository: Path) -> subprocess.CompletedProcess[str]:
    """Run Python code as on a machine whose CPU has AVX2 and nothing newer."""
    environment = {**os.environ, "PYTHONPATH": f"{repository / 'tests' / 'avx2'}{os.pathsep}{repository}",
                   "MLC_RAY_TEST_NO_AVX512": "1"}  # fmt: skip
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120, check=True
    )


def test_the_avx2_environment_reaches_torch_and_us(repository: Path) -> None:
    code = (
        "import json, torch; from mlc_ray.device import native_dtype; "
        "print(json.dumps([torch.cpu._is_avx512_supported(),"
        "torch.cpu._is_avx512_bf16_supported(), torch.cpu._is_amx_tile_supported(), native_dtype(gpu=False).dtype]))"
    )
    assert json.loads(without_avx512(code, repository).stdout) == [False, False, False, "float32"]


def test_a_cluster_of_several_nodes_without_tokens_is_warned_of() -> None:
    assert unprotected(1, {}) is None
    assert unprotected(3, {"RAY_AUTH_MODE": "token"}) is None
    for environment in ({}, {"RAY_AUTH_MODE": "disabled"}):
        warning = unprotected(3, environment)
        assert warning is not None
        assert "3 NODES" in warning
        assert "RAY_AUTH_MODE=token" in warning


TWO_NODES = """
import logging, os, sys
from ray.cluster_utils import Cluster
os.environ["RAY_AUTH_MODE"] = "disabled"
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
cluster.add_node(num_cpus=int(sys.argv[1]), env_vars={"MLC_RAY_TEST_NO_AVX512": "1"})
logging.basicConfig(format="%(message)s", level=logging.INFO)
from mlc_ray import device
from mlc_ray.cluster import connect, with_dtype
from mlc_ray.config import EngineSection
device.cpu_flags = lambda: {"avx512_bf16"}  # of this process: the other node's tasks read their own
device._numbers = lambda told: {"MemTotal:": 1 << 50, "MemAvailable:": 1 << 50}
device._limits = lambda root: []
connect(cluster.address)
dtype = with_dtype(EngineSection(), gpu=False).dtype
from mlc_ray.plan.there import cluster_there
found = cluster_there(gpu=False)
print(found.nodes, found.node_memory)
from mlc_ray.doctor import doctor
print(*doctor(sys.argv[2], address=cluster.address), dtype, sep="\\n")
"""


@pytest.mark.slow
@pytest.mark.parametrize(("cpus", "expected"), [(1, "float32"), (0, "bfloat16")])
def test_the_node_with_the_least_decides_for_all_that_may_compute(
    repository: Path, tmp_path: Path, cpus: int, expected: str
) -> None:
    environment = {**os.environ, "PYTHONPATH": f"{repository / 'tests' / 'avx2'}{os.pathsep}{repository}"}
    done = subprocess.run(
        [sys.executable, "-c", TWO_NODES, str(cpus), str(tmp_path / "runs")],
        env=environment,
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1] == expected
    assert f"dtype: auto is {expected}" in done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == (f"2 {host_memory().total}" if cpus else f"1 {1 << 60}")
    assert len([line for line in lines if line.startswith("ok    node ")]) == 2
    assert [line for line in lines if line.startswith("FAIL")] == [line for line in lines if "2 NODES" in line] != []
    assert not (tmp_path / "runs").exists()
    assert "CLUSTER OF 2 NODES IS JOINED WITHOUT RAY_AUTH_MODE=token" in done.stderr


def test_defaults_are_auto() -> None:
    assert ModelSection(path="m").dtype == EngineSection().dtype == "auto"


def told(root: Path, files: dict[str, str]) -> Path:
    """A folder with such files, as the kernel writes them, and a machine's memory: 100 KiB, 8 of which are free."""
    for name, text in {"proc/meminfo": "MemTotal:     100 kB\nMemAvailable:   8 kB\n", **files}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"{text}\n")
    return root


def v2(group: str, limit: int | str, used: int, dropped: int) -> dict[str, str]:
    folder = f"sys/fs/cgroup{group}"
    return {
        f"{folder}/memory.max": str(limit),
        f"{folder}/memory.current": str(used),
        f"{folder}/memory.stat": f"anon 1\ninactive_file {dropped}\nactive_file 7",
    }


def v1(group: str, limit: int, used: int, dropped: int) -> dict[str, str]:
    folder = f"sys/fs/cgroup/memory{group}"
    return {
        f"{folder}/memory.limit_in_bytes": str(limit),
        f"{folder}/memory.usage_in_bytes": str(used),
        f"{folder}/memory.stat": f"inactive_file 1\nhierarchical_memory_limit 3\ntotal_inactive_file {dropped}",
    }


UNLIMITED = 9223372036854771712  # as version 1 writes it, rounded to pages


@pytest.mark.parametrize(
    ("own", "total", "available", "group"),
    [
        ("/", 9000, 7000, "/"),  # the limit of the root, as a container sees its own
        ("/jobs/step", 5000, 900, "/jobs"),  # that of the job above: 5000 - 4500, of which 400 can be dropped
        ("/jobs/elsewhere", 5000, 900, "/jobs"),  # a group that has no limit of its own
        ("/../outside", 9000, 7000, "/"),
    ],
)
def test_the_least_of_all_limits_above_a_process_counts(
    tmp_path: Path, own: str, total: int, available: int, group: str
) -> None:
    files = {**v2("", 9000, 2000, 0), **v2("/jobs", 5000, 4500, 400), **v2("/jobs/step", "max", 10, 5)}
    root = told(tmp_path, {"proc/self/cgroup": f"1:name=systemd:/jobs\n0::{own}", **files})
    assert host_memory(root) == (total, available, group)


@pytest.mark.parametrize(
    ("own", "total", "available", "group"),
    [
        ("/docker/a1", 6000, 2500, "/"),  # of a container that sees its own group alone, by the host's name
        ("/slurm/job_7/step_0", 5000, 900, "/slurm/job_7"),
        ("/free", 6000, 2500, "/"),
    ],
)
def test_limits_of_version_1_count_beside_an_empty_hierarchy_of_version_2(
    tmp_path: Path, own: str, total: int, available: int, group: str
) -> None:
    files = {
        **v1("", 6000, 4000, 500),
        **v1("/slurm/job_7", 5000, 4500, 400),
        **v1("/slurm/job_7/step_0", UNLIMITED, 10, 5),
        **v1("/free", UNLIMITED, 10, 5),
    }
    names = f"9:name=systemd:/other\n4:hugetlb,memory:{own}\n3:cpuset:/\n0::/system"
    assert host_memory(told(tmp_path, {"proc/self/cgroup": names, **files})) == (total, available, group)


def test_a_limit_above_the_machine_s_memory_is_none(tmp_path: Path) -> None:
    machine = (100 * 1024, 8 * 1024, None)
    assert host_memory(told(tmp_path, {})) == machine
    names = "4:memory:/job\n0::/"
    root = told(tmp_path / "1", {"proc/self/cgroup": names, **v1("", UNLIMITED, 9, 0), **v1("/job", UNLIMITED, 9, 0)})
    assert host_memory(root) == machine
    assert host_memory(told(tmp_path / "2", {"proc/self/cgroup": "0::/", **v2("", "max", 9, 0)})) == machine
    # One that is larger than the machine's memory, and so much used that less is left within it.
    full = {"proc/self/cgroup": "0::/", **v2("", 200_000, 199_000, 0)}
    assert host_memory(told(tmp_path / "3", full)) == (100 * 1024, 1000, None)
    over = {"proc/self/cgroup": "0::/", "sys/fs/cgroup/memory.max": "50", "sys/fs/cgroup/memory.current": "60"}
    assert host_memory(told(tmp_path / "4", over)) == (50, 0, "/")


def test_what_this_machine_has_is_known() -> None:
    found = host_memory()
    assert 0 < found.total <= psutil.virtual_memory().total
    assert 0 < found.available <= found.total or not Path("/proc/meminfo").is_file()
