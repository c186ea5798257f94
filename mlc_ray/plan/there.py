"""The cluster that is there, as a plan sees it: by what Ray says of its nodes."""

from __future__ import annotations

import os

from mlc_ray.cluster import node_resources
from mlc_ray.plan.hardware import Cluster, HardwareError, gpu_of

_ACCELERATOR = "accelerator_type:"

RAY_SHARE = 0.7
"""What Ray counts as `memory` of a node's: the rest is for its object store."""


def this_machine(*, nodes: int = 1) -> Cluster:
    """Its CPUs, with all the memory that it has: one that is only busy now is not refused."""
    return Cluster(None, nodes, 1, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def with_workers(cluster: Cluster, workers: int) -> Cluster:
    """The cluster with so many workers on CPUs, spread evenly over its nodes; one with GPUs unchanged."""
    if cluster.gpu is not None:
        return cluster
    return Cluster(None, workers, -(-workers // cluster.nodes), cluster.node_memory)


def cluster_there(*, gpu: bool) -> Cluster | None:
    """Of the nodes that Ray has; None where their GPUs are none of the table.

    On CPUs all nodes are taken to be like this machine (`this_machine`).
    """
    resources = node_resources()
    if not gpu:
        return this_machine(nodes=max(1, sum(bool(node.get("CPU", 0)) for node in resources)))
    nodes = [node for node in resources if node.get("GPU", 0)]
    names = {name.removeprefix(_ACCELERATOR) for node in nodes for name in node if name.startswith(_ACCELERATOR)}
    found = []
    for name in names:
        try:
            found.append(gpu_of(name.removesuffix("-80G").replace("-40G", "-40")))
        except HardwareError:
            return None
    if not found:
        return None
    gpus = [int(node["GPU"]) for node in nodes]
    memory = min((int(node["memory"] / RAY_SHARE) for node in nodes if "memory" in node), default=None)
    return Cluster(min(found, key=lambda each: each.memory), sum(gpus), max(1, min(gpus)), memory)
