"""The cluster that is there, as a plan sees it: by what Ray says of its nodes, and nodes of their memory.

Ray is imported on demand: a simulated run needs none.
"""

from __future__ import annotations

import logging
from functools import cache

from mlc_ray.capacity import NO_LABELS, Labels, Need
from mlc_ray.config import EngineSection
from mlc_ray.device import host_memory
from mlc_ray.plan.hardware import Cluster, HardwareError, gpu_of

logger = logging.getLogger(__name__)

_ACCELERATOR = "accelerator_type:"


def cluster_there(*, gpu: bool, labels: Labels = NO_LABELS) -> Cluster | None:
    """Of the nodes that Ray has, with these labels; None where their GPUs are none of the table.

    Each node counts as much memory as the one that has the least.
    """
    from mlc_ray.cluster import nodes_that_compute

    nodes = nodes_that_compute(gpu=gpu, labels=labels)
    ids = tuple(node["NodeID"] for node in nodes)
    if not gpu:
        return Cluster(None, max(1, len(nodes)), 1, _least_memory(ids))
    resources = [node["Resources"] for node in nodes]
    names = {name.removeprefix(_ACCELERATOR) for node in resources for name in node if name.startswith(_ACCELERATOR)}
    found = []
    for name in names:
        try:
            found.append(gpu_of(name.removesuffix("-80G").replace("-40G", "-40")))
        except HardwareError:
            return None
    if not found:
        return None
    gpus = [int(node["GPU"]) for node in resources]
    return Cluster(min(found, key=lambda each: each.memory), sum(gpus), max(1, min(gpus)), _least_memory(ids))


def engines_there(engine: EngineSection) -> int:
    """Engines of a score on CPUs: as many as are asked for, or by `auto` as the nodes that are there hold."""
    from mlc_ray.cluster import how_many_fit

    if engine.replicas != "auto":
        return engine.replicas
    return how_many_fit(Need(engine.cpus_per_replica, 0.0, engine.label_selector))


def grows() -> bool:
    """Whether an autoscaler may add nodes, whose memory nobody knows."""
    from mlc_ray.cluster import may_grow

    growth = may_grow()
    return bool(growth.kinds) or not growth.known


@cache  # asked once for the same nodes
def _least_memory(nodes: tuple[str, ...]) -> int | None:
    """The least that one of these nodes (ids) has, each asked by a task; None where that is known of none.

    The driver may be on a small head. What Ray counts as a node's `memory` is what was free when it started, without
    its object store, or what its starter said.
    """
    from mlc_ray.cluster import ClusterError, ask_nodes, this_node

    here = this_node()
    found = [host_memory().total] if here in nodes else []
    for node, answer in ask_nodes(host_memory, nodes=[node for node in nodes if node != here]).items():
        if isinstance(answer, ClusterError):
            logger.warning("node %s did not say how much memory it has, and is not planned with (%s)", node[:8], answer)
        else:
            found.append(answer.total)
    return min(found, default=None)
