"""The files of `cluster/`: each is what the tool that reads it takes, as far as that can be told without a cluster."""

from __future__ import annotations

import copy
import gzip
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from mlc_ray.config import TrainConfig, load_config

CLUSTER = Path(__file__).resolve().parent.parent / "cluster"
TOOLS = Path(sys.executable).parent
SCHEMAS = "MLC_RAY_KUBERAY_SCHEMAS"
SKYPILOT = "MLC_RAY_SKYPILOT"
KUBERAY = {"rayjob.yaml": "ray.io_rayjobs.yaml", "raycluster.yaml": "ray.io_rayclusters.yaml"}


def read(name: str) -> Any:
    return yaml.safe_load((CLUSTER / name).read_text(encoding="utf-8"))


def cluster_of(resource: dict[str, Any]) -> dict[str, Any]:
    spec: dict[str, Any] = resource["spec"]
    return spec.get("rayClusterSpec", spec)


def pods_of(resource: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The specs of pods by group."""
    cluster = cluster_of(resource)
    groups = [{"groupName": "head", **cluster["headGroupSpec"]}, *cluster["workerGroupSpecs"]]
    return {group["groupName"]: group["template"]["spec"] for group in groups}


# ------------------------------------------------------------------------------------------------------------- KubeRay


def strict(schema: Any) -> Any:
    """A schema that refuses fields that it does not name: the API server would drop them in silence."""
    if isinstance(schema, list):
        return [strict(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    found = {name: strict(value) for name, value in schema.items()}
    named = isinstance(schema.get("properties"), dict) and schema.get("type") == "object"
    if named and "additionalProperties" not in schema and not schema.get("x-kubernetes-preserve-unknown-fields"):
        found["additionalProperties"] = False
    if schema.get("x-kubernetes-int-or-string"):
        found.pop("type", None)
    return found


@pytest.fixture(scope="module")
def definitions() -> dict[str, Any]:
    """KubeRay's published resource definitions, by file name."""
    if not (folder := os.environ.get(SCHEMAS)):
        pytest.skip(
            f"{SCHEMAS} names no folder: put KubeRay's resource definitions there, e.g. of "
            "https://github.com/ray-project/kuberay/tree/v1.7.0/helm-chart/kuberay-operator/crds (also as .gz)"
        )
    found = {}
    for name in KUBERAY.values():
        packed = Path(folder, f"{name}.gz")
        text = gzip.decompress(packed.read_bytes()) if packed.is_file() else Path(folder, name).read_bytes()
        (version,) = (each for each in yaml.load(text, yaml.CSafeLoader)["spec"]["versions"] if each["name"] == "v1")
        found[name] = strict(version["schema"]["openAPIV3Schema"])
    return found


@pytest.mark.parametrize("name", KUBERAY)
def test_kuberay_takes_it(name: str, definitions: dict[str, Any]) -> None:
    resource = read(name)
    validator = jsonschema.Draft7Validator(definitions[KUBERAY[name]])

    def faults(of: Any) -> list[str]:
        return [error.message for error in validator.iter_errors({**of, "metadata": {}})]

    assert faults(resource) == []
    wrong = copy.deepcopy(resource)
    pods_of(wrong)["gpu"]["containers"][0]["volumeMount"] = []
    cluster_of(wrong)["workerGroupSpecs"][0]["replicas"] = "two"
    assert [fault for fault in faults(wrong) if "'volumeMount' was unexpected" in fault]
    assert [fault for fault in faults(wrong) if "'two' is not of type 'integer'" in fault]


def pods() -> Iterator[Any]:
    for name in KUBERAY:
        for group, spec in pods_of(read(name)).items():
            yield pytest.param(spec, id=f"{name}-{group}")


@pytest.mark.parametrize("spec", list(pods()))
def test_kubernetes_takes_its_pods(spec: dict[str, Any]) -> None:
    def check(of: dict[str, Any]) -> None:
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "a"}, "spec": of}
        kubernetes_validate.validate(pod, kubernetes_validate.latest_version(), strict=True)

    check(spec)
    with pytest.raises(kubernetes_validate.ValidationError):
        check({**spec, "container": spec["containers"]})


@pytest.mark.parametrize("spec", list(pods()))
def test_pods_ask_for_what_runs_need(spec: dict[str, Any]) -> None:
    assert spec["securityContext"]["runAsNonRoot"] and spec["securityContext"]["runAsUser"] > 0
    (container,) = spec["containers"]
    assert not container["securityContext"]["allowPrivilegeEscalation"]
    assert {"cpu", "memory", "ephemeral-storage"} <= container["resources"]["requests"].keys()
    assert {"name": "metrics", "containerPort": 8080} in container["ports"]
    assert container["readinessProbe"] and container["livenessProbe"]
    mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
    volumes = {volume["name"]: volume for volume in spec["volumes"]}
    assert volumes[mounts["/dev/shm"]]["emptyDir"]["medium"] == "Memory"
    assert "persistentVolumeClaim" in volumes[mounts["/shared"]]


@pytest.mark.parametrize("name", KUBERAY)
def test_clusters_ask_for_a_token(name: str) -> None:
    assert cluster_of(read(name))["authOptions"] == {"mode": "token"}


@pytest.mark.parametrize("name", KUBERAY)
def test_heads_have_the_ports_that_others_ask_for(name: str) -> None:
    """Its service has the ports that the container names, or KubeRay's own where it names none."""
    (container,) = pods_of(read(name))["head"]["containers"]
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert ports["gcs"] == 6379 and ports["dashboard"] == 8265


def test_no_container_of_the_autoscaling_cluster_may_become_root() -> None:
    autoscaler = read("raycluster.yaml")["spec"]["autoscalerOptions"]["securityContext"]
    assert not autoscaler["allowPrivilegeEscalation"] and autoscaler["capabilities"] == {"drop": ["ALL"]}


def settings_in(command: str, recipe: str) -> TrainConfig:
    """The settings that a command of a file gives to a recipe."""
    words = subprocess.run(
        ["bash", "-c", f'args=({command}); printf "%s\\n" "${{args[@]}}"'], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    given = [words[index + 1] for index, word in enumerate(words) if word == "--set"]
    return load_config(TrainConfig, CLUSTER.parent / "configs" / recipe, given)


def test_the_job_trains_on_all_its_gpus_and_may_be_retried() -> None:
    job = read("rayjob.yaml")
    config = settings_in(job["spec"]["entrypoint"], "qwen2.5-7b.yaml")
    (group,) = cluster_of(job)["workerGroupSpecs"]
    (container,) = group["template"]["spec"]["containers"]
    assert config.cluster.workers == group["replicas"] * int(container["resources"]["limits"]["nvidia.com/gpu"])
    assert config.cluster.accelerator == "gpu"
    assert (config.resume, job["spec"]["backoffLimit"], job["spec"]["shutdownAfterJobFinishes"]) == ("auto", 3, True)
    assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"]


# ---------------------------------------------------------------------------------------------------------- the others


def test_ray_up_takes_it() -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    prepared = prepare_config(read("ray-cluster.yaml"))
    validate_config(prepared)
    assert prepared["available_node_types"]
    with pytest.raises(jsonschema.ValidationError):
        validate_config(prepare_config({**read("ray-cluster.yaml"), "setup_command": []}))


def scripts() -> Iterator[Any]:
    for file in sorted(CLUSTER.glob("*.sh")):
        yield pytest.param(file.read_text(encoding="utf-8"), id=file.name)
    task = read("sky.yaml")
    for part in ("setup", "run"):
        yield pytest.param(f"#!/usr/bin/env bash\n{task[part]}", id=f"sky.yaml-{part}")


@pytest.mark.parametrize("script", list(scripts()))
def test_shells_take_it(script: str) -> None:
    for command in (["bash", "-n", "/dev/stdin"], [str(TOOLS / "shellcheck"), "--exclude=SC1090", "-"]):
        done = subprocess.run(command, input=script, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


COMMANDS = {
    "scontrol": "printf '%s\\n' one two three",
    "srun": 'case "$*" in *--head*) sleep 3 ;; esac',
    "ray": "true",
    "python": """case "$*" in
    *mlc_ray.nodes*) until [ "$(grep -c ^srun "$CALLS")" = 3 ]; do sleep 0.05; done; exit "$JOINING" ;;
    *) echo token ;;
esac""",
    "mlc-ray": "true",
}
"""What slurm.sh calls: each writes its words down, and does no more than the script needs."""


@pytest.mark.parametrize("joining", [0, 2])
def test_a_slurm_job_trains_once_all_its_nodes_have_joined(joining: int, tmp_path: Path) -> None:
    """The script in an environment as Slurm makes it, with recorders in the place of Slurm's commands and ours."""
    (tmp_path / "venv" / "bin").mkdir(parents=True)
    for name, does in COMMANDS.items():
        file = tmp_path / "venv" / "bin" / name
        file.write_text(f'#!/bin/bash\necho "{name} $*" >>"$CALLS"\n{does}\n')
        file.chmod(0o755)
    (tmp_path / "venv" / "bin" / "activate").write_text(f'export PATH="{tmp_path}/venv/bin:$PATH"\n')
    slurm = {
        "SLURM_GPUS_ON_NODE": "8", "SLURM_JOB_ID": "70001", "SLURM_JOB_NODELIST": "n[1-3]", "SLURM_CPUS_PER_TASK": "64",
        "MLC_RAY_SHARED": str(tmp_path), "MLC_RAY_VENV": str(tmp_path / "venv"), "CALLS": str(tmp_path / "calls"),
        "JOINING": str(joining), "PATH": os.environ["PATH"],
    }  # fmt: skip
    done = subprocess.run(["bash", str(CLUSTER / "slurm.sh")], env=slurm, capture_output=True, text=True, timeout=60)
    assert done.returncode == joining, done.stderr
    calls = (tmp_path / "calls").read_text().splitlines()
    steps = [call for call in calls if call.startswith("srun")]
    assert len(steps) == 3 and all("--cpus-per-task=64" in step and "--num-cpus=64" in step for step in steps)
    runs = [call for call in calls if call.startswith("mlc-ray train")]
    if joining:
        assert runs == []
    else:
        (run,) = runs
        assert calls.index("python -m mlc_ray.nodes 3 600") < calls.index(run)
        assert "cluster.workers=24" in run
    assert not list(tmp_path.glob(".mlc_ray-*.token")), "it is removed with the job"


# Reads SkyPilot's schemas of a task and of its resources, as its server has them. Its `__init__` and the modules below
# bring clouds, a database and a server, of which these schemas read nothing.
READ_SKYPILOT = """
import importlib, json, os, sys
from pathlib import Path
from types import ModuleType
from unittest.mock import MagicMock
folder = Path(sys.argv[1])
for name in ("sky", "sky.adaptors", "sky.setup_files", "sky.skylet", "sky.utils"):
    made = sys.modules[name] = ModuleType(name)
    made.__path__, made.__version__ = [str(folder.joinpath(*name.split(".")))], "0"
for name in ("sky_logging", "adaptors.common", "skylet.configs", "skylet.log_lib", "utils.message_utils",
             "utils.ux_utils", "server", "server.daemons"):
    sys.modules[f"sky.{name}"] = MagicMock()
os.environ["IS_SKYPILOT_SERVER"] = "true"  # a client passes on what it does not know
schemas = importlib.import_module("sky.utils.schemas")
print(json.dumps([schemas.get_task_schema(), schemas.get_resources_schema()]))
"""


@pytest.fixture(scope="module")
def skypilot() -> list[jsonschema.Draft202012Validator]:
    """What SkyPilot takes as a task, and as its resources; by the folder named, or the package if it is installed."""
    folder = os.environ.get(SKYPILOT)
    if folder is None and (found := importlib.util.find_spec("sky")) is not None and found.origin is not None:
        folder = str(Path(found.origin).parents[1])
    if folder is None:
        pytest.skip(f"{SKYPILOT} names no folder: unpack SkyPilot there (unzip skypilot-0.14.1-py3-none-any.whl)")
    read = subprocess.run([sys.executable, "-c", READ_SKYPILOT, folder], capture_output=True, text=True)
    assert read.returncode == 0, read.stderr
    return [jsonschema.Draft202012Validator(schema) for schema in json.loads(read.stdout)]


def test_skypilot_takes_its_fields(skypilot: list[jsonschema.Draft202012Validator]) -> None:
    def faults(of: dict[str, Any]) -> list[str]:
        parts = (of, of["resources"])
        return [
            error.message for schema, part in zip(skypilot, parts, strict=True) for error in schema.iter_errors(part)
        ]

    task = read("sky.yaml")
    assert faults(task) == []
    assert ["'node' was unexpected" in fault for fault in faults({**task, "node": 2})] == [True]
    assert faults({**task, "num_nodes": "two"})
    wrong = {"disk": 512}, {"use_spot": "perhaps"}, {"job_recovery": {"max_restarts": 3}}
    for each in wrong:
        assert len(faults({**task, "resources": {**task["resources"], **each}})) == 1


def test_sky_trains_once_all_its_nodes_have_joined() -> None:
    lines = read("sky.yaml")["run"].splitlines()
    waits = [number for number, line in enumerate(lines) if "mlc_ray.nodes" in line]
    trains = [number for number, line in enumerate(lines) if "mlc-ray train" in line]
    assert waits and trains and waits[0] < trains[0]
    assert lines[waits[0]].split()[:4] == ["python", "-m", "mlc_ray.nodes", '"$SKYPILOT_NUM_NODES"']


def test_sky_names_what_it_reads() -> None:
    task = read("sky.yaml")
    given = {*task["envs"], *task["secrets"]}
    assert all(f"${name}" in task["run"] for name in given - {"HF_TOKEN"})
    assert "HF_TOKEN" in task["run"]
    assert task["num_nodes"] > 1 and task["file_mounts"]["/shared/data"]["mode"] == "MOUNT"


@pytest.mark.parametrize("name", ["Dockerfile.cpu", "Dockerfile.cuda"])
def test_dockerfiles_have_no_fault(name: str) -> None:
    done = subprocess.run([str(TOOLS / "hadolint"), "--no-color", str(CLUSTER / name)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    users = [line for line in (CLUSTER / name).read_text(encoding="utf-8").splitlines() if line.startswith("USER ")]
    assert users == ["USER 1000"]  # that of the pods' securityContext


@pytest.mark.parametrize("name", ["Dockerfile.cpu", "Dockerfile.cuda"])
def test_the_user_of_an_image_owns_the_folder_that_pip_writes_into(name: str) -> None:
    """WORKDIR makes a folder root's, and COPY --chown leaves it so."""
    text = (CLUSTER / name).read_text(encoding="utf-8")
    assert 0 < text.index("install --directory --owner=ray --group=ray /mlc_ray") < text.index("WORKDIR /mlc_ray")
    assert "**/*.egg-info" in (CLUSTER.parent / ".dockerignore").read_text(encoding="utf-8").splitlines()


@pytest.mark.parametrize("name", KUBERAY)
def test_pods_have_the_secrets_that_drivers_pass_on_and_shared_volumes_are_not_walked(name: str) -> None:
    pods = pods_of(read(name))
    assert pods["head"]["containers"][0]["envFrom"][0]["secretRef"]["name"] == "mlc-ray-secrets"
    for pod in pods.values():
        assert pod["securityContext"]["fsGroupChangePolicy"] == "OnRootMismatch"
