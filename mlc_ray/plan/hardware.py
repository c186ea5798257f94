"""GPUs by what their data sheets say, and the cluster that a plan is for."""

from __future__ import annotations

import re
from dataclasses import dataclass

from mlc_ray.device import host_memory, peak_tflops
from mlc_ray.errors import MlcRayError


class HardwareError(MlcRayError):
    """A GPU is not known, or a cluster makes no sense; the message names what is known."""


@dataclass(frozen=True)
class Gpu:
    """A GPU: its memory in bytes, what that gives a second, and what its links to those of the node give a second.

    `peak` is its dense bfloat16, in operations a second, `single` its float32 outside tensor cores, which PyTorch takes
    for float32 by default. `memory` is what CUDA offers, a little below the sheet's.
    """

    name: str
    memory: int
    bandwidth: float
    link: float
    peak: float
    single: float


_SHEETS = {
    # memory in GiB that a process can have, its bandwidth in TB/s, links in GB/s and direction, float32 in TFLOP/s
    "a100-40": ("NVIDIA A100", 39.4, 1.555, 300, 19.5),
    "a100": ("NVIDIA A100", 79.1, 2.039, 300, 19.5),
    "h100": ("NVIDIA H100", 79.1, 3.35, 450, 67),
    "h100-pcie": ("NVIDIA H100 PCIe", 79.1, 2.0, 64, 51),
    "h100-nvl": ("NVIDIA H100 NVL", 93.1, 3.9, 300, 60),
    "h200": ("NVIDIA H200", 139.8, 4.8, 450, 67),
    "l4": ("NVIDIA L4", 22.0, 0.3, 32, 30.3),
    "l40s": ("NVIDIA L40S", 44.4, 0.864, 32, 91.6),
}
"""By NVIDIA's data sheets: bandwidth of the memory, NVLink or PCIe of one direction, float32 without tensor cores.
Dense bfloat16 is `device.PEAK_TFLOPS`."""
_NAMED = f"name one of {', '.join(_SHEETS)} (mlc-ray plan --gpus N --gpu NAME)"


def has_sheet(gpu: Gpu) -> bool:
    """Whether a GPU is in the table."""
    return gpu.name in _SHEETS


PCIE = 32e9
"""Bytes a second between GPUs that are not in the table, assumed: sixteen lanes of PCIe 4."""

RAY_KILLS = 0.95
"""Share of a node's memory in use above which Ray kills workers: its default of `RAY_memory_usage_threshold`."""

NETWORK = 50e9
"""Bytes a second and GPU between nodes, assumed: one 400 Gb/s adapter for each GPU."""


def gpu_of(name: str) -> Gpu:
    """The GPU of a table's name (`h100`), or of PyTorch's (`NVIDIA H100 80GB HBM3`).

    Raises:
        HardwareError: It is not known, or a part of a GPU (MIG).
    """
    key = re.sub(r"^a100-(?:sxm4|pcie)-40gb", "a100-40", name.lower().removeprefix("nvidia ").replace(" ", "-"))
    if "-mig-" in key:
        raise HardwareError(f"gpu {name!r} is a part of a GPU (MIG), of which no data sheet is known; {_NAMED}")
    # PyTorch's names go on behind the sheet's: the longest that the name begins with.
    begins = [short for short in _SHEETS if f"{key}-".startswith(f"{short}-")]
    if not begins:
        raise HardwareError(f"gpu {name!r} is not known; {_NAMED}")
    key = max(begins, key=len)
    title, gib, terabytes, gigabytes, single = _SHEETS[key]
    peak = peak_tflops(title, "bfloat16")
    assert peak is not None, title
    return Gpu(key, int(gib * 2**30), terabytes * 1e12, gigabytes * 1e9, peak * 1e12, single * 1e12)


def gpu_key(name: str) -> str:
    """The table's name of a GPU that PyTorch names; of one that is not in it, PyTorch's in small letters."""
    try:
        return gpu_of(name).name
    except HardwareError:
        return name.lower().removeprefix("nvidia ").replace(" ", "-")


@dataclass(frozen=True)
class Cluster:
    """What a plan is for.

    Attributes:
        gpu: of the workers; None where they compute on CPUs.
        gpus: of all nodes; on CPUs, workers that the nodes have room for.
        per_node: GPUs of a node.
        node_memory: bytes of a node's memory; None where that is not known.
        network: bytes a second and GPU between nodes.
    """

    gpu: Gpu | None
    gpus: int
    per_node: int
    node_memory: int | None
    network: float = NETWORK

    @property
    def node_room(self) -> int | None:
        """Bytes of a node's memory that may be in use before Ray kills workers; None where that is not known."""
        return None if self.node_memory is None else int(RAY_KILLS * self.node_memory)

    @property
    def nodes(self) -> int:
        """Nodes."""
        return self.nodes_of(self.gpus)

    def nodes_of(self, workers: int) -> int:
        """Nodes that so many workers lie on, a GPU each."""
        return -(-workers // self.per_node)


def cluster_of(gpus: int, gpu: str, *, per_node: int = 8, node_memory: int | None = None) -> Cluster:
    """A cluster that is only thought of.

    Raises:
        HardwareError: The GPU is not known, or the number of GPUs is no multiple of a node's.
    """
    per_node = min(per_node, gpus)
    if gpus < 1 or gpus % per_node:
        raise HardwareError(f"{gpus} GPUs are no whole number of nodes of {per_node}; set --gpus-per-node")
    return Cluster(gpu_of(gpu), gpus, per_node, node_memory)


def this_machine() -> Cluster:
    """Its CPUs, with all the memory that it may have: one that is only busy now is not refused."""
    return Cluster(None, 1, 1, host_memory().total)


def with_workers(cluster: Cluster, workers: int) -> Cluster:
    """The cluster with so many workers on CPUs, spread evenly over its nodes; one with GPUs unchanged."""
    if cluster.gpu is not None:
        return cluster
    return Cluster(None, workers, -(-workers // cluster.nodes), cluster.node_memory)
