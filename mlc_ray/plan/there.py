"""The cluster that is there, as a plan sees it: by what Ray says of its nodes, and they of their memory and GPUs.

Ray is imported on demand: a simulated run needs none.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterable
from functools import cache
from typing import TypeVar

from mlc_ray.capacity import NO_LABELS, Labels, Need
from mlc_ray.config import EngineSection
from mlc_ray.device import VisibleGpu, host_memory, visible_gpus
from mlc_ray.plan.hardware import Cluster, Gpu, HardwareError, this_machine
from mlc_ray.plan.rates import gpu_here, read_calibrations

logger = logging.getLogger(__name__)

T = TypeVar("T")


def cluster_here(address: str = "auto", *, accelerator: str = "auto", labels: Labels = NO_LABELS) -> Cluster:
    """The one that a command with these settings would join, or this machine.

    Raises:
        ClusterError: The cluster at an address does not answer, or has no GPU where one is asked for.
        HardwareError: A GPU is neither in the table nor calibrated, or one is asked for and this machine has none.
    """
    from mlc_ray.cluster import connect, running, use_gpu

    if (running() if address == "auto" else address) not in (None, "local"):
        connect(address)
        return cluster_there(gpu=use_gpu(accelerator), labels=labels)
    gpus = [] if accelerator == "cpu" else visible_gpus()
    if not gpus:
        if accelerator == "gpu":
            raise HardwareError("accelerator='gpu', but this machine has no GPU: name a cluster (--gpus N --gpu NAME)")
        return this_machine()
    return Cluster(_least(gpus), len(gpus), len(gpus), host_memory().total)


def cluster_there(*, gpu: bool, labels: Labels = NO_LABELS) -> Cluster:
    """Of the nodes that Ray has, with these labels.

    Each node counts as much memory as the one that has the least, and each GPU as the one that has the least.

    Raises:
        HardwareError: No node with GPUs has the labels, or a GPU is neither in the table nor calibrated.
    """
    from mlc_ray.cluster import nodes_that_compute

    nodes = nodes_that_compute(gpu=gpu, labels=labels)
    ids = tuple(node["NodeID"] for node in nodes)
    if not gpu:
        return Cluster(None, max(1, len(nodes)), 1, _least_memory(ids))
    gpus = [int(node["Resources"]["GPU"]) for node in nodes]
    kinds = _gpus_of(ids)
    if not kinds:
        named = f" that has the labels {dict(labels)}" if labels else ""
        raise HardwareError(f"no node with GPUs{named} is up, or none said which they are: name them (--gpus N)")
    return Cluster(_least(kinds), sum(gpus), max(1, min(gpus)), _least_memory(ids))


def _least(gpus: Iterable[VisibleGpu]) -> Gpu:
    calibrations = read_calibrations()
    return min((gpu_here(each.name, each.memory, calibrations) for each in gpus), key=lambda each: each.memory)


def known_cluster(*, gpu: bool, labels: Labels = NO_LABELS) -> Cluster | None:
    """The same; None where its GPUs are not known, which is logged."""
    try:
        return cluster_there(gpu=gpu, labels=labels)
    except HardwareError as error:
        logger.info("memory is not planned: %s", error)
        return None


def engines_there(engine: EngineSection) -> int:
    """Engines of a score on CPUs: as many as are asked for, or by `auto` as the nodes that are there hold."""
    from mlc_ray.cluster import how_many_fit

    if engine.replicas != "auto":
        return engine.replicas
    return how_many_fit(Need(engine.cpus_per_replica, 0.0, engine.label_selector))


def joined() -> bool:
    """Whether this process is in a Ray cluster."""
    ray = sys.modules.get("ray")
    return ray is not None and bool(ray.is_initialized())


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
    from mlc_ray.cluster import this_node

    here = this_node()
    found = [host_memory().total] if here in nodes else []
    answers = _said_by(tuple(node for node in nodes if node != here), host_memory, "how much memory it has")
    return min([*found, *(each.total for each in answers)], default=None)


@cache
def _gpus_of(nodes: tuple[str, ...]) -> frozenset[VisibleGpu]:
    """The kinds of GPUs that these nodes have, each asked by a task: this process would hold some of their memory.

    Ray's accelerator types do not say it: of "A100-SXM4-40GB" and "H100 PCIe" they keep A100 and H100.
    """
    return frozenset(each for answer in _said_by(nodes, visible_gpus, "which GPUs it has") for each in answer)


def _said_by(nodes: tuple[str, ...], function: Callable[[], T], what: str) -> list[T]:
    from mlc_ray.cluster import ClusterError, ask_nodes

    found = list[T]()
    for node, answer in ask_nodes(function, nodes=nodes).items():
        if isinstance(answer, ClusterError):
            logger.warning("node %s did not say %s, and is not planned with (%s)", node[:8], what, answer)
        else:
            found.append(answer)
    return found
